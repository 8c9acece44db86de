"""A PostgreSQL store's content can be taken out and put into another one, unchanged."""

from dataclasses import replace

import pytest

from app.domain.branch import Back
from app.domain.dump import RestDump, SessionDump
from app.domain.idempotency import Binding
from app.domain.ids import SessionKey
from app.domain.session import Session
from app.domain.state import StateScope
from app.domain.turn import TurnStatus, Usage
from app.stores import rules
from app.stores.postgres import PostgresStore
from tests.postgresserver import PostgresServer

from .builders import (
    BOOT,
    LIFE,
    T0,
    current,
    extend,
    failed,
    make_checkpoint,
    make_note,
    make_turn,
    running,
    stored_session,
)

WEIRD = "您好 \u2028 \x00 'quotes\" \\ 🤦"


async def fill(store: PostgresStore, session_id: str, owner: str) -> Session:
    """Make a session with everything that one can have."""
    session = await stored_session(
        store,
        session_id,
        owner=owner,
        user_id="u",
        title=WEIRD,
        state={"a": [1, WEIRD]},
        metadata={"": 2**70},
    )
    session, turns = await extend(store, session, 3)
    await store.patch_state(session.key, {"b": 2}, T0 + 4000)
    await store.add_checkpoint(session, make_checkpoint(label=WEIRD, data={"x": 1}, created_at=T0 + 4500))
    session = await store.move_head(await current(store, session), Back(1), T0 + 5000)
    bound = make_turn(session, binding=Binding(owner, f"key-{session_id}", b"f" * 16), started_at=T0 + 6000)
    session = await store.commit_turn(session, bound)
    await store.record_turn(session, failed(make_turn(session, started_at=T0 + 7000)))
    session = await store.add_note(session, make_note(turns[0].turn_id, created_at=T0 + 8000), Usage(5, 5))
    busy = make_turn(session, started_at=T0 + 9000)
    await store.start_turn(session, running(busy))
    return await current(store, session)


async def dump(store: PostgresStore) -> tuple[dict[SessionKey, SessionDump], RestDump]:
    """Take everything out, two sessions at a time."""
    found: dict[SessionKey, SessionDump] = {}
    last = None
    while keys := await store.list_after(last, 2):
        for key in keys:
            dumped = await store.dump_session(key)
            assert dumped is not None
            found[key] = dumped
        last = keys[-1]
    return found, await store.dump_rest()


@pytest.mark.parametrize("times", [1, 2])
async def test_what_was_moved_is_what_was_there(postgres: PostgresServer, times: int) -> None:
    """Every session, state, usage and total, but a turn that ran is failed; also when it is done twice."""
    with postgres.empty_schema() as one, postgres.empty_schema() as two:
        store = PostgresStore(one, LIFE, accept_volatile=True)
        other = PostgresStore(two, LIFE, accept_volatile=True)
        await store.open(BOOT)
        await other.open(BOOT)
        sessions = [await fill(store, f"s{n}", owner) for n in range(3) for owner in ("", "ö")]
        await store.delete_session(sessions[0].key)
        await store.patch_shared(StateScope("default", "", "u"), {"x": WEIRD}, T0)
        content, rest = await dump(store)
        assert list(content) == sorted(content)
        assert len(content) == 5
        for _ in range(times):
            for dumped in content.values():
                await other.load_session(dumped)
            await other.load_rest(rest)
        moved, moved_rest = await dump(other)
        assert moved_rest == rest
        assert moved == {key: ended(dumped) for key, dumped in content.items()}
        for session in sessions[1:]:
            assert (await other.load_path(session)) == await store.load_path(session)
            found = await other.find_bound(session.key.owner, f"key-{session.key.session_id}")
            assert found is not None
            assert found.turn.on_branch
        stats = await store.get_session_stats()
        assert await other.get_session_stats() == stats
        assert other.session_count_nowait() == 5
        after, _ = await extend(other, sessions[1], 2)
        assert after.depth == sessions[1].depth + 2
        await store.close()
        await other.close()


def ended(dumped: SessionDump) -> SessionDump:
    """Return the dump with the turn failed that ran."""
    (busy,) = [one for one in dumped.turns if one.turn.status is TurnStatus.RUNNING]
    assert busy.state is None
    failed_turn = rules.interrupted(busy.turn, busy.turn.started_at)
    turns = [replace(one, turn=failed_turn) if one is busy else one for one in dumped.turns]
    return replace(dumped, turns=tuple(turns))
