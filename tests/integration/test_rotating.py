"""Rotating keys: what is said where something cannot be read, or the store is not to be had."""

import base64
from pathlib import Path

import pytest

from app.config import Settings
from app.domain.state import StateScope
from app.rotate import rotate
from app.stores.keyring import KeyRing
from app.stores.sqlite.store import SqliteStore
from tests.contract.builders import BOOT, LIFE, T0, extend, make_turn, stored_session

OLD, NEW = b"o" * 32, b"n" * 32
SCOPE = StateScope("app")


def settings_for(path: Path, *keys: bytes) -> Settings:
    ring = ",".join(base64.b64encode(key).decode() for key in keys)
    return Settings(store_url=f"sqlite:///{path}", encryption_keys=ring)


def store_with(path: Path, *keys: bytes) -> SqliteStore:
    return SqliteStore(str(path), LIFE, keys=KeyRing([*keys]))


def files_with(folder: Path, text: bytes) -> list[Path]:
    return [file for file in folder.glob("pool.db*") if text in file.read_bytes()]


async def test_shared_state_without_its_key_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All else is encrypted, one line says what is not, and where its key is it still reads."""
    path = tmp_path / "pool.db"
    store = store_with(path, OLD)
    await store.open(BOOT)
    await store.patch_shared(SCOPE, {"likes": "tea"}, T0)
    await store.close()
    store = SqliteStore(str(path), LIFE)
    await store.open(BOOT)
    session, turns = await extend(store, await stored_session(store), 2)
    await store.close()
    assert await rotate(settings_for(path, NEW), force=False, skip_broken=False) is False
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 states of users or applications cannot be read and are left as they are" in line
    assert await rotate(settings_for(path, NEW), force=False, skip_broken=True) is True
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "encrypted with the first key, but for what cannot be read"
    )
    store = store_with(path, NEW, OLD)
    await store.open(BOOT)
    assert (await store.get_shared(SCOPE)).values == {"likes": "tea"}
    assert await rotate(settings_for(path, NEW, OLD), force=False, skip_broken=False) is False
    assert "in use by" in capsys.readouterr().err
    await store.close()
    assert await rotate(settings_for(path, NEW, OLD), force=False, skip_broken=False) is True
    assert capsys.readouterr().out.splitlines()[-1] == "encrypted with the first key"
    store = store_with(path, NEW)
    await store.open(BOOT)
    assert (await store.get_shared(SCOPE)).values == {"likes": "tea"}
    assert [turn.turn_id for turn in await store.list_branch(session, 9)] == [one.turn_id for one in turns]
    await store.close()


async def test_the_files_are_scrubbed_though_something_cannot_be_read(tmp_path: Path) -> None:
    """Also beside a broken state no byte of what was stored in plain is left, be it said or shared."""
    path = tmp_path / "pool.db"
    store = store_with(path, OLD)
    await store.open(BOOT)
    await store.patch_shared(SCOPE, {"likes": "tea"}, T0)
    await store.close()
    store = SqliteStore(str(path), LIFE)
    await store.open(BOOT)
    for number in range(60):
        session = await stored_session(store, f"s{number}", user_id="u")
        turn = make_turn(session, "PLAINMARK " * (number + 1))
        await store.commit_turn(session, turn)
    await store.patch_shared(StateScope("app", "", "u"), {"likes": "PLAINMARK"}, T0)
    await store.close()
    assert await rotate(settings_for(path, NEW), force=False, skip_broken=True) is True
    assert not files_with(tmp_path, b"PLAINMARK")
