"""The store that the nodes of a cluster share, whichever it is: what can befall it, by one set of names."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from tests.postgresserver import PostgresServer, find_binaries
from tests.redisserver import RedisServer


class StoreServer(Protocol):
    """A server on ``port`` that keeps its files in ``data_folder``."""

    @property
    def port(self) -> int: ...

    @property
    def url(self) -> str: ...

    @property
    def data_folder(self) -> Path: ...

    def start(self) -> None:
        """Start it and return when it answers."""

    def stop(self) -> None:
        """End it in good order."""

    def kill(self) -> None:
        """End it as ``kill -9`` does."""

    def freeze(self) -> None:
        """Stop it: connections stay open, and nothing answers."""

    def thaw(self) -> None: ...


def url_through(server: StoreServer, port: int) -> str:
    """Return the server's URL by way of another port."""
    return server.url.replace(f":{server.port}/", f":{port}/")


def take_copy(server: StoreServer, folder: Path) -> None:
    """Copy all that it has stored to ``folder``; it is away for a moment."""
    server.stop()
    shutil.copytree(server.data_folder, folder)
    server.start()


def bring_back(server: StoreServer, folder: Path) -> None:
    """Let it come back with what ``take_copy`` saw; what was written since is lost."""
    server.kill()
    owner = server.data_folder.stat()
    shutil.rmtree(server.data_folder)
    shutil.copytree(folder, server.data_folder)
    for path in (server.data_folder, *server.data_folder.rglob("*")):
        shutil.chown(path, owner.st_uid, owner.st_gid)
    server.start()


STORES = ("redis", "postgres")


@contextmanager
def open_store_server(kind: str) -> Iterator[StoreServer]:
    """Start a server of that kind with nothing in it, which loses nothing; skip where there is none."""
    if kind == "postgres":
        binaries = find_binaries()
        if binaries is None:
            pytest.skip("no PostgreSQL here")
        with PostgresServer(binaries, fsync=True) as server:
            yield server
        return
    # By default it may answer up to two seconds before a write is in its file (everysec).
    server = RedisServer("--appendfsync", "always")
    try:
        yield server.start()
    finally:
        server.close()
