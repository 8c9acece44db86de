"""What every store promises about session records."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from app.domain.branch import ToTurn
from app.domain.errors import (
    InvalidInput,
    PreconditionFailed,
    SessionExists,
    SessionLimit,
    SessionNotFound,
    StoreUnavailable,
    TurnNotFound,
)
from app.domain.ids import SessionKey
from app.domain.session import Session, SessionCap, SessionChange, SessionPage, SessionQuery, SessionStatus
from app.domain.state import StateScope
from app.domain.turn import Usage
from app.ports import SessionStore

from .builders import (
    BOOT,
    LIFE,
    T0,
    dropped,
    extend,
    make_checkpoint,
    make_note,
    make_session,
    make_turn,
    new_id,
    running,
    stored_session,
)
from .conftest import Place

FULL = {
    "user_id": "алиса 🦊",
    "window_id": "desktop",
    "title": "Zitat \"'%_\\ \u2028 您好",
    "provider": "openai",
    "model": "gpt-5-mini",
    "params": {"temperature": 0.2, "stop": ["a", "b"], "seed": 2**70},
    "metadata": {"a": {"b": [1, None, True, 1.5]}, "🙂": "x"},
    "template": {},
    "ttl_s": 0,
    "marked_idle": True,
}


async def test_a_stored_session_is_found_as_it_was(place: Place) -> None:
    """Every field of a session comes back equal, before and after a restart."""
    session = make_session("s1", owner="o", **FULL)
    await place.store.create_session(session)
    assert await place.store.find_session(session.key) == session
    again = await place.restart("boot-2")
    assert await again.find_session(session.key) == session


async def test_find_of_a_missing_session_is_none(store: SessionStore) -> None:
    """A session of another owner is as absent as one that never was."""
    await store.create_session(make_session("s1", owner="o"))
    assert await store.find_session(SessionKey("p", "s1")) is None
    assert await store.find_session(SessionKey("o", "S1")) is None


async def test_a_taken_key_is_refused(store: SessionStore) -> None:
    """A second session under a taken key raises SessionExists and changes nothing."""
    first = make_session("s1")
    await store.create_session(first)
    with pytest.raises(SessionExists):
        await store.create_session(make_session("s1", title="other"))
    assert await store.find_session(first.key) == first
    await store.create_session(make_session("s1", owner="other"))


async def test_update_merges_metadata_and_replaces_the_rest(store: SessionStore) -> None:
    """A change is applied as the domain says, and counts the revision up by one."""
    session = make_session("s1", metadata={"a": 1, "b": {"c": 1, "d": 2}})
    await store.create_session(session)
    change = SessionChange(title="ÄÖ", metadata={"a": None, "b": {"c": 3}}, model="m", params={"seed": 1})
    changed = await store.update_session(session.key, change, T0 + 5)
    assert changed == change.apply(session, T0 + 5, LIFE)
    assert changed.metadata == {"b": {"c": 3, "d": 2}}
    assert changed.rev == 2
    assert await store.find_session(session.key) == changed


async def test_update_honours_the_etag(store: SessionStore) -> None:
    """A change with the current ETag happens; with an old one it raises and nothing changes."""
    session = make_session("s1")
    await store.create_session(session)
    changed = await store.update_session(
        session.key, SessionChange(title="a"), T0, expected_etag=session.etag
    )
    with pytest.raises(PreconditionFailed):
        await store.update_session(session.key, SessionChange(title="b"), T0, expected_etag=session.etag)
    assert await store.find_session(session.key) == changed


async def test_a_turn_changes_the_etag(store: SessionStore) -> None:
    """An ETag read before a turn fails after it."""
    session = make_session("s1")
    await store.create_session(session)
    await store.commit_turn(session, make_turn(session))
    with pytest.raises(PreconditionFailed):
        await store.update_session(session.key, SessionChange(title="b"), T0, expected_etag=session.etag)


async def test_update_of_a_missing_session_raises(store: SessionStore) -> None:
    """A change never creates a session."""
    with pytest.raises(SessionNotFound):
        await store.update_session(SessionKey("", "s1"), SessionChange(title="a"), T0)
    assert store.session_count_nowait() == 0


async def test_delete_removes_the_session_and_its_turns(store: SessionStore) -> None:
    """After a delete neither the session nor a turn of it is there; a second delete says so."""
    session = make_session("s1")
    await store.create_session(session)
    session, turns = await extend(store, session, 3)
    assert await store.delete_session(session.key) is True
    assert await store.delete_session(session.key) is False
    assert await store.find_session(session.key) is None
    with pytest.raises(TurnNotFound):
        await store.get_turn(session, turns[0].turn_id)
    assert (await store.list_turns(session, 10)).turns == ()
    assert await store.list_branch(session, 10) == ()
    with pytest.raises(SessionNotFound):
        await store.load_path(session)


async def test_a_recreated_session_has_nothing_of_the_old_one(store: SessionStore) -> None:
    """Under the same key a new incarnation starts empty, and the old one's turns cannot reach it."""
    old = make_session("s1")
    await store.create_session(old)
    old, turns = await extend(store, old, 2)
    await store.delete_session(old.key)
    new = make_session("s1")
    await store.create_session(new)
    with pytest.raises(SessionNotFound):
        await store.commit_turn(old, make_turn(old))
    with nullcontext() if store.leases is None else pytest.raises(SessionNotFound):
        await store.start_turn(old, running(make_turn(old)))
    await store.record_turn(old, dropped(make_turn(old)))
    assert await store.find_session(new.key) == new
    assert (await store.list_turns(new, 10)).turns == ()
    with pytest.raises(TurnNotFound):
        await store.get_turn(new, turns[0].turn_id)
    with pytest.raises(TurnNotFound):
        await store.get_turn(old, turns[0].turn_id)


async def test_the_count_follows_every_change(place: Place) -> None:
    """The number of sessions is right after creating, deleting, purging and a restart."""
    store = place.store
    for number in range(5):
        await store.create_session(make_session(f"s{number}", ttl_s=1 if number == 4 else None))
    assert store.session_count_nowait() == 5
    await store.delete_session(SessionKey("", "s0"))
    assert store.session_count_nowait() == 4
    await store.expire_and_purge(T0 + 501_000, 10)
    assert store.session_count_nowait() == 3
    assert (await place.restart("boot-2")).session_count_nowait() == 3


async def _all_pages(store: SessionStore, query: SessionQuery) -> list[SessionPage]:
    pages = [await store.list_sessions(query)]
    while pages[-1].next_cursor:
        pages.append(await store.list_sessions(replace(query, cursor=pages[-1].next_cursor)))
    return pages


async def test_paging_loses_and_repeats_nothing(store: SessionStore) -> None:
    """Pages of 7 over 230 sessions, many with equal times, give each once, newest activity first."""
    for number in range(230):
        await store.create_session(make_session(f"s{number}", now=T0 + number // 9))
    pages = await _all_pages(store, SessionQuery(owner="", now=T0, limit=7))
    listed = [session for page in pages for session in page.sessions]
    assert len(pages) == 33
    assert {session.key.session_id for session in listed} == {f"s{number}" for number in range(230)}
    assert len(listed) == 230
    times = [session.last_accessed for session in listed]
    assert times == sorted(times, reverse=True)
    assert {page.total for page in pages} == {230}


async def test_a_page_that_ends_the_list_has_no_cursor(store: SessionStore) -> None:
    """A limit that is exactly the number of sessions gives one page and no cursor."""
    for number in range(4):
        await store.create_session(make_session(f"s{number}"))
    page = await store.list_sessions(SessionQuery(owner="", now=T0, limit=4))
    assert (len(page.sessions), page.next_cursor) == (4, None)


@pytest.mark.parametrize(
    "cursor", ["", "x", "%%%", "czE", "czEuMS4x🙂", "dDEuMQ", "MTI.", "cw", "c2ZvbyAtMQ"]
)
async def test_a_foreign_cursor_is_refused(store: SessionStore, cursor: str) -> None:
    """A cursor that no listing of sessions gave raises InvalidInput that names the field."""
    with pytest.raises(InvalidInput) as caught:
        await store.list_sessions(SessionQuery(owner="", now=T0, cursor=cursor))
    assert caught.value.field == "cursor"


async def _listed(store: SessionStore, **query: object) -> set[str]:
    page = await store.list_sessions(SessionQuery(**({"owner": None, "now": T0} | query)))  # type: ignore[arg-type]
    assert page.total == len(page.sessions)
    return {session.key.session_id for session in page.sessions}


async def test_filters_narrow_the_list(store: SessionStore) -> None:
    """Owner, user, agent and window select exactly their sessions, alone and together."""
    await store.create_session(make_session("a", owner="o", user_id="u", agent_id="x", window_id="w"))
    await store.create_session(make_session("b", owner="o", user_id="u", agent_id="y"))
    await store.create_session(make_session("c", owner="p", user_id="u", agent_id="x"))
    await store.create_session(make_session("d", owner="p"))
    assert await _listed(store) == {"a", "b", "c", "d"}
    assert await _listed(store, owner="o") == {"a", "b"}
    assert await _listed(store, user_id="u") == {"a", "b", "c"}
    assert await _listed(store, owner="p", user_id="u") == {"c"}
    assert await _listed(store, agent_id="x") == {"a", "c"}
    assert await _listed(store, owner="o", user_id="u", agent_id="x") == {"a"}
    assert await _listed(store, window_id="w") == {"a"}
    assert await _listed(store, owner="q") == set()


async def test_text_search_is_literal_and_ignores_case(store: SessionStore) -> None:
    """Text is found anywhere in the title in any case, and at the start of the id; it is no pattern."""
    await store.create_session(make_session("alpha", title="Größe ÄRGER"))
    await store.create_session(make_session("beta", title="100%_sure"))
    await store.create_session(make_session("al_x"))
    assert await _listed(store, text="ärger") == {"alpha"}
    assert await _listed(store, text="GRÖSSE") == {"alpha"}
    assert await _listed(store, text="0%_S") == {"beta"}
    assert await _listed(store, text="%") == {"beta"}
    assert await _listed(store, text="al") == {"alpha", "al_x"}
    assert await _listed(store, text="al_") == {"al_x"}
    assert await _listed(store, text="pha") == set()
    assert await _listed(store, text="AL") == set()


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize(
    ("fields", "boundary_s"),
    [
        ({}, 100),
        ({}, 1000),
        ({"ttl_s": 50}, 50),
        ({"ttl_s": 0}, 100),
        ({"archived": True, "expires_at": None}, 0),
        ({"marked_idle": True}, 0),
    ],
)
async def test_the_status_filter_agrees_with_the_domain(
    store: SessionStore, fields: dict[str, object], boundary_s: int, offset: int
) -> None:
    """On each boundary, one before and one after, only the filter of the session's status lists it."""
    session = make_session("s1", **fields)
    await store.create_session(session)
    now = T0 + boundary_s * 1000 + offset
    status = session.status_at(now, LIFE)
    found = {one for one in SessionStatus if await _listed(store, status=one, now=now)}
    assert found == {status}


async def test_totals_beyond_a_thousand_are_exact_only_where_cheap(store: SessionStore) -> None:
    """With 1,001 sessions a search has no total, with one less it is exact; plain lists always are."""
    for number in range(1000):
        await store.create_session(make_session(f"s{number}", user_id="u"))
    search = SessionQuery(owner="", now=T0, limit=1, text="s", status=SessionStatus.ACTIVE)
    assert (await store.list_sessions(search)).total == 1000
    await store.create_session(make_session("s1000", user_id="u"))
    assert (await store.list_sessions(search)).total is None
    for query in (SessionQuery(owner="", now=T0), SessionQuery(owner=None, now=T0, user_id="u"),
                  SessionQuery(owner="", now=T0, agent_id="assistant")):  # fmt: skip
        assert (await store.list_sessions(query)).total == 1001


async def test_a_closed_store_refuses_everything(place: Place) -> None:
    """After close every call raises StoreUnavailable, and a second close is harmless."""
    store, session = place.store, await stored_session(place.store)
    await store.close()
    await store.close()
    for call in (
        lambda: store.ping(),
        lambda: store.create_session(session),
        lambda: store.find_session(session.key),
        lambda: store.start_turn(session, running(make_turn(session))),
        lambda: store.commit_turn(session, make_turn(session)),
        lambda: store.list_turns(session, 1),
        lambda: store.patch_state(session.key, {"a": 1}, T0),
        lambda: store.get_shared(StateScope("default")),
        lambda: store.patch_shared(StateScope("default"), {"a": 1}, T0),
        lambda: store.at_turn(session, None),
        lambda: store.move_head(session, ToTurn(None), T0),
        lambda: store.fork_session(session, None, make_session("s2")),
        lambda: store.add_checkpoint(session, make_checkpoint()),
        lambda: store.list_checkpoints(session, 1),
        lambda: store.delete_checkpoints(session),
        lambda: store.add_note(session, make_note(new_id()), Usage()),
        lambda: store.get_note(session),
        lambda: store.list_entries(session, None, 1, newest_first=True),
        lambda: store.get_session_stats(),
        lambda: store.expire_and_purge(T0, 1),
    ):
        with pytest.raises(StoreUnavailable):
            await call()


async def test_opening_twice_is_opening_once(store: SessionStore) -> None:
    """A second open of an open store changes nothing."""
    session = make_session()
    await store.create_session(session)
    await store.open(BOOT)
    assert await store.find_session(session.key) == session
    await store.ping()


async def test_a_touch_restarts_the_clock_and_nothing_else(store: SessionStore) -> None:
    """Activity moves the expiry and takes the idle mark away; revision, head and update time stay."""
    session = make_session("s1", marked_idle=True, title="t")
    await store.create_session(session)
    later = T0 + LIFE.ttl_s * 1000 + 5  # it has expired by then
    touched = await store.touch_session(session.key, later)
    assert touched == session.touched(later, LIFE)
    assert (touched.rev, touched.updated_at, touched.last_accessed) == (1, T0, later)
    assert touched.status_at(later, LIFE) is SessionStatus.ACTIVE
    assert await store.find_session(session.key) == touched


async def test_a_touch_never_makes_a_session(store: SessionStore) -> None:
    """A touch of a missing session raises and leaves nothing behind."""
    with pytest.raises(SessionNotFound):
        await store.touch_session(SessionKey("", "s1"), T0)
    assert store.session_count_nowait() == 0


async def test_many_are_deleted_in_one_step(store: SessionStore) -> None:
    """Those that are there go with their turns and are counted once; the others are passed over."""
    for name in ("a", "b", "c"):
        await store.create_session(make_session(name))
    session = make_session("d")
    await store.create_session(session)
    session, _ = await extend(store, session, 2)
    keys = [SessionKey("", name) for name in ("a", "d", "a", "missing")]
    assert (await store.delete_sessions(keys)).sessions == 2
    assert (await store.delete_sessions(keys)).sessions == 0
    assert (await store.delete_sessions([])).sessions == 0
    assert store.session_count_nowait() == 2
    assert (await store.list_turns(session, 10)).turns == ()


async def test_keys_are_listed_by_user_or_agent(store: SessionStore) -> None:
    """Each of the owner's that fits, at most ``limit`` of them."""
    for number in range(5):
        await store.create_session(make_session(f"s{number}", user_id="u", agent_id=f"x{number % 2}"))
    await store.create_session(make_session("s0", owner="o", user_id="u", agent_id="x0"))
    await store.create_session(make_session("t"))
    assert set(await store.list_keys("", user_id="u", limit=9)) == {
        SessionKey("", f"s{number}") for number in range(5)
    }
    assert len(await store.list_keys("", user_id="u", limit=3)) == 3
    assert set(await store.list_keys("", agent_id="x1", limit=9)) == {
        SessionKey("", "s1"),
        SessionKey("", "s3"),
    }
    assert await store.list_keys("o", agent_id="x0", limit=9) == (SessionKey("o", "s0"),)
    assert await store.list_keys("o", user_id="nobody", limit=9) == ()


async def test_keys_of_all_owners_are_listed(store: SessionStore) -> None:
    """No owner is everybody: equal ids of two owners are both there, and the filters still hold."""
    for owner, name, user, agent in (("o", "s", "u", "x"), ("p", "s", "u", "y"), ("p", "t", "v", "x")):
        await store.create_session(make_session(name, owner=owner, user_id=user, agent_id=agent))
    of_user = await store.list_keys(None, user_id="u", limit=9)
    assert set(of_user) == {SessionKey("o", "s"), SessionKey("p", "s")}
    of_agent = await store.list_keys(None, agent_id="x", limit=9)
    assert set(of_agent) == {SessionKey("o", "s"), SessionKey("p", "t")}
    assert await store.list_keys(None, user_id="u", agent_id="x", limit=9) == (SessionKey("o", "s"),)
    assert len(await store.list_keys(None, limit=9)) == 3
    assert len(await store.list_keys(None, agent_id="x", limit=1)) == 1
    assert await store.list_keys(None, user_id="nobody", limit=9) == ()


async def test_many_are_created_in_one_step(store: SessionStore) -> None:
    """Each is stored, but one whose key is taken, before or in the same step."""
    await store.create_session(make_session("a"))
    new = [make_session(name) for name in ("b", "a", "c", "b")]
    outcomes = await store.create_sessions(new)
    assert [type(outcome) for outcome in outcomes] == [type(None), SessionExists, type(None), SessionExists]
    assert await store.find_session(new[0].key) == new[0]
    assert store.session_count_nowait() == 3
    assert await store.create_sessions([]) == ()


def _of_user(name: str, **fields: Any) -> Session:
    return make_session(name, **{"user_id": "u", **fields})


async def test_a_cap_refuses_what_is_too_much(store: SessionStore) -> None:
    """Per user and owner, exactly at the cap; sessions of no user are not counted."""
    cap = SessionCap(2)
    outcomes = await store.create_sessions([_of_user(name) for name in "abc"], cap)
    assert [type(outcome) for outcome in outcomes] == [type(None), type(None), SessionLimit]
    others = [_of_user("d", owner="o"), _of_user("e", user_id="v"), *(make_session(name) for name in "fgh")]
    assert await store.create_sessions(others, cap) == (None,) * 5
    assert isinstance((await store.create_sessions([_of_user("a")], cap))[0], SessionExists)
    await store.delete_session(SessionKey("", "a"))
    assert await store.create_sessions([_of_user("c")], cap) == (None,)


async def test_victims_go_for_new_sessions(store: SessionStore) -> None:
    """In their order, no more than needed, and never those of another user."""
    old = [_of_user(name, now=T0 + number) for number, name in enumerate("abc")]
    other = _of_user("x", user_id="v")
    await store.create_sessions([*old, other])
    cap = SessionCap(3, (other, *old))
    assert await store.create_sessions([_of_user("d"), _of_user("e")], cap) == (None, None)
    found = await store.list_keys("", user_id="u", limit=9)
    assert {key.session_id for key in found} == {"c", "d", "e"}
    assert await store.find_session(other.key) == other
    assert store.session_count_nowait() == 4


async def test_a_victim_goes_only_as_it_was_read(store: SessionStore) -> None:
    """One that was active since, that runs, or that was made anew stays, and the new one is refused."""
    old = [_of_user(name) for name in "abcd"]
    await store.create_sessions(old)
    await store.touch_session(old[0].key, T0 + 5)
    await store.start_turn(old[1], running(make_turn(old[1], started_at=T0)))
    await store.delete_session(old[2].key)
    await store.create_session(_of_user("c"))
    refusal = (await store.create_sessions([_of_user("e")], SessionCap(4, tuple(old[:3]))))[0]
    assert isinstance(refusal, SessionLimit)
    # Two must go and only one may: then that one stays, too.
    refusal = (await store.create_sessions([_of_user("e")], SessionCap(3, tuple(old))))[0]
    assert isinstance(refusal, SessionLimit)
    assert store.session_count_nowait() == 4
    assert await store.create_sessions([_of_user("e")], SessionCap(4, tuple(old))) == (None,)
    assert await store.find_session(old[3].key) is None


async def test_a_users_oldest_come_first(store: SessionStore) -> None:
    """By last activity, as many as asked for, of this owner's user only."""
    sessions = [_of_user(name, now=T0 + number) for number, name in enumerate("abc")]
    await store.create_sessions([*reversed(sessions), _of_user("x", user_id="v"), _of_user("a", owner="o")])
    assert await store.list_oldest("", "u", 9) == tuple(sessions)
    assert await store.list_oldest("", "u", 2) == tuple(sessions[:2])
    touched = await store.touch_session(sessions[0].key, T0 + 9)
    assert await store.list_oldest("", "u", 9) == (*sessions[1:], touched)
    assert await store.list_oldest("", "w", 9) == ()
