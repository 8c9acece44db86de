"""API keys: who is let in, what is kept of a key, and how the file is changed and followed."""

import json
import logging
import os
import stat
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from app.domain.errors import Unauthenticated
from app.domain.principal import Principal
from app.identity.api_keys import ApiKeys
from app.identity.key_file import KeyFile, Scope, from_ms
from tests.fakes import EPOCH_MS, FakeClock

NOW = from_ms(EPOCH_MS)
DAY_S = 86_400


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def create(path: str, user_id: str = "alice", scope: Scope = "user", days: int | None = None) -> str:
    expires_at = None if days is None else NOW + timedelta(days=days)
    return KeyFile(path).create(user_id, scope, None, NOW, expires_at)[1]


def bearer(key: str | bytes) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + (key.encode() if isinstance(key, str) else key)


def is_refused(keys: ApiKeys, *headers: tuple[bytes, bytes]) -> bool:
    try:
        keys.authenticate(headers)
    except Unauthenticated:
        return True
    return False


def test_a_key_stands_for_its_user(path: str, clock: FakeClock) -> None:
    """Either header brings it; other headers do not count; the scheme's case does not."""
    key, other = create(path), create(path, "root", "admin")
    keys = ApiKeys(path, clock)
    expected = Principal("alice", is_admin=False, user_id="alice", credential=f"key:{key[3:19]}")
    assert keys.authenticate([(b"host", b"x"), bearer(key)]) == expected
    assert keys.authenticate([(b"x-api-key", key.encode())]) == expected
    assert keys.authenticate([(b"authorization", b"bEARER   " + key.encode())]) == expected
    root = keys.authenticate([bearer(other)])
    assert (root.owner, root.is_admin) == ("root", True)


def test_what_is_no_key_is_refused(path: str, clock: FakeClock) -> None:
    """None, a wrong one, one of another shape, two, both headers: nobody comes in, and nothing breaks."""
    key = create(path)
    keys = ApiKeys(path, clock)
    right, bare = bearer(key), (b"x-api-key", key.encode())
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
    unknown = "ap_" + "0" * 16 + key[19:]
    assert not is_refused(keys, right)
    for headers in (
        (),
        (bearer(wrong),),
        (bearer(unknown),),
        (bearer("é".encode()),),
        (bearer("é".encode("latin-1") * 46),),
        (bearer(b"\xff\xfe\x00"),),
        (bearer(key + " "),),
        (bearer(key.upper()),),
        (bearer(b""),),
        (bearer(b"a" * 100_000),),
        ((b"authorization", key.encode()),),
        ((b"authorization", b"Basic " + key.encode()),),
        ((b"authorization", b"Bearer"),),
        ((b"x-api-key", b""),),
        ((b"x-api-key", b"Bearer " + key.encode()),),
        (right, right),
        (right, bearer(wrong)),
        (right, bare),
        (bare, bare),
        (bare, (b"authorization", b"")),
    ):
        assert is_refused(keys, *headers), headers


def test_a_key_counts_until_it_expires(path: str, clock: FakeClock) -> None:
    """To the millisecond; one without an end goes on."""
    ending, endless = create(path, days=2), create(path)
    keys = ApiKeys(path, clock)
    clock.advance(2 * DAY_S - 0.001)
    assert not is_refused(keys, bearer(ending))
    clock.advance(0.001)
    assert is_refused(keys, bearer(ending))
    assert not is_refused(keys, bearer(endless))


def test_changes_count_within_a_second(path: str, clock: FakeClock) -> None:
    """A new key comes in and a revoked one does not, a second later at most and without a restart."""
    first = create(path)
    keys = ApiKeys(path, clock)
    second = create(path, "bob")
    assert KeyFile(path).revoke(first[3:19]) is not None
    assert not is_refused(keys, bearer(first))
    clock.advance(1.0)
    assert is_refused(keys, bearer(first))
    assert keys.authenticate([bearer(second)]).owner == "bob"


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"{",
        b"[]",
        b'{"keys": 1}',
        b'{"version": 2, "keys": []}',
        b'{"keys": [{"id": "x"}]}',
        b"\xff",
        None,
    ],
)
def test_a_broken_file_leaves_the_last_good_keys(
    path: str, clock: FakeClock, broken: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, as an error and without what is in it; the mended file counts again."""
    key = create(path)
    keys, good = ApiKeys(path, clock), Path(path).read_bytes()
    if broken is None:
        Path(path).unlink()
    else:
        Path(path).write_bytes(broken)
    for _ in range(3):
        clock.advance(1.0)
        assert not is_refused(keys, bearer(key))
    said = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 1
    assert said[0].getMessage().startswith("API_KEYS_FILE: ")
    Path(path).write_bytes(good.replace(b'"alice"', b'"carol"'))
    clock.advance(1.0)
    assert keys.authenticate([bearer(key)]).owner == "carol"


def test_a_file_that_could_not_be_read_is_tried_again(
    path: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it can be, though it has not changed since: a key that was revoked meanwhile does not count."""
    key = create(path)
    keys = ApiKeys(path, clock)
    KeyFile(path).revoke(key[3:19])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", _refuse_to_read)
        clock.advance(1.0)
        assert not is_refused(keys, bearer(key))
    clock.advance(1.0)
    assert is_refused(keys, bearer(key))


def _refuse_to_read(path: Path) -> bytes:
    raise PermissionError(13, "Permission denied", str(path))


def test_a_change_is_seen_whatever_the_files_time_says(path: str, clock: FakeClock) -> None:
    """Of the same size, in place, and with the time of before, as some tools that copy leave it."""
    key = create(path)
    keys, before = ApiKeys(path, clock), os.stat(path)
    Path(path).write_bytes(Path(path).read_bytes().replace(b'"alice"', b'"carol"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    while os.stat(path).st_ctime_ns == before.st_ctime_ns:  # the file system's clock ticks every 4 ms or so
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    clock.advance(1.0)
    assert keys.authenticate([bearer(key)]).owner == "carol"


@pytest.mark.parametrize("change", [{"scope": "root"}, {"user_id": "a/b"}, {"sha256": "00"}, {"more": 1}])
def test_a_file_with_a_wrong_entry_is_refused_at_the_start(
    path: str, clock: FakeClock, change: dict[str, object]
) -> None:
    """It names the setting and the field, and repeats no value."""
    create(path)
    document = json.loads(Path(path).read_text())
    document["keys"][0] |= change
    Path(path).write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"^API_KEYS_FILE: .*keys.0.{next(iter(change))}") as refusal:
        ApiKeys(path, clock)
    assert document["keys"][0]["sha256"] not in str(refusal.value).replace("00", "")


def test_without_a_file_nobody_could_come_in(path: str, clock: FakeClock) -> None:
    """So the server does not start; it says which setting names the file."""
    with pytest.raises(ValueError, match=r"^API_KEYS_FILE: .* cannot be read: No such file"):
        ApiKeys(path, clock)


def test_the_file_keeps_no_key(path: str) -> None:
    """Only what a key hashes to, for its owner alone to read; no two keys are alike."""
    made = {create(path) for _ in range(20)}
    assert len(made) == 20
    text = Path(path).read_text()
    assert not any(key in text or key[20:] in text for key in made)
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    assert not list(Path(path).parent.glob("*.new"))


def test_keys_that_are_made_at_once_are_all_kept(path: str) -> None:
    """Eight who change the file at the same time lose nothing of each other's."""
    made: list[str] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        for _ in range(5):
            made.append(create(path))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 40
    assert sorted(key.id for key in KeyFile(path).list()) == sorted(key[3:19] for key in made)


def test_a_change_that_fails_leaves_the_file_as_it_was(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, say: the keys of before still count, and no half file stays behind."""
    create(path)
    before = Path(path).read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        create(path)
    assert Path(path).read_bytes() == before
    assert not list(Path(path).parent.glob("*.new"))


def test_the_file_stays_its_owners(path: str) -> None:
    """A server under another user than root, who revokes a key, still reads it; so does its group."""
    key = create(path)
    owner = (65534, 65534) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    os.chown(path, *owner)
    os.chmod(path, 0o640)
    KeyFile(path).revoke(key[3:19])
    found = os.stat(path)
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (*owner, 0o640)


def test_who_would_take_the_file_from_its_owner_is_refused(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither another user with access to the folder: nothing is changed, and it is said why."""
    key = create(path)
    before = Path(path).read_bytes()

    def refuse(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.fchown", refuse)
    with pytest.raises(PermissionError, match="only its owner, or root"):
        KeyFile(path).revoke(key[3:19])
    assert Path(path).read_bytes() == before
    assert not list(Path(path).parent.glob("*.new"))
