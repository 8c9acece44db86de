"""From a URL to a store, and which places are refused."""

import sys

import pytest

from app.domain.session import LifeSpan
from app.stores.memory.store import MemoryStore
from app.stores.opening import open_store
from app.stores.redis.store import RedisStore
from app.stores.sqlite.file import network_file_system
from app.stores.sqlite.store import SqliteStore

MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/vdb /home/local ext4 rw 0 0
//nas/share /mnt/my\\040share cifs rw 0 0
me@host: /mnt/ssh fuse.sshfs rw 0 0
/dev/vdc /mnt/übung ext4 rw 0 0
nas:/x /over ext4 rw 0 0
nas:/x /over nfs rw 0 0
broken
"""


def test_memory_and_files_can_be_opened() -> None:
    """The URLs of the two kinds of stores give that store, without touching anything."""
    assert isinstance(open_store("memory://", LifeSpan()), MemoryStore)
    for url, path in (("sqlite:///a/b.db", "a/b.db"), ("sqlite:////a/b%20c.db", "/a/b c.db")):
        store = open_store(url, LifeSpan())
        assert isinstance(store, SqliteStore)
        assert store._path == path


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_postgresql_can_be_named(scheme: str) -> None:
    """A PostgreSQL URL gives that store, without connecting."""
    store = open_store(f"{scheme}://me:s3cret@nowhere.invalid/db", LifeSpan())
    assert type(store).__name__ == "PostgresStore"


def test_a_missing_driver_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asyncpg a PostgreSQL URL is a ValueError that says what to install, and repeats nothing."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    for name in [name for name in sys.modules if name.startswith("app.stores.postgres")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"pip install 'agentpool\[postgres\]'") as caught:
        open_store("postgresql://me:s3cret@h/db", LifeSpan())
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "", "memory", "memory:", "memory://x", "sqlite:", "sqlite://", "sqlite:///", "sqlite:////",
        "sqlite://host/a.db", "sqlite:///dir/", "sqlite:///:memory:", "sqlite:///a.db?mode=ro",
        "redis:/u:s3cret@h/0", "redis://", "http://u:s3cret@h/0", "mysql://u:s3cret@h/db",
        "SQLITE:///a.db", "postgresql://", "file:///a.db", "/a/b.db",
    ],
)  # fmt: skip
def test_any_other_url_is_refused(url: str) -> None:
    """Any other URL is a ValueError that says what is allowed and does not repeat the URL."""
    with pytest.raises(ValueError, match="must be memory://, sqlite:///") as caught:
        open_store(url, LifeSpan())
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["redis://h", "redis://u:s3cret@h:1/3", "rediss://h:1", "unix:///run/redis.sock?db=2",
     "redis+sentinel://u:s3cret@a:1,b/main/2"],
)  # fmt: skip
def test_redis_is_not_touched_before_it_is_opened(url: str) -> None:
    """Whatever the kind of its address, the store is made without connecting."""
    assert isinstance(open_store(url, LifeSpan()), RedisStore)


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:s3cret@h:port",
        "redis+sentinel://u:s3cret@h:1",
        "redis+sentinel://u:s3cret@h:1/main/x",
        "redis://u:s3cret@h?x=y",
        "rediss://u:s3cret@h:1/3?x=y",
        "unix:///run/redis.sock?password=s3cret&x=y",
    ],
)
def test_a_redis_address_that_is_none_is_refused(url: str) -> None:
    """It is a ValueError in one line that does not repeat it."""
    with pytest.raises(ValueError) as caught:
        open_store(url, LifeSpan())
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_its_extra_a_redis_store_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where redis-py is missing the error names the extra."""
    for name in [name for name in sys.modules if name.startswith(("app.stores.redis", "redis"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ValueError, match=r"pip install 'agentpool\[redis\]'"):
        open_store("redis://h", LifeSpan())


@pytest.mark.parametrize(
    ("directory", "kind"),
    [
        ("/", None), ("/var/lib", None), ("/home", "nfs4"), ("/home/me", "nfs4"), ("/homes", None),
        ("/home/local/me", None), ("/mnt/my share", "cifs"), ("/mnt/my share/x", "cifs"),
        ("/mnt/ssh/x", "fuse.sshfs"), ("/mnt/übung", None), ("/over/x", "nfs"),
    ],
)  # fmt: skip
def test_network_file_systems_are_recognised(directory: str, kind: str | None) -> None:
    """The innermost, latest mount that holds a directory decides whether it is a network's."""
    assert network_file_system(directory, MOUNTS) == kind


def test_without_a_mount_table_nothing_is_refused() -> None:
    """Where the mounts are unknown every directory passes."""
    assert network_file_system("/home", "") is None
