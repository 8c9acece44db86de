"""Idempotency keys in memory: each belongs to one turn, for good once that turn is committed."""

import logging
from typing import NamedTuple

from app.domain.idempotency import Binding
from app.domain.turn import Turn
from app.stores.memory.record import Record

_log = logging.getLogger(__name__)


class Bound(NamedTuple):
    record: Record
    turn_id: str
    fingerprint: bytes


class KeyTable:
    """What is bound under (owner, key). A record says itself which keys its turns hold."""

    def __init__(self) -> None:
        self._bound: dict[tuple[str, str], Bound] = {}

    def find(self, binding: Binding | None) -> Bound | None:
        return self._bound.get((binding.owner, binding.key)) if binding is not None else None

    def find_committed(self, owner: str, key: str) -> Bound | None:
        bound = self._bound.get((owner, key))
        return bound if bound is not None and bound.record.turns[bound.turn_id].is_committed else None

    def bind(self, record: Record, turn: Turn) -> None:
        """Bind the turn's key, unless a committed turn has it."""
        if turn.binding is None:
            return
        name = turn.binding.owner, turn.binding.key
        holder = self._bound.get(name)
        if holder is not None and (holder.record is not record or holder.turn_id != turn.turn_id):
            if holder.record.turns[holder.turn_id].is_committed:
                _log.error("the idempotency key of turn %s belongs to another committed turn", turn.turn_id)
                return
            self.release(holder.record, holder.turn_id)
        self._bound[name] = Bound(record, turn.turn_id, turn.binding.fingerprint)
        record.keys[turn.turn_id] = name

    def find_binding(self, record: Record, turn_id: str) -> Binding | None:
        """Return what is bound to a turn."""
        name = record.keys.get(turn_id)
        return Binding(*name, self._bound[name].fingerprint) if name is not None else None

    def take(self, record: Record, turn: Turn) -> None:
        """Bind the turn's key, whoever has it."""
        holder = self.find(turn.binding)
        if holder is not None:
            self.release(holder.record, holder.turn_id)
        self.bind(record, turn)

    def release(self, record: Record, turn_id: str) -> None:
        name = record.keys.pop(turn_id, None)
        if name is not None:
            del self._bound[name]

    def release_all(self, record: Record) -> None:
        for turn_id in list(record.keys):
            self.release(record, turn_id)
