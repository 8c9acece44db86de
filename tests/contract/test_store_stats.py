"""What every store promises about the statistics of all sessions: maintained, and right."""

import math
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from app.domain.branch import Back
from app.domain.ids import SessionKey
from app.domain.session import Session, SessionChange, SessionQuery, SessionStatus
from app.domain.stats import SessionStats
from app.domain.turn import CancelReason, TurnStatus
from app.ports import SessionStore

from .builders import (
    LIFE,
    T0,
    current,
    dropped,
    extend,
    failed,
    make_checkpoint,
    make_session,
    make_turn,
    new_id,
    running,
    stored_session,
)
from .conftest import Place

S = 1000
IDLE, EXPIRED = T0 + LIFE.idle_after_s * S, T0 + LIFE.ttl_s * S
PURGED = EXPIRED + LIFE.retention_s * S


async def phases(store: SessionStore) -> dict[str, int]:
    """Return how many sessions are in each phase, without zeros, having compared with the total."""
    stats = await store.get_session_stats()
    found = {status.value: getattr(stats, status.value) for status in SessionStatus}
    assert sum(found.values()) == stats.total == store.session_count_nowait()
    return {name: count for name, count in found.items() if count}


async def test_an_empty_store_has_zeros(place: Place) -> None:
    """Before the first session, and after a restart."""
    assert await place.store.get_session_stats() == SessionStats()
    assert await (await place.restart("boot-2")).get_session_stats() == SessionStats()


async def test_a_sweep_brings_each_phase(store: SessionStore) -> None:
    """Active, idle, expired, purged: each from its first millisecond on, as of the last sweep."""
    await stored_session(store)
    assert await phases(store) == {"active": 1}
    steps = (
        (T0, {"active": 1}),
        (IDLE - 1, {"active": 1}),
        (IDLE, {"idle": 1}),
        (EXPIRED - 1, {"idle": 1}),
        (EXPIRED, {"expired": 1}),
        (PURGED - 1, {"expired": 1}),
        (PURGED, {}),
    )
    for now, expected in steps:
        await store.expire_and_purge(now, 10)
        assert await phases(store) == expected
    stats = await store.get_session_stats()
    assert (stats.total, stats.created) == (0, 1)


async def test_phases_survive_a_restart(place: Place) -> None:
    """What the last sweep found is there again, and the next one goes on from it."""
    for number, ttl_s in enumerate((None, 0, 150)):
        await stored_session(place.store, f"s{number}", ttl_s=ttl_s)
    await stored_session(place.store, "kept", archived=True, expires_at=None)
    await place.store.expire_and_purge(T0 + 150 * S, 10)
    store = await place.restart("boot-2")
    assert await phases(store) == {"idle": 2, "expired": 1, "archived": 1}
    assert await store.expire_and_purge(EXPIRED, 10) == (1, 1)
    assert await phases(store) == {"idle": 1, "expired": 1, "archived": 1}
    assert await phases(await place.restart("boot-3")) == {"idle": 1, "expired": 1, "archived": 1}


async def test_a_sweep_brings_all_phases_whatever_it_may_remove(store: SessionStore) -> None:
    """The limit is one of removals: the phases of all are right after a sweep that may remove one."""
    for number in range(4):
        await stored_session(store, f"due-{number}", ttl_s=1)
    for number in range(3):
        await stored_session(store, f"expired-{number}", ttl_s=500)
    for number in range(2):
        await stored_session(store, f"idle-{number}")
    assert await store.expire_and_purge(T0 + 501 * S, 1) == (7, 1)
    assert await phases(store) == {"expired": 6, "idle": 2}
    assert await store.expire_and_purge(T0 + 501 * S, 10) == (0, 3)
    assert await phases(store) == {"expired": 3, "idle": 2}


@pytest.mark.parametrize("phase_at", [T0, IDLE, EXPIRED])
async def test_a_change_by_hand_shows_at_once(store: SessionStore, phase_at: int) -> None:
    """Archiving, marking idle, reviving and deleting count without a sweep, from whatever phase."""
    session = await stored_session(store)
    await store.expire_and_purge(phase_at, 10)
    now = phase_at + 1
    for status in (
        SessionStatus.ARCHIVED,
        SessionStatus.ACTIVE,
        SessionStatus.IDLE,
        SessionStatus.ARCHIVED,
        SessionStatus.IDLE,
        SessionStatus.ACTIVE,
    ):
        await store.update_session(session.key, SessionChange(status=status), now)
        assert await phases(store) == {status.value: 1}
    await store.delete_session(session.key)
    assert await phases(store) == {}


@pytest.mark.parametrize("phase_at", [IDLE, EXPIRED])
async def test_activity_shows_at_once(store: SessionStore, phase_at: int) -> None:
    """A touch, a start, a commit, a failed turn, a move and a restore each make it active again."""
    session, _ = await extend(store, await stored_session(store), 2)
    for number, act in enumerate(
        (
            lambda s, now: store.touch_session(s.key, now),
            lambda s, now: store.start_turn(s, running(make_turn(s, started_at=now))),
            lambda s, now: store.commit_turn(s, make_turn(s, started_at=now)),
            lambda s, now: store.record_turn(s, failed(make_turn(s, started_at=now))),
            lambda s, now: store.move_head(s, Back(1), now),
        )
    ):
        session = await current(store, session)
        span = phase_at - T0
        now = session.last_accessed + span
        await store.expire_and_purge(now, 10)
        assert await phases(store) == {"idle" if phase_at == IDLE else "expired": 1}, number
        await act(session, now + 1)
        await store.ping()
        assert await phases(store) == {"active": 1}, number


async def test_what_is_no_activity_leaves_the_phase(store: SessionStore) -> None:
    """A new title, a patch of state and a checkpoint do not wake an idle session."""
    session = await stored_session(store)
    await store.expire_and_purge(IDLE, 10)
    await store.update_session(session.key, SessionChange(title="t"), IDLE)
    await store.patch_state(session.key, {"a": 1}, IDLE)
    await store.add_checkpoint(session, make_checkpoint())
    assert await phases(store) == {"idle": 1}


async def test_sessions_are_counted_in_the_phase_they_are_made_in(store: SessionStore) -> None:
    """Active, marked idle, or archived; also many in one step, but a refused one nowhere."""
    fields: list[dict[str, object]] = [
        {},
        {},
        {"marked_idle": True},
        {"archived": True, "expires_at": None},
    ]
    sessions = [make_session(f"s{number}", **one) for number, one in enumerate(fields)]
    await store.create_sessions([*sessions, sessions[0]])
    assert await phases(store) == {"active": 2, "idle": 1, "archived": 1}
    assert (await store.get_session_stats()).created == 4
    await store.delete_sessions([SessionKey("", "s0"), SessionKey("", "s2"), SessionKey("", "none")])
    assert await phases(store) == {"active": 1, "archived": 1}


async def test_turns_and_tokens_are_those_of_all_time(place: Place) -> None:
    """Each ended turn once, repeated or not, after a restart and after its session is gone."""
    store = place.store
    session = await stored_session(store)
    first = make_turn(session, duration_ms=200)
    await store.start_turn(session, running(first))
    session = await store.commit_turn(session, first)
    assert await store.commit_turn(session, first) == session
    second = make_turn(session, duration_ms=400)
    session = await store.commit_turn(session, second)
    kept = make_turn(
        session, status=TurnStatus.CANCELLED, kept=True, cancel_reason=CancelReason.USER, duration_ms=7777
    )
    session = await store.commit_turn(session, kept)
    await store.record_turn(session, dropped(make_turn(session, duration_ms=7777)))
    bad = failed(make_turn(session, duration_ms=7777))
    await store.record_turn(session, bad)
    await store.record_turn(session, bad)
    last = await current(store, session)
    expected = SessionStats(
        total=1,
        active=1,
        created=1,
        lifetime_ms=last.last_accessed - T0,
        turns=5,
        turns_failed=1,
        turns_finished=2,
        response_ms=600,
        tokens=5 * 27,
    )
    assert replace(await store.get_session_stats(), p95_response_ms=0) == expected
    store = await place.restart("boot-2")
    assert replace(await store.get_session_stats(), p95_response_ms=0) == expected
    await store.delete_session(session.key)
    gone = replace(expected, total=0, active=0)
    assert replace(await store.get_session_stats(), p95_response_ms=0) == gone
    assert replace(await (await place.restart("boot-3")).get_session_stats(), p95_response_ms=0) == gone


async def test_lifetimes_are_those_of_all_sessions(place: Place) -> None:
    """From creation to last activity, summed: of living, deleted, evicted and purged ones."""
    store = place.store
    for number in range(4):
        session = await stored_session(store, f"s{number}")
        await store.touch_session(session.key, T0 + (number + 1) * S)
    await store.touch_session(SessionKey("", "s0"), T0)  # of a clock that was set back
    await store.delete_session(SessionKey("", "s1"))
    assert (await store.get_session_stats()).lifetime_ms == 10 * S
    store = await place.restart("boot-2")
    await store.expire_and_purge(PURGED + 3 * S, 1)
    await store.touch_session(SessionKey("", "s3"), PURGED + 3 * S)
    stats = await store.get_session_stats()
    assert (stats.total, stats.created) == (2, 4)
    assert stats.lifetime_ms == 6 * S + (PURGED + 3 * S - T0)


async def test_a_turn_that_a_crash_interrupted_is_a_failed_one(place: Place) -> None:
    """The next start counts it, once, without tokens and without a response time."""
    session = await stored_session(place.store)
    await place.store.start_turn(session, running(make_turn(session)))
    await place.store.ping()
    assert (await place.store.get_session_stats()).turns == 0
    for boot in ("boot-2", "boot-3"):
        stats = await (await place.restart(boot)).get_session_stats()
        assert (stats.turns, stats.turns_failed, stats.turns_finished, stats.tokens) == (1, 1, 0, 0)
        assert (stats.response_ms, stats.p95_response_ms) == (0, 0)


async def test_a_forks_turns_are_not_counted(store: SessionStore) -> None:
    """The fork is a session more; the turns it has copied are those of the origin, its own count."""
    session, _ = await extend(store, await stored_session(store), 5)
    before = await store.get_session_stats()
    fork = await store.fork_session(session, Back(1), make_session("fork", now=T0 + 60 * S))
    after = await store.get_session_stats()
    assert after == replace(before, total=2, active=2, created=2)
    await extend(store, fork, 1)
    assert (await store.get_session_stats()).turns == 6
    await store.delete_session(fork.key)
    assert (await store.get_session_stats()).turns == 6


DURATIONS = {
    "one": [812],
    "none took time": [0] * 20,
    "equal": [5] * 100,
    "even": list(range(1, 401)),
    "twenty": list(range(100, 2100, 100)),
    "two kinds": [30] * 190 + [60_000] * 10,
    "just two kinds": [30] * 189 + [60_000] * 11,
    "wide": [round(10 ** (number / 60)) for number in range(330)],
}


@pytest.mark.parametrize("durations", DURATIONS.values(), ids=DURATIONS)
async def test_the_95th_percentile_is_right_to_a_tenth(place: Place, durations: list[int]) -> None:
    """Of finished turns in any order, however they are spread, after a restart too."""
    shuffled = Random(7).sample(durations, len(durations))
    session = await stored_session(place.store)
    for duration_ms in shuffled:
        session = await place.store.commit_turn(session, make_turn(session, duration_ms=duration_ms))
        if duration_ms == shuffled[0]:
            await place.store.record_turn(session, failed(make_turn(session, duration_ms=10**6)))
    exact = sorted(durations)[math.ceil(0.95 * len(durations)) - 1]
    for life in (1, 2):
        store = place.store if life == 1 else await place.restart("boot-2")
        stats = await store.get_session_stats()
        assert abs(stats.p95_response_ms - exact) <= exact / 10
        assert (stats.turns_finished, stats.response_ms) == (len(durations), sum(durations))


def find_phases(sessions: list[Session], now: int) -> dict[str, int]:
    return dict(Counter(session.status_at(now, LIFE).value for session in sessions))


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_a_sweep_makes_them_exact(place: Place, seed: int) -> None:
    """Through 60 random spans of time with random deeds the phases agree with every session's own times."""
    random, store, now = Random(seed), place.store, T0
    made = 0
    expired: set[tuple[str, int | None]] = set()
    for _ in range(60):
        for _ in range(random.randrange(4)):
            made += 1
            ttl_s = random.choice((None, None, 0, 40, 300))
            await stored_session(store, f"s{made}", now=now, ttl_s=ttl_s)
        sessions = await all_sessions(store, made)
        for session in random.sample(sessions, min(len(sessions), random.randrange(4))):
            await do_something(store, random, session, now)
        if random.random() < 0.1:
            store = await place.restart(f"boot-{now}")
        await phases(store)
        now += random.choice((1, 30, 99, 100, 101, 300, 700)) * S
        sessions = await all_sessions(store, made)
        due = {s.uid for s in sessions if s.expires_at and s.expires_at + LIFE.retention_s * S <= now}
        fresh = {(s.uid, s.expires_at) for s in sessions if s.status_at(now, LIFE) is SessionStatus.EXPIRED}
        assert await store.expire_and_purge(now, 1000) == (len(fresh - expired), len(due))
        expired |= fresh
        left = await all_sessions(store, made)
        assert {session.uid for session in left} == {s.uid for s in sessions} - due
        assert await phases(store) == find_phases(left, now)
    assert (await store.get_session_stats()).created == made


async def all_sessions(store: SessionStore, made: int) -> list[Session]:
    found = [await store.find_session(SessionKey("", f"s{number}")) for number in range(1, made + 1)]
    return [session for session in found if session is not None]


def is_living(session: Session, now: int) -> bool:
    return session.status_at(now, LIFE) is not SessionStatus.EXPIRED


async def do_something(store: SessionStore, random: Random, session: Session, now: int) -> None:
    match random.randrange(8):
        case 0:
            await store.delete_session(session.key)
        case 1 | 2:
            status = random.choice((SessionStatus.ACTIVE, SessionStatus.IDLE, SessionStatus.ARCHIVED))
            await store.update_session(session.key, SessionChange(status=status), now)
        case 3:
            change = SessionChange(ttl_s=random.choice((None, 0, 5000)))
            # Whether that counts as expiring when it does so at once is left open.
            if is_living(session, now) and is_living(change.apply(session, now, LIFE), now):
                await store.update_session(session.key, change, now)
        case 4:
            await store.touch_session(session.key, now)
        case 5:
            turn = make_turn(session, started_at=now, finished_at=now + 5)
            await store.commit_turn(session, turn)
        case 6:
            turn = make_turn(session, started_at=now, finished_at=now + 5)
            await store.record_turn(session, failed(turn))
        case 7:
            await store.patch_state(session.key, {"n": now}, now)


async def test_totals_follow_whatever_is_made_moved_and_removed(place: Place) -> None:
    """Of an owner, a user, an agent: after batches, a change of agent, forks, deletes and a restart."""
    store = place.store
    made = [
        make_session(f"s{n}", user_id=f"u{n % 2}" if n % 3 else None, agent_id=f"a{n % 2}", owner=f"o{n % 2}")
        for n in range(30)
    ]
    await store.create_sessions(made)
    await store.update_session(made[0].key, SessionChange(agent_id="a1"), T0 + 1)
    await store.fork_session(made[2], None, replace(made[2], key=SessionKey("o0", "fork"), uid=new_id()))
    await store.delete_session(made[4].key)
    await store.delete_sessions([made[6].key, made[7].key])
    store = await place.restart("boot-2")
    for owner in ("o0", "o1", "nobody"):
        for filters in ({}, {"user_id": "u0"}, {"user_id": "u1"}, {"agent_id": "a0"}, {"agent_id": "a1"}):
            query = SessionQuery(owner=owner, now=T0, limit=100, **filters)
            page = await store.list_sessions(query)
            assert page.total == len(page.sessions), (owner, filters)
    for session in made:
        await store.delete_session(session.key)
    await store.delete_session(SessionKey("o0", "fork"))
    assert (await store.list_sessions(SessionQuery(owner="o0", now=T0))).total == 0
