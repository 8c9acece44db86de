"""The pool's table over a long life."""

import random

from app.domain.errors import StoreUnavailable
from app.domain.stats import DiscardCause
from app.pool.limits import PoolLimits
from app.pool.slot import Ticket
from app.pool.table import PoolTable
from tests.unit.pool.bench import agent, key_of
from tests.unit.pool.invariants import check_table


def test_100_000_sessions_leave_every_container_bounded():
    """However many sessions come by, nothing grows beyond the limits: there is no lock to leak."""
    pool = PoolTable(PoolLimits(max_instances=50, capacity_queue=10, idle_ttl_s=60.0))
    dice = random.Random(7)
    for number in range(100_000):
        ticket = Ticket(key_of(f"s{number}"), user=f"u{number % 5000}")
        pool.enter(ticket)
        slot = ticket.slot
        if dice.random() < 0.05:
            pool.load_failed(slot, StoreUnavailable())
            continue
        pool.loaded(slot, agent(), None, float(number))
        pool.release(ticket, float(number), DiscardCause.ERROR if dice.random() < 0.05 else None)
    check_table(pool)
    sizes = {name: len(value) for name, value in vars(pool).items() if hasattr(value, "__len__")}
    assert max(sizes.values()) <= 50, sizes
    assert not pool._working_by_user
