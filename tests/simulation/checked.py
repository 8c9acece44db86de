"""A ``PoolTable`` under observation: every call is compared with a simple model of the queues."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from app.domain.errors import AgentPoolError
from app.domain.ids import SessionKey
from app.pool.effects import Effect, Granted, Load, Refused
from app.pool.limits import PoolLimits
from app.pool.slot import Slot, SlotState, Ticket, TicketKind
from app.pool.table import PoolTable
from tests.unit.pool.invariants import check_table

STEPS_PER_CHECK = 5
_CHANGES = (
    "loaded",
    "load_failed",
    "room_wait_over",
    "queue_wait_over",
    "zombie_ended",
    "evict",
    "sweep",
    "begin_drain",
)


@dataclass(frozen=True)
class Entry:
    """A ticket that entered, who had the session then, and whether a hold was next in line."""

    ticket: Ticket
    owner: Ticket | None
    is_front: bool
    is_hold_next: bool


class CheckedTable:
    """Stands in for the table inside ``AgentManager``. ``line`` is who must be served, in order."""

    def __init__(self, limits: PoolLimits, table_class: type[PoolTable] = PoolTable) -> None:
        self.inner = table_class(limits)
        self.line: dict[SessionKey, list[Ticket]] = defaultdict(list)
        self.owners: dict[SessionKey, Ticket] = {}
        self.loads: list[Slot] = []
        self.entries: list[Entry] = []
        self.steps = 0
        for name in _CHANGES:
            setattr(self, name, self._watched(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _watched(self, name: str) -> Any:
        method = getattr(self.inner, name)

        def call(*args: Any, **kwargs: Any) -> list[Effect]:
            if name in ("loaded", "load_failed") and args[0] in self.loads:
                self.loads.remove(args[0])
            return self._apply(method(*args, **kwargs))

        return call

    def enter(self, ticket: Ticket, *, may_wait: bool = True, front: bool = False) -> list[Effect]:
        line = self.line[ticket.key]
        is_hold_next = bool(line) and line[0].kind is TicketKind.HOLD
        entry = Entry(ticket, self.owners.get(ticket.key), front, is_hold_next)
        line.insert(0 if front else len(line), ticket)
        try:
            effects = self.inner.enter(ticket, may_wait=may_wait, front=front)
        except AgentPoolError:
            line.remove(ticket)
            check_table(self.inner)
            raise
        self.entries.append(entry)
        return self._apply(effects)

    def leave(self, ticket: Ticket, now: float) -> list[Effect]:
        self._forget(ticket)
        return self._apply(self.inner.leave(ticket, now))

    def release(self, ticket: Ticket, *args: Any, **kwargs: Any) -> list[Effect]:
        self._forget(ticket, only_owner=True)
        return self._apply(self.inner.release(ticket, *args, **kwargs))

    def abandon(self, ticket: Ticket, *args: Any) -> list[Effect]:
        self._forget(ticket, only_owner=True)
        return self._apply(self.inner.abandon(ticket, *args))

    def _forget(self, ticket: Ticket, *, only_owner: bool = False) -> None:
        if self.owners.get(ticket.key) is ticket:
            del self.owners[ticket.key]
        elif not only_owner and ticket in self.line[ticket.key]:
            self.line[ticket.key].remove(ticket)

    def _apply(self, effects: Iterable[Effect]) -> list[Effect]:
        effects = list(effects)
        for effect in effects:
            match effect:
                case Granted(ticket):
                    assert self.line[ticket.key][0] is ticket, "not the first in line"
                    assert ticket.key not in self.owners, "two owners"
                    self.owners[ticket.key] = self.line[ticket.key].pop(0)
                case Refused(ticket):
                    self.line[ticket.key].remove(ticket)
                case Load(slot):
                    assert slot.key not in [other.key for other in self.loads], "two loads of one session"
                    self.loads.append(slot)
        self.check()
        return effects

    def after_step(self) -> None:
        """Find what went past the calls: each of those has been checked already."""
        self.steps += 1
        if self.steps % STEPS_PER_CHECK == 0:
            self.check()

    def check(self) -> None:
        """Raise ``AssertionError`` if the table is not as it must be or not as the model says."""
        table = self.inner
        check_table(table)
        assert {key: slot.owner for key, slot in table.slots.items() if slot.owner} == self.owners
        lines = {key: list(slot.waiters) for key, slot in table.slots.items() if slot.waiters}
        assert lines == {key: line for key, line in self.line.items() if line}
        loading = {id(slot) for slot in table.slots.values() if slot.state is SlotState.LOADING}
        assert loading == {id(slot) for slot in self.loads}
