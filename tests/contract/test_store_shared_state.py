"""What every store promises about the state of users and applications: shared, and of no session's life."""

import asyncio
from typing import Any

import pytest

from app.domain.branch import Back
from app.domain.errors import InvalidInput, PreconditionFailed
from app.domain.state import SharedState, StateScope
from app.ports import SessionStore

from .builders import T0, extend, stored_session
from .conftest import Place
from .test_store_state import LATER, ODD, TOO_MUCH

APP = StateScope("default")
USER = StateScope("default", "", "u")


async def test_shared_state_is_the_scopes_own(place: Place) -> None:
    """Application, owner and user each tell two states apart; the application's is no user's."""
    store = place.store
    scopes = [
        APP,
        USER,
        StateScope("other"),
        StateScope("other", "", "u"),
        StateScope("default", "o", "u"),
        StateScope("default", "", "v"),
        StateScope("default", "", "алиса 🦊"),
    ]
    for number, scope in enumerate(scopes):
        assert await store.get_shared(scope) == SharedState({}, 0)
        assert await store.patch_shared(scope, {"n": number}, T0) == SharedState({"n": number}, 1)
    store = await place.restart("boot-2")
    for number, scope in enumerate(scopes):
        assert await store.get_shared(scope) == SharedState({"n": number}, 1)


async def test_shared_state_is_patched_like_any(place: Place) -> None:
    """Null deletes, objects merge, the revision grows; odd values come back exactly."""
    store = place.store
    await store.patch_shared(APP, {"a": 1, "b": {"c": 1}, "odd": ODD}, T0)
    after = await store.patch_shared(APP, {"a": None, "b": {"d": 2}}, T0)
    assert after == SharedState({"b": {"c": 1, "d": 2}, "odd": ODD}, 2)
    assert await (await place.restart("boot-2")).get_shared(APP) == after


async def test_shared_state_honours_the_expected_revision(store: SessionStore) -> None:
    """0 is that of one that never was; with a wrong one nothing changes."""
    with pytest.raises(PreconditionFailed):
        await store.patch_shared(APP, {"a": 0}, T0, expected_rev=1)
    first = await store.patch_shared(APP, {"a": 1}, T0, expected_rev=0)
    for rev in (0, 2):
        with pytest.raises(PreconditionFailed):
            await store.patch_shared(APP, {"a": 2}, T0, expected_rev=rev)
    assert await store.get_shared(APP) == first == SharedState({"a": 1}, 1)


async def test_shared_state_outlives_sessions_and_knows_no_branch(store: SessionStore) -> None:
    """Moves, deletes and purges of the user's sessions leave it."""
    session, _ = await extend(store, await stored_session(store, user_id="u"), 1)
    purged = await stored_session(store, "s2", user_id="u")
    for scope in (APP, USER):
        await store.patch_shared(scope, {"kept": True}, T0)
    await store.move_head(session, Back(1), LATER)
    await store.delete_session(session.key)
    assert (await store.expire_and_purge(T0 * 2, 9))[1] == 1
    assert await store.find_session(purged.key) is None
    for scope in (APP, USER):
        assert await store.get_shared(scope) == SharedState({"kept": True}, 1)


@pytest.mark.parametrize("patch", TOO_MUCH, ids=["bytes", "keys"])
async def test_shared_state_has_limits(store: SessionStore, patch: dict[str, Any]) -> None:
    """A patch that makes it too large is InvalidInput and changes nothing."""
    before = await store.patch_shared(APP, {"a": 1}, LATER)
    for scope in (APP, USER):
        with pytest.raises(InvalidInput):
            await store.patch_shared(scope, {"b": 2} | patch, LATER)
    assert await store.get_shared(APP) == before
    assert await store.get_shared(USER) == SharedState()


async def test_patches_of_different_keys_of_shared_state_are_all_kept(store: SessionStore) -> None:
    """Fifty at once, each of its own key, without a revision: none is lost."""
    await asyncio.gather(*(store.patch_shared(USER, {f"k{n}": n}, LATER) for n in range(50)))
    assert await store.get_shared(USER) == SharedState({f"k{n}": n for n in range(50)}, 50)


async def increment(store: SessionStore, scope: StateScope, times: int) -> None:
    for _ in range(times):
        while True:
            shared = await store.get_shared(scope)
            count = shared.values.get("n", 0) + 1
            try:
                await store.patch_shared(scope, {"n": count}, LATER, expected_rev=shared.rev)
                break
            except PreconditionFailed:
                continue


async def test_no_increment_of_shared_state_is_lost(place: Place) -> None:
    """Fifty tasks that each add one twenty times through the revision make a thousand, exactly."""
    await asyncio.gather(*(increment(place.store, USER, 20) for _ in range(50)))
    assert await place.store.get_shared(USER) == SharedState({"n": 1000}, 1000)
    assert await (await place.restart("boot-2")).get_shared(USER) == SharedState({"n": 1000}, 1000)
