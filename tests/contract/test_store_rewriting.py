"""What holds of a shared store that moves into itself while a server uses it nevertheless."""

import asyncio
from typing import Any

import pytest

from app.domain.dump import SessionDump
from app.domain.errors import LeasedElsewhere
from app.domain.ids import SessionKey
from app.domain.session import SessionChange
from app.domain.state import StateScope
from app.domain.turn import TurnStatus
from app.services import moving
from app.services.moving import Moved, Rewriter

from .builders import T0, current, extend, make_turn, new_id, running, stored_session
from .conftest import SharedPlace


def ignore(_: Moved) -> None:
    """See how far it is, and say nothing."""


async def test_a_turn_that_comes_between_reading_and_writing_waits(
    shared_place: SharedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session is leased from before it is read until it was read back; after that nothing is lost."""
    store: Any = shared_place.store
    session, turns = await extend(store, await stored_session(store), 2)
    server: Any = await shared_place.beside("server", "http://127.0.0.1:1")
    late, refused = make_turn(session, "late"), []
    load, dump = store.load_session, store.dump_session

    async def interfere() -> None:
        try:
            await server.start_turn(session, running(late))
        except LeasedElsewhere as busy:
            refused.append(busy.holder.node.boot_id)

    async def load_late(dumped: SessionDump, **how: Any) -> None:
        await interfere()
        await load(dumped, **how)

    async def dump_late(key: SessionKey) -> SessionDump | None:
        found: SessionDump | None = await dump(key)
        await interfere()
        return found

    monkeypatch.setattr(store, "load_session", load_late)
    monkeypatch.setattr(store, "dump_session", dump_late)
    moved = await Rewriter(store, ignore, new_id()).copy()
    assert (moved.is_verified, moved.sessions, moved.turns) == (True, 1, 2)
    assert len(refused) == 3
    assert await server.leases.holder(session.key) is None
    assert await server.start_turn(await current(server, session), running(late)) is None
    committed = await server.commit_turn(session, late)
    branch = [turn.turn_id for turn in await server.list_branch(committed, 9)]
    assert branch == [*(turn.turn_id for turn in turns), late.turn_id]


@pytest.mark.parametrize("change", ["title", "state", "gone", "again"])
async def test_what_changes_between_reading_and_writing_stays(
    shared_place: SharedPlace, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """What needs no lease, and is acknowledged, is neither undone nor brought back."""
    store: Any = shared_place.store
    session, _ = await extend(store, await stored_session(store), 2)
    server: Any = await shared_place.beside("server", "http://127.0.0.1:1")
    load = store.load_session

    async def load_late(dumped: SessionDump, **how: Any) -> None:
        if change == "title":
            await server.update_session(session.key, SessionChange(title="new"), session.updated_at + 1)
        elif change == "state":
            await server.patch_state(session.key, {"new": 1}, session.updated_at + 1)
        else:
            await server.delete_session(session.key)
        if change == "again":
            await stored_session(server, session.key.session_id)
        expected.append(await server.find_session(session.key))
        await load(dumped, **how)

    expected: list[Any] = []
    monkeypatch.setattr(store, "load_session", load_late)
    moved = await Rewriter(store, ignore, new_id()).copy()
    assert (moved.busy, moved.is_verified) == ([session.key], False)
    assert [await server.find_session(session.key)] == expected
    assert (expected[0] is None) is (change == "gone")


async def test_a_session_in_use_is_named_and_left(
    shared_place: SharedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its turn goes on and is committed; the others are written anew, and that is not called verified."""
    monkeypatch.setattr(moving, "WAIT_S", 0.05)
    store: Any = shared_place.store
    await extend(store, await stored_session(store, "free"), 1)
    session = await stored_session(store, "busy")
    server: Any = await shared_place.beside("server", "http://127.0.0.1:1")
    turn = make_turn(session)
    await server.start_turn(session, running(turn))
    moved = await Rewriter(store, ignore, new_id()).copy()
    assert (moved.busy, moved.sessions, moved.is_verified) == ([session.key], 1, False)
    committed = await server.commit_turn(session, turn)
    assert committed.head == turn.turn_id
    again = await Rewriter(store, ignore, new_id()).copy()
    assert (again.busy, again.sessions, again.is_verified) == ([], 2, True)


async def test_a_session_that_comes_free_is_waited_for(shared_place: SharedPlace) -> None:
    """A turn that ends within the wait is in what is written anew."""
    store: Any = shared_place.store
    session = await stored_session(store)
    server: Any = await shared_place.beside("server", "http://127.0.0.1:1")
    turn = make_turn(session)
    await server.start_turn(session, running(turn))
    rewriting = asyncio.ensure_future(Rewriter(store, ignore, new_id()).copy())
    committed = await server.commit_turn(session, turn)
    moved = await rewriting
    assert (moved.turns, moved.busy, moved.is_verified) == (1, [], True)
    assert (await server.get_turn(committed, turn.turn_id)).status is TurnStatus.FINISHED


async def test_what_belongs_to_no_session_is_counted_on_meanwhile(
    shared_place: SharedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usage and states that a server adds while it goes on are there afterwards, and unchanged."""
    store: Any = shared_place.store
    await stored_session(store, "s", user_id="u")
    scope = StateScope("default", "", "u")
    await store.patch_shared(scope, {"likes": "tea"}, T0)
    server: Any = await shared_place.beside("server", "http://127.0.0.1:1")
    reseal = store.reseal_rest

    async def reseal_late() -> Any:
        session = await stored_session(server, "other", user_id="u")
        await extend(server, session, 2)
        await server.patch_shared(scope, {"drinks": "coffee"}, T0)
        return await reseal()

    before = (await store.get_usage("", "u", 9)).turns
    monkeypatch.setattr(store, "reseal_rest", reseal_late)
    moved = await Rewriter(store, ignore, new_id()).copy()
    shared = await store.get_shared(scope)
    assert (shared.values, shared.rev) == ({"likes": "tea", "drinks": "coffee"}, 2)
    assert (await store.get_usage("", "u", 9)).turns == before + 2
    assert (moved.states, moved.broken_states) == (1, 0)
    assert not moved.is_verified, "a session came that was not written anew"
