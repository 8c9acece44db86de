"""How what is in memory moves to another store, and from one."""

from abc import ABC, abstractmethod
from dataclasses import replace
from heapq import nsmallest

from app.domain.dump import RestDump, SessionDump, SharedDump, TurnDump
from app.domain.erasure import Erased
from app.domain.errors import PreconditionFailed
from app.domain.ids import SessionKey
from app.domain.session import Session, SessionCap
from app.domain.state import SharedState, StateScope
from app.ports.moving import Resealed
from app.stores.alone import Alone
from app.stores.memory.keys import KeyTable
from app.stores.memory.record import Record
from app.stores.memory.sums import Sums


class MemoryMoving(Alone, ABC):
    """What makes a store in memory a ``MovableStore``, over what that store holds and does anyway."""

    _records: dict[SessionKey, Record]
    _shared: dict[StateScope, SharedState]
    _keys: KeyTable
    _sums: Sums

    @abstractmethod
    def _check_open(self) -> None: ...
    @abstractmethod
    def _add(self, session: Session, cap: SessionCap | None) -> Record: ...
    @abstractmethod
    def _remove(self, key: SessionKey) -> Erased: ...

    async def list_after(self, key: SessionKey | None, limit: int) -> tuple[SessionKey, ...]:
        self._check_open()
        return tuple(nsmallest(limit, (one for one in self._records if key is None or one > key)))

    async def dump_session(self, key: SessionKey) -> SessionDump | None:
        self._check_open()
        record = self._records.get(key)
        if record is None:
            return None
        return SessionDump(
            record.session,
            record.root_state,
            tuple(self._dump_turn(record, turn_id) for turn_id in sorted(record.turns)),
            tuple(record.notes[note_id] for note_id in sorted(record.notes)),
            tuple(record.facts),
            record.dump_checkpoints(),
        )

    async def load_session(self, dump: SessionDump, *, over: Session | None = None) -> None:
        self._check_open()
        dump = dump.settled()
        known = self._records.get(dump.session.key)
        if over is not None and (known is None or known.session != over):
            raise PreconditionFailed(session_id=over.key.session_id)
        if known is not None:
            self._remove(dump.session.key)
            self._sums.count_replaced(known.session)
        record = self._add(dump.session, None)
        record.load(dump)
        for dumped in dump.turns:
            self._keys.take(record, dumped.turn)

    async def dump_rest(self) -> RestDump:
        self._check_open()
        scopes = sorted(self._shared, key=lambda scope: (scope.app_name, scope.owner, scope.user_id or ""))
        totals = self._sums.dump_totals()
        totals["created"] -= len(self._records)
        shared = tuple(SharedDump(scope, self._shared[scope]) for scope in scopes)
        return RestDump(shared, tuple(self._sums.dump_usage()), totals)

    async def load_rest(self, rest: RestDump) -> None:
        self._check_open()
        self._shared.clear()
        self._shared.update({dumped.scope: dumped.shared for dumped in rest.shared})
        created = rest.totals.get("created", 0) + len(self._records)
        self._sums.load(rest.usage, rest.totals | {"created": created})

    async def reseal_rest(self) -> Resealed:
        self._check_open()
        return Resealed(len(self._shared), 0)  # nothing here is sealed

    async def scrub(self) -> None:
        return None  # what was replaced is nowhere

    def _dump_turn(self, record: Record, turn_id: str) -> TurnDump:
        turn = replace(record.turns[turn_id], binding=self._keys.find_binding(record, turn_id))
        return TurnDump(turn, record.states.get(turn_id))
