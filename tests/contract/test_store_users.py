"""What every store promises about erasing a user: all that is theirs goes, and nothing else."""

import pytest

from app.domain.erasure import Erased
from app.domain.ids import SessionKey
from app.domain.session import SessionQuery
from app.domain.state import SharedState, StateScope
from app.domain.stats import UserUsage
from app.domain.turn import Usage
from app.ports import SessionStore

from .builders import T0, extend, failed, make_checkpoint, make_note, make_turn, stored_session
from .conftest import Place, SharedPlace

ODD = "алиса/🦊 %*?[x]"
NOTHING = UserUsage(0, 0, 0, ())


async def fill(store: SessionStore, name: str, user_id: str, owner: str = "") -> SessionKey:
    """Store a session with two turns, one that failed, a checkpoint, two facts; and a user's state."""
    session = await stored_session(store, name, owner=owner, user_id=user_id)
    session, _ = await extend(store, session, 2)
    await store.record_turn(session, failed(make_turn(session, "no")))
    await store.add_checkpoint(session, make_checkpoint(label="named"))
    for number in range(2):
        await store.patch_state(session.key, {"n": number}, T0 + number)
    await store.patch_shared(StateScope("default", owner, user_id), {"name": user_id}, T0)
    return session.key


async def test_a_deletion_says_what_it_removed(store: SessionStore) -> None:
    """Turns, failed ones too, checkpoints and logged facts of the sessions that were there, once."""
    keys = [await fill(store, name, "u") for name in ("a", "b")]
    erased = await store.delete_sessions([*keys, keys[0], SessionKey("", "missing")])
    assert erased == Erased(sessions=2, turns=6, checkpoints=2, events=4)
    assert await store.delete_sessions(keys) == Erased()


@pytest.mark.parametrize("user_id", ["u", ODD])
async def test_a_user_is_forgotten(place: Place, user_id: str) -> None:
    """States of every application and usage go, also over a restart; repeating finds nothing."""
    store = place.store
    key = await fill(store, "a", user_id)
    await store.patch_shared(StateScope("other", "", user_id), {"x": 1}, T0)
    await store.delete_sessions([key])
    scopes = tuple(StateScope(app, "", user_id) for app in ("default", "other"))
    assert await store.list_scopes("", user_id) == scopes
    assert await store.forget_user("", user_id) == Erased(states=2, usage_days=1)
    store = await place.restart("boot-2")
    assert await store.list_scopes("", user_id) == ()
    assert [await store.get_shared(scope) for scope in scopes] == [SharedState(), SharedState()]
    assert await store.get_usage("", user_id, 9) == NOTHING
    assert await store.forget_user("", user_id) == Erased()


async def test_forgetting_spares_everybody_else(store: SessionStore) -> None:
    """Users of the same name under another owner, other users, applications and the statistics stay."""
    key = await fill(store, "a", "u")
    other = await fill(store, "b", "u", owner="o")
    third = await fill(store, "c", "v")
    app = StateScope("default")
    await store.patch_shared(app, {"theirs": 1}, T0)
    before = await store.get_session_stats()
    usage = [await store.get_usage(*user, 9) for user in (("o", "u"), ("", "v"))]
    await store.delete_sessions([key])
    assert await store.forget_user("", "u") == Erased(states=1, usage_days=1)
    assert [await store.get_usage(*user, 9) for user in (("o", "u"), ("", "v"))] == usage
    assert usage[0].turns == 3
    assert await store.list_scopes("o", "u") == (StateScope("default", "o", "u"),)
    assert await store.list_scopes("", "v") == (StateScope("default", "", "v"),)
    assert (await store.get_shared(app)).values == {"theirs": 1}
    assert set(await store.list_keys(None, limit=9)) == {other, third}
    after = await store.get_session_stats()
    assert (after.turns, after.tokens, after.created) == (before.turns, before.tokens, before.created)


async def test_a_forgotten_user_may_come_back(store: SessionStore) -> None:
    """As somebody of whom nothing is known; and what is counted of them then is right."""
    await store.delete_sessions([await fill(store, "a", "u")])
    await store.forget_user("", "u")
    key = await fill(store, "a", "u")
    assert (await store.get_usage("", "u", 9)).turns == 3
    assert await store.get_shared(StateScope("default", "", "u")) == SharedState({"name": "u"}, 1)
    assert await store.list_keys("", user_id="u", limit=9) == (key,)


async def test_notes_are_listed(store: SessionStore) -> None:
    """All of them, the oldest first, also one that is on no path to the head; none of a deleted session."""
    session = await stored_session(store, "a")
    session, turns = await extend(store, session, 2)
    notes = [make_note(turn.turn_id, f"So far: {turn.turn_id} 🦊") for turn in turns]
    for note in notes:
        session = await store.add_note(session, note, Usage(1, 2))
    assert await store.list_notes(session) == tuple(notes)
    await store.delete_session(session.key)
    assert await store.list_notes(session) == ()


async def test_a_users_count_is_right_whoever_made_the_sessions(shared_place: SharedPlace) -> None:
    """Sessions that one process made and another deleted are counted as none, and those left as they are."""
    store, other = shared_place.store, await shared_place.beside("boot-2")
    made = [await stored_session(store, name, user_id="u") for name in ("a", "b", "c")]
    await other.delete_sessions([session.key for session in made[:2]])
    assert await other.forget_user("", "u") == Erased()
    assert await store.list_keys("", user_id="u", limit=9) == (made[2].key,)
    for one in (store, other):
        assert (await one.list_sessions(SessionQuery(owner="", now=T0, user_id="u"))).total == 1
