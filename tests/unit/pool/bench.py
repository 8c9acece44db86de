"""A ``PoolTable`` with the few moves that its tests start from."""

from app.domain.ids import SessionKey
from app.domain.session import Stamp
from app.domain.stats import DiscardCause
from app.pool.limits import PoolLimits
from app.pool.slot import SlotState, Ticket, TicketKind, TicketState
from app.pool.table import PoolTable
from tests.fakes import FakeAgent
from tests.unit.pool.invariants import check_table


def key_of(name: str) -> SessionKey:
    return SessionKey("", name)


def turn(name: str = "a", user: str | None = None, turn_id: str | None = None) -> Ticket:
    return Ticket(key_of(name), user=user, turn_id=turn_id)


def hold(name: str = "a") -> Ticket:
    return Ticket(key_of(name), TicketKind.HOLD)


def agent(size: int = 10, head: str | None = "t1") -> FakeAgent:
    return FakeAgent(Stamp(head, None, 1, 1), estimated_bytes=size)


class Pool:
    """A table with the few moves that tests start from; checks it after each."""

    def __init__(self, **limits) -> None:
        self.table = PoolTable(PoolLimits(**{"max_instances": 3, "idle_ttl_s": 60.0} | limits))

    def slot(self, name: str = "a"):
        return self.table.slots.get(key_of(name))

    def state(self, name: str = "a") -> SlotState | None:
        slot = self.slot(name)
        return slot and slot.state

    def enter(self, ticket: Ticket, **how):
        effects = self.table.enter(ticket, **how)
        check_table(self.table)
        return effects

    def load(self, name: str = "a", now: float = 0.0, size: int = 10, head: str | None = "t1"):
        effects = self.table.loaded(self.slot(name), agent(size, head), None, now)
        check_table(self.table)
        return effects

    def busy(self, name: str = "a", user: str | None = None) -> Ticket:
        ticket = turn(name, user, turn_id=f"turn-{name}")
        self.enter(ticket)
        self.load(name)
        assert ticket.state is TicketState.GRANTED
        return ticket

    def idle(self, name: str = "a", now: float = 0.0) -> None:
        self.release(self.busy(name), now)
        assert self.state(name) is SlotState.IDLE

    def release(self, ticket: Ticket, now: float = 0.0, cause: DiscardCause | None = None):
        effects = self.table.release(ticket, now, cause)
        check_table(self.table)
        return effects


def fill_with(pool: Pool, user: str, count: int) -> list[Ticket]:
    return [pool.busy(f"{user}{number}", user) for number in range(count)]
