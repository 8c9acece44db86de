"""What every store promises about finding a session or making it."""

import asyncio
from dataclasses import replace

from app.ports import SessionStore

from .builders import current, make_session, make_turn
from .conftest import Place


async def test_a_session_is_made_once_and_found_from_then_on(place: Place) -> None:
    """The first call stores the session as it is given; later ones return that one as it is."""
    first, second = make_session(title="first", state={"a": 1}), make_session(title="second")
    assert await place.store.ensure_session(first) == first
    assert await place.store.ensure_session(second) == first
    committed = await place.store.commit_turn(first, make_turn(first))
    assert await place.store.ensure_session(second) == committed
    assert await (await place.restart("boot-2")).ensure_session(second) == committed


async def test_of_many_that_ensure_one_makes_it(store: SessionStore) -> None:
    """Of many calls at once for one key one makes the session, and all get that one; it is counted once."""
    found = await asyncio.gather(*(store.ensure_session(make_session()) for _ in range(30)))
    assert len({session.uid for session in found}) == 1
    assert await current(store, found[0]) == found[0]
    stats = await store.get_session_stats()
    assert (stats.total, stats.created) == (1, 1)


async def test_a_deleted_session_is_made_anew(store: SessionStore) -> None:
    """What was deleted is not found: the session of the call is stored."""
    old = make_session()
    await store.ensure_session(old)
    await store.delete_session(old.key)
    new = replace(make_session(), title="new")
    assert await store.ensure_session(new) == new
    assert await current(store, old) == new
