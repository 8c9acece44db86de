"""What every store promises about the sums of what users took."""

from app.domain.ids import SessionKey
from app.domain.stats import DayUsage, UserUsage
from app.ports import SessionStore

from .builders import T0, dropped, failed, make_session, make_turn, running
from .conftest import Place

DAY_MS = 86_400_000
DAY = T0 // DAY_MS
NONE = UserUsage(0, 0, 0, ())


async def test_usage_is_summed_by_day(place: Place) -> None:
    """Finished, failed and dropped turns count once, on the day they ended; also after a restart."""
    session = make_session("s", user_id="u")
    await place.store.create_session(session)
    first = make_turn(session)
    await place.store.start_turn(session, running(first))
    session = await place.store.commit_turn(session, first)
    await place.store.commit_turn(session, first)  # repeated, it counts no more
    await place.store.record_turn(session, failed(make_turn(session)))
    later = make_turn(session, started_at=T0 + DAY_MS, finished_at=T0 + DAY_MS)
    await place.store.record_turn(session, dropped(later))
    expected = UserUsage(3, 63, 18, (DayUsage(DAY + 1, 1, 21, 6), DayUsage(DAY, 2, 42, 12)))
    assert await place.store.get_usage("", "u", 9) == expected
    again = await place.restart("boot-2")
    assert await again.get_usage("", "u", 9) == expected
    assert await again.get_usage("", "u", 1) == UserUsage(3, 63, 18, expected.days[:1])


async def test_usage_is_the_users_own(store: SessionStore) -> None:
    """Another owner's user of the same name, another user and nobody's sessions are not in it."""
    for owner, user_id in (("", "u"), ("o", "u"), ("", "v"), ("", None)):
        session = make_session(f"s-{user_id}", owner=owner, user_id=user_id)
        await store.create_session(session)
        await store.commit_turn(session, make_turn(session))
    assert (await store.get_usage("", "u", 9)).turns == 1
    assert (await store.get_usage("o", "u", 9)).turns == 1
    assert await store.get_usage("", "w", 9) == NONE


async def test_usage_outlives_the_session(store: SessionStore) -> None:
    """Deleting what was said does not give back what it took."""
    session = make_session("s", user_id="u")
    await store.create_session(session)
    await store.commit_turn(session, make_turn(session))
    await store.delete_session(SessionKey("", "s"))
    assert (await store.get_usage("", "u", 9)).turns == 1


async def test_a_turn_that_a_crash_interrupted_counts(place: Place) -> None:
    """The next start makes it a failed turn, which is one of the user's, without tokens."""
    session = make_session("s", user_id="u")
    await place.store.create_session(session)
    await place.store.start_turn(session, running(make_turn(session)))
    usage = await (await place.restart("boot-2")).get_usage("", "u", 9)
    assert (usage.turns, usage.prompt_tokens, usage.completion_tokens) == (1, 0, 0)
