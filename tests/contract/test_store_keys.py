"""What every store promises about idempotency keys: one committed turn each, as long as that turn exists."""

import logging
from contextlib import nullcontext
from dataclasses import replace

import pytest

from app.domain.errors import KeyTaken
from app.domain.idempotency import Binding, fingerprint
from app.domain.session import Session
from app.domain.turn import CancelReason, Turn, TurnStatus
from app.ports import SessionStore

from .builders import T0, dropped, failed, make_turn, running, stored_session
from .conftest import Place

MINE = Binding("", "key-1", fingerprint("s1", "hi"))


def bound_turn(session: Session, binding: Binding = MINE, **fields: object) -> Turn:
    return make_turn(session, binding=binding, **fields)


@pytest.mark.parametrize("has_start", [True, False])
async def test_a_committed_turn_is_found_by_its_key(place: Place, has_start: bool) -> None:
    """With its start record or without it, before and after a restart, as the store shows the turn."""
    session = await stored_session(place.store)
    turn = bound_turn(session)
    if has_start:
        await place.store.start_turn(session, running(turn))
    await place.store.commit_turn(session, turn)
    for life in (1, 2):
        store = place.store if life == 1 else await place.restart("boot-2")
        found = await store.find_bound("", "key-1")
        assert found is not None
        assert (found.session_id, found.fingerprint) == ("s1", MINE.fingerprint)
        assert found.turn == replace(turn, binding=None, on_branch=True)
        assert found.turn == await store.get_turn(session, turn.turn_id)


async def test_a_kept_turn_is_found_and_a_repeated_commit_changes_nothing(store: SessionStore) -> None:
    """A cancelled turn that was kept holds its key, however often its commit is repeated."""
    session = await stored_session(store)
    turn = bound_turn(
        session, status=TurnStatus.CANCELLED, kept=True, cancel_reason=CancelReason.USER, finish_reason=None
    )
    for _ in range(2):
        await store.commit_turn(session, turn)
    found = await store.find_bound("", "key-1")
    assert found is not None
    assert found.turn.turn_id == turn.turn_id


async def test_a_running_turn_is_not_found(store: SessionStore) -> None:
    """A turn that has only begun is not answered by its key; with leases it is said who runs it."""
    session = await stored_session(store)
    await store.start_turn(session, running(bound_turn(session)))
    await store.ping()
    with nullcontext() if store.leases is None else pytest.raises(KeyTaken):
        assert await store.find_bound("", "key-1") is None


async def test_equal_keys_of_two_owners_are_two_keys(store: SessionStore) -> None:
    """Each owner finds the own turn, and a third none."""
    for owner in ("alice", "bob"):
        session = await stored_session(store, f"of-{owner}", owner=owner)
        await store.commit_turn(session, bound_turn(session, Binding(owner, "k", owner.encode() * 4)))
    for owner in ("alice", "bob"):
        found = await store.find_bound(owner, "k")
        assert found is not None
        assert (found.session_id, found.fingerprint) == (f"of-{owner}", owner.encode() * 4)
    assert await store.find_bound("carol", "k") is None
    assert await store.find_bound("alice", "K") is None


@pytest.mark.parametrize("end", [failed, dropped])
@pytest.mark.parametrize("has_start", [True, False])
async def test_a_turn_that_left_no_trace_releases_its_key(place: Place, end: object, has_start: bool) -> None:
    """After a failed or dropped turn the key finds nothing and can be bound to the next turn."""
    store = place.store
    session = await stored_session(store)
    first = bound_turn(session)
    if has_start:
        await store.start_turn(session, running(first))
    await store.record_turn(session, end(first))  # type: ignore[operator]
    assert await store.find_bound("", "key-1") is None
    second = bound_turn(session, replace(MINE, fingerprint=fingerprint("other")))
    await store.start_turn(session, running(second))
    await store.commit_turn(session, second)
    await store.record_turn(session, end(first))  # type: ignore[operator]
    found = await (await place.restart("boot-2")).find_bound("", "key-1")
    assert found is not None
    assert (found.turn.turn_id, found.fingerprint) == (second.turn_id, fingerprint("other"))


async def test_a_turn_that_died_with_its_process_releases_its_key(place: Place) -> None:
    """After the next start the key of an interrupted turn finds nothing and can be bound again."""
    session = await stored_session(place.store)
    await place.store.start_turn(session, running(bound_turn(session)))
    store = await place.restart("boot-2")
    assert await store.find_bound("", "key-1") is None
    second = bound_turn(session, boot_id="boot-2")
    await store.commit_turn(session, second)
    found = await store.find_bound("", "key-1")
    assert found is not None
    assert found.turn.turn_id == second.turn_id


async def test_a_key_whose_release_was_lost_goes_to_the_next_turn(store: SessionStore) -> None:
    """A turn that never ended does not keep its key from the turn that commits with it."""
    session = await stored_session(store)
    other = await stored_session(store, "s2")
    await store.start_turn(session, running(bound_turn(session)))
    second = bound_turn(other)
    await store.commit_turn(other, second)
    found = await store.find_bound("", "key-1")
    assert found is not None
    assert (found.session_id, found.turn.turn_id) == ("s2", second.turn_id)


async def test_a_late_release_takes_no_key_from_another_turn(store: SessionStore) -> None:
    """The end of a turn that has lost its key leaves the key where it is."""
    session = await stored_session(store)
    other = await stored_session(store, "s2")
    first = bound_turn(session)
    await store.start_turn(session, running(first))
    second = bound_turn(other)
    await store.commit_turn(other, second)
    await store.record_turn(session, failed(first))
    found = await store.find_bound("", "key-1")
    assert found is not None
    assert found.turn.turn_id == second.turn_id


async def test_the_first_committed_turn_keeps_its_key(
    store: SessionStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A second commit under a key that has its turn succeeds without the key and is logged as an error."""
    session = await stored_session(store)
    first, other = bound_turn(session), await stored_session(store, "s2")
    await store.commit_turn(session, first)
    second = bound_turn(other)
    with caplog.at_level(logging.ERROR):
        assert (await store.commit_turn(other, second)).head == second.turn_id
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert second.turn_id in caplog.text
    assert "key-1" not in caplog.text
    found = await store.find_bound("", "key-1")
    assert found is not None
    assert (found.session_id, found.turn.turn_id) == ("s1", first.turn_id)


async def test_keys_go_with_their_session(store: SessionStore) -> None:
    """Deleting or purging a session frees its keys, and no others."""
    kept = await stored_session(store, "kept", ttl_s=0)
    await store.commit_turn(kept, bound_turn(kept, Binding("", "stays", b"f" * 16)))
    for number, session_id in enumerate(("deleted", "purged")):
        session = await stored_session(store, session_id)
        await store.commit_turn(session, bound_turn(session))
        assert await store.find_bound("", "key-1") is not None
        if number == 0:
            await store.delete_session(session.key)
        else:
            assert (await store.expire_and_purge(T0 * 2, 10))[1] == 1
        assert await store.find_bound("", "key-1") is None
        assert await store.find_bound("", "stays") is not None


async def test_a_key_finds_its_turn_when_the_session_has_gone_on(store: SessionStore) -> None:
    """A key finds its turn, on the branch, after later turns."""
    session = await stored_session(store)
    turn = bound_turn(session)
    session = await store.commit_turn(session, turn)
    await store.commit_turn(session, make_turn(session))
    found = await store.find_bound("", "key-1")
    assert found is not None
    assert found.turn == replace(turn, binding=None, on_branch=True)
