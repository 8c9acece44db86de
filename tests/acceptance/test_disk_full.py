"""A full disk: turns are refused before a model is paid, reading goes on, and room alone heals it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.small_disk import LimitedFiles, SmallDisk, small_disk
from tests.modelserver import ModelServer
from tests.serverprocess import Reply, ServerProcess

PATIENCE_S = 30
REFUSED_S = 1.0


@pytest.fixture(params=[small_disk, LimitedFiles], ids=["file system", "file size"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    disk: SmallDisk = request.param(tmp_path / "disk")
    yield disk
    disk.remove()


@pytest.fixture
def model() -> Iterator[ModelServer]:
    with ModelServer() as model:
        yield model


@pytest.fixture
def server(disk: SmallDisk, model: ModelServer, tmp_path: Path) -> Iterator[ServerProcess]:
    settings = {
        "OPENAI_API_KEY": "k",
        "OPENAI_BASE_URL": model.base_url,
        "OPENAI_MODEL": "m",
        "LOG_LEVEL": "warning",
        "STORE_URL": f"sqlite:///{disk.folder / 'pool.db'}",
    }
    with ServerProcess(tmp_path, **settings) as server:
        yield server


def say(server: ServerProcess, session: str, path: str = "/chat") -> Reply:
    message = '[[{"mode": "text", "text": "fine"}]]'
    return server.request("POST", path, {"session_id": session, "message": message})


def until(server: ServerProcess, status: int) -> int:
    """Chat until it is answered with ``status``; return how many turns were carried out."""
    give_up_at = time.monotonic() + PATIENCE_S
    carried_out = 0
    while time.monotonic() < give_up_at:
        answer = say(server, "a")
        assert answer.status in (200, 503)
        carried_out += answer.status == 200
        if answer.status == status:
            return carried_out
    raise AssertionError(f"no {status} in {PATIENCE_S} s")


def shown(server: ServerProcess) -> list[Any]:
    """Return all that can be read of the session."""
    paths = ("", "/history", "/turns")
    replies = [server.request("GET", f"/sessions/a{path}") for path in paths]
    assert [reply.status for reply in replies] == [200] * 3
    return [replies[0].body["turn_count"], *(reply.body for reply in replies[1:])]


def test_full_disk_refuses_turns_before_the_model_and_heals_with_room(
    disk: SmallDisk, server: ServerProcess, model: ModelServer
) -> None:
    """Full: 503 at once, no model asked, all readable, nothing partial; with room turns are answered."""
    for _ in range(10):
        assert say(server, "a").status == 200
    disk.fill(server)
    until(server, 503)
    before, asked = shown(server), model.stats()["requests"]
    for path in ("/chat", "/chat/stream"):
        for session in ("a", "a-new-one"):
            for _ in range(5):
                began = time.monotonic()
                refused = say(server, session, path)
                assert time.monotonic() - began < REFUSED_S
                assert (refused.status, refused.body["code"]) == (503, "STORE_UNAVAILABLE")
                assert int(refused.headers["retry-after"]) >= 1
                assert "outcome" not in refused.body
    assert shown(server) == before
    assert server.request("GET", "/sessions/a-new-one").status == 404
    assert model.stats()["requests"] == asked
    assert server.request("GET", "/health").status == 200
    disk.enlarge(server)
    until(server, 200)
    assert model.stats()["requests"] == asked + 1
    assert shown(server)[0] == before[0] + 1
    assert say(server, "a-new-one").status == 200
    assert "Traceback" not in server.log()
