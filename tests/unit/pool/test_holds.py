"""Holds: a session without an agent, in the same queue as turns, in no place."""

from app.domain.errors import PoolExhausted
from app.domain.stats import DiscardCause
from app.pool.effects import AwaitRoom, Dropped, Granted, Load, Refused
from app.pool.slot import SlotState
from tests.unit.pool.bench import Pool, hold, key_of, turn
from tests.unit.pool.invariants import check_table

# -- holds


def test_a_hold_of_an_absent_session_takes_no_place():
    """Holding an absent session is granted at once, also when every place is taken."""
    pool, ticket = Pool(max_instances=1), hold("b")
    pool.busy("a")
    assert pool.enter(ticket) == [Granted(ticket)]
    assert (pool.state("b"), pool.table.places) == (SlotState.HELD, 1)
    assert pool.release(ticket) == []
    assert pool.state("b") is None


def test_a_hold_of_an_idle_session_drops_the_agent_and_gives_its_place_back():
    """Holding an idle session gives its place to a session that waits for room."""
    pool, ticket = Pool(max_instances=1), hold("a")
    pool.idle("a")
    assert pool.enter(ticket) == [Dropped(key_of("a"), DiscardCause.CONFLICT), Granted(ticket)]
    assert pool.table.places == 0
    assert pool.enter(turn("b")) == [Load(pool.slot("b"))]


def test_a_hold_that_takes_over_from_a_turn_gives_its_place_away():
    """When a hold follows a turn, the place goes to a session that waits for room."""
    pool, ticket = Pool(max_instances=1), hold("a")
    owner = pool.busy("a")
    pool.enter(ticket)
    pool.enter(turn("b"))
    effects = pool.release(owner)
    assert effects == [
        Dropped(key_of("a"), DiscardCause.CONFLICT), Granted(ticket), Load(pool.slot("b"))
    ]  # fmt: skip


def test_turns_wait_for_a_hold_and_then_activate():
    """A turn behind a hold takes a place only when the hold is over."""
    pool, held, waiting = Pool(), hold(), turn()
    pool.enter(held)
    assert pool.enter(waiting) == []
    assert pool.table.places == 0
    assert pool.release(held) == [Load(pool.slot())]


def test_a_turn_behind_a_hold_queues_for_room():
    """When a hold ends while every place is taken, the turn behind it waits for room."""
    pool, held = Pool(max_instances=1), hold("a")
    pool.enter(held)
    pool.enter(turn("a"))
    pool.busy("b")
    assert pool.release(held) == [AwaitRoom(pool.slot("a"), 1)]


def test_a_turn_behind_a_hold_is_refused_where_nobody_more_may_wait_for_room():
    """When a hold ends and even the queue for room is full, the turn behind it is refused."""
    pool, held, waiting = Pool(max_instances=1, capacity_queue=0), hold("a"), turn("a")
    pool.enter(held)
    pool.enter(waiting)
    pool.busy("b")
    assert pool.release(held) == [Refused(waiting)]
    assert isinstance(waiting.error, PoolExhausted)
    assert pool.state("a") is None


def test_a_hold_waits_for_the_load_and_then_has_the_session():
    """A hold that comes during a load gets the session when the turn before it is over."""
    pool, first, held = Pool(), turn(), hold()
    pool.enter(first)
    pool.enter(held)
    assert pool.load() == [Granted(first)]
    assert pool.release(first)[-1] == Granted(held)
    assert pool.state() is SlotState.HELD


def test_a_front_hold_has_the_session_as_soon_as_its_load_ends():
    """A hold at the front gets the loading session before the turn that caused the load."""
    pool, first, held = Pool(), turn(), hold()
    pool.enter(first)
    pool.enter(held, front=True)
    assert pool.load() == [Dropped(key_of("a"), DiscardCause.CONFLICT), Granted(held)]
    assert pool.release(held) == [Load(pool.slot())]


def test_a_front_hold_takes_a_session_out_of_the_queue_for_room():
    """A hold needs no room, so at the front it is granted at once; the turn queues again after it."""
    pool, waiting, held = Pool(max_instances=1), turn("a"), hold("a")
    pool.busy("b")
    pool.enter(waiting)
    assert pool.enter(held, front=True) == [Granted(held)]
    assert not pool.table.room_queue
    assert pool.release(held) == [AwaitRoom(pool.slot("a"), 2)]


def test_a_hold_is_granted_when_the_turns_before_it_stop_waiting_for_room():
    """A hold behind a turn that waits for room has the session once that turn has left."""
    pool, waiting, held = Pool(max_instances=1), turn("a"), hold("a")
    pool.busy("b")
    pool.enter(waiting)
    pool.enter(held)
    assert pool.table.leave(waiting, 0.0) == [Granted(held)]
    check_table(pool.table)
