"""A store in plain dictionaries, for tests and for embedding; it ends with the process.

Every method runs without waiting, so each is one step for the rest of the event loop.
What is stored are the domain's frozen values themselves; whoever hands them in keeps
their dictionaries unchanged.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from app.domain.branch import HeadTarget
from app.domain.checkpoint import AutoCheckpoint, Checkpoint, CheckpointPage
from app.domain.compaction import Note
from app.domain.erasure import Erased
from app.domain.errors import (
    CheckpointNotFound,
    HeadMoved,
    PreconditionFailed,
    SessionExists,
    SessionLimit,
    SessionNotFound,
    StoreUnavailable,
    TurnNotFound,
)
from app.domain.ids import SessionKey
from app.domain.journal import Compacted, Entry, Position, StateChanged
from app.domain.session import LifeSpan, Path, Session, SessionCap, SessionChange, SessionPage, SessionQuery
from app.domain.state import SharedState, StateScope
from app.domain.stats import SessionStats
from app.domain.turn import BoundTurn, JsonObject, Turn, TurnPage, TurnStatus, Usage
from app.stores import rules
from app.stores.ensuring import EnsuresInTwoSteps
from app.stores.memory.keys import KeyTable
from app.stores.memory.listing import fits, page_of, session_order, turn_order
from app.stores.memory.moving import MemoryMoving
from app.stores.memory.record import Record, checkpoint_order
from app.stores.memory.sums import Sums
from app.stores.memory.users import MemoryUsers


class MemoryStore(MemoryMoving, MemoryUsers, EnsuresInTwoSteps):
    """Keeps its content over ``close`` and ``open``, as a file would."""

    def __init__(self, life: LifeSpan) -> None:
        self._life = life
        self._records: dict[SessionKey, Record] = {}
        self._of_user: dict[tuple[str, str], set[SessionKey]] = {}
        self._shared: dict[StateScope, SharedState] = {}
        self._keys = KeyTable()
        self._sums = Sums(life)
        self._boot_id = ""
        self._is_closed = False

    async def open(self, boot_id: str, node_url: str | None = None) -> None:
        self._is_closed = False
        self._boot_id = boot_id
        for record in self._records.values():
            for turn in list(record.turns.values()):
                if turn.status is TurnStatus.RUNNING and turn.boot_id != boot_id:
                    self._put(record, rules.interrupted(turn, turn.started_at))

    async def close(self) -> None:
        self._is_closed = True

    async def ping(self) -> None:
        self._check_open()

    def session_count_nowait(self) -> int | None:
        return len(self._records)

    async def create_session(self, session: Session) -> None:
        self._check_open()
        self._add(session, None)

    async def create_sessions(
        self, sessions: Sequence[Session], cap: SessionCap | None = None
    ) -> tuple[SessionExists | SessionLimit | None, ...]:
        self._check_open()
        outcomes: list[SessionExists | SessionLimit | None] = []
        for session in sessions:
            try:
                self._add(session, cap)
                outcomes.append(None)
            except (SessionExists, SessionLimit) as refusal:
                outcomes.append(refusal)
        return tuple(outcomes)

    async def list_oldest(self, owner: str, user_id: str, limit: int) -> tuple[Session, ...]:
        self._check_open()
        keys = self._of_user.get((owner, user_id), ())
        return tuple(sorted((self._records[key].session for key in keys), key=session_order)[:limit])

    async def find_session(self, key: SessionKey) -> Session | None:
        self._check_open()
        record = self._records.get(key)
        return record.session if record else None

    async def list_sessions(self, query: SessionQuery) -> SessionPage:
        self._check_open()
        matches = [r.session for r in self._records.values() if fits(r.session, query, self._life)]
        page, next_cursor = page_of(matches, session_order, "s", query.cursor, query.limit)
        is_counted = rules.has_exact_total(query) or len(matches) <= rules.TOTAL_LIMIT
        return SessionPage(page, len(matches) if is_counted else None, next_cursor)

    async def update_session(
        self, key: SessionKey, change: SessionChange, now: int, *, expected_etag: str | None = None
    ) -> Session:
        record = self._at(key)
        if expected_etag is not None and record.session.etag != expected_etag:
            raise PreconditionFailed(session_id=key.session_id)
        record.session = change.apply(record.session, now, self._life)
        return record.session

    async def patch_state(
        self, key: SessionKey, patch: JsonObject, now: int, *, expected_rev: int | None = None
    ) -> Session:
        record = self._at(key)
        if expected_rev is not None and record.session.state_rev != expected_rev:
            raise PreconditionFailed(session_id=key.session_id)
        now = rules.fact_time(record.session, now)
        record.session = rules.after_patch(record.session, patch, now)
        record.log(StateChanged(patch), now)
        return record.session

    async def get_shared(self, scope: StateScope) -> SharedState:
        self._check_open()
        return self._shared.get(scope, SharedState())

    async def patch_shared(
        self, scope: StateScope, patch: JsonObject, now: int, *, expected_rev: int | None = None
    ) -> SharedState:
        self._check_open()
        shared = self._shared.get(scope, SharedState())
        if expected_rev is not None and shared.rev != expected_rev:
            raise PreconditionFailed
        self._shared[scope] = shared.patched(patch)
        return self._shared[scope]

    async def touch_session(self, key: SessionKey, now: int) -> Session:
        record = self._at(key)
        record.session = record.session.touched(now, self._life)
        return record.session

    async def delete_session(self, key: SessionKey) -> bool:
        self._check_open()
        if key not in self._records:
            return False
        self._remove(key)
        return True

    async def delete_sessions(self, keys: Sequence[SessionKey]) -> Erased:
        self._check_open()
        return sum((self._remove(key) for key in dict.fromkeys(keys) if key in self._records), Erased())

    async def list_keys(
        self, owner: str | None, *, user_id: str | None = None, agent_id: str | None = None, limit: int
    ) -> tuple[SessionKey, ...]:
        self._check_open()
        query = SessionQuery(owner=owner, now=0, user_id=user_id, agent_id=agent_id)
        found = (key for key, r in self._records.items() if fits(r.session, query, self._life))
        return tuple(islice(found, limit))

    async def load_path(self, session: Session) -> Path:
        return self._get(session).path_of(session)

    async def at_turn(self, session: Session, turn_id: str | None) -> Session:
        record = self._find(session)
        if record is None:
            raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
        return rules.at_place(session, record.place_at(turn_id))

    async def move_head(self, session: Session, target: HeadTarget, now: int) -> Session:
        record = self._get(session)
        rules.check_unmoved(record.session, session)
        now = rules.fact_time(record.session, now)
        place = record.place_of(target)
        fact = rules.head_changed(record.session, target, place)
        record.session = rules.after_move(record.session, place, now, self._life)
        record.log(fact, now)
        return record.session

    async def fork_session(
        self, origin: Session, target: HeadTarget | None, new: Session, cap: SessionCap | None = None
    ) -> Session:
        # The origin may be one of the victims that go for the new session, so it is held here.
        record = self._get(origin)
        place = record.place_of(target)
        fork = self._add(rules.after_fork(new, place), cap)
        fork.copy_path(record, place)
        return fork.session

    async def add_checkpoint(self, session: Session, checkpoint: Checkpoint) -> Checkpoint:
        return self._get(session).add_checkpoint(checkpoint)

    async def list_checkpoints(
        self, session: Session, limit: int, cursor: str | None = None
    ) -> CheckpointPage:
        record = self._find(session)
        found = record.newest_checkpoints() if record else []
        page, next_cursor = page_of(found, checkpoint_order, "c", cursor, limit)
        return CheckpointPage(page, len(found), next_cursor)

    async def get_checkpoint(self, session: Session, checkpoint_id: str) -> Checkpoint:
        record = self._find(session)
        if record is None:
            raise CheckpointNotFound(session_id=session.key.session_id)
        return record.get_checkpoint(checkpoint_id)

    async def delete_checkpoints(self, session: Session, checkpoint_id: str | None = None) -> int:
        record = self._find(session)
        return record.delete_checkpoints(checkpoint_id) if record else 0

    async def add_note(self, session: Session, note: Note, usage: Usage) -> Session:
        record = self._get(session)
        record.place_at(note.turn_id)
        if note.note_id not in record.notes:
            now = rules.fact_time(record.session, note.created_at)
            record.add_note(note)
            record.session = replace(record.session, updated_at=now)
            self._sums.count_usage(record.session, usage, note.created_at)
            record.log(Compacted(note.note_id, note.turn_id), now)
        return record.session

    async def get_note(self, session: Session) -> Note | None:
        record = self._find(session)
        return record.find_note(session.head) if record else None

    async def list_notes(self, session: Session) -> tuple[Note, ...]:
        record = self._find(session)
        return tuple(record.notes.values()) if record else ()

    async def list_entries(
        self, session: Session, position: Position | None, limit: int, *, newest_first: bool
    ) -> tuple[Entry, ...]:
        record = self._find(session)
        return tuple(record.entries(position, newest_first=newest_first)[:limit]) if record else ()

    async def start_turn(self, session: Session, turn: Turn) -> Session | None:
        record = self._find(session)
        if record is None or turn.turn_id in record.turns:
            return None
        self._put(record, turn)
        record.session = record.session.touched(turn.started_at, self._life)
        return None

    async def commit_turn(
        self,
        session: Session,
        turn: Turn,
        *,
        resets_state: bool = False,
        checkpoint: AutoCheckpoint | None = None,
    ) -> Session:
        rules.check_committed(turn)
        record = self._get(session)
        known = record.turns.get(turn.turn_id)
        if known is not None and known.is_committed:
            return record.session
        if known is not None and known.status is not TurnStatus.RUNNING:
            raise HeadMoved(session_id=session.key.session_id, turn_id=turn.turn_id)
        rules.check_unmoved(record.session, session, turn.turn_id)
        parent = record.place_at(turn.parent)
        rules.check_depth(turn, parent)
        moved = replace(rules.after_commit(record.session, turn, self._life), note=parent.note)
        record.session = moved.with_state(parent.state, by_turn=True) if resets_state else moved
        self._put(record, turn)
        record.states[turn.turn_id] = record.session.state
        if checkpoint is not None:
            record.add_automatic(checkpoint, turn)
        return record.session

    async def record_turn(self, session: Session, turn: Turn) -> None:
        rules.check_dropped(turn)
        record = self._find(session)
        if record is None:
            return
        known = record.turns.get(turn.turn_id)
        if known is not None and known.status is not TurnStatus.RUNNING:
            return
        self._put(record, turn)
        record.session = record.session.touched(rules.end_of(turn), self._life)

    async def find_bound(self, owner: str, key: str) -> BoundTurn | None:
        self._check_open()
        bound = self._keys.find_committed(owner, key)
        if bound is None:
            return None
        session = bound.record.session
        turn = await self.get_turn(session, bound.turn_id)
        return BoundTurn(session.key.session_id, bound.fingerprint, turn)

    async def get_turn(self, session: Session, turn_id: str) -> Turn:
        record = self._find(session)
        turn = record.turns.get(turn_id) if record else None
        if record is None or turn is None:
            raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
        return replace(turn, on_branch=turn_id in record.branch_ids(turn.depth))

    async def list_turns(self, session: Session, limit: int, cursor: str | None = None) -> TurnPage:
        record = self._find(session)
        turns = record.turns if record else {}
        page, next_cursor = page_of(turns.values(), turn_order, "t", cursor, limit)
        branch = record.branch_ids(min((turn.depth for turn in page), default=0)) if record else set()
        shown = tuple(replace(turn, on_branch=turn.turn_id in branch) for turn in page)
        return TurnPage(shown, len(turns), next_cursor)

    async def list_branch(self, session: Session, limit: int, before: str | None = None) -> tuple[Turn, ...]:
        record = self._find(session)
        if record is None and before is not None:
            raise TurnNotFound(session_id=session.key.session_id, turn_id=before)
        return record.newest_of_branch(limit, before) if record else ()

    async def get_session_stats(self) -> SessionStats:
        self._check_open()
        return self._sums.stats([record.session for record in self._records.values()])

    async def expire_and_purge(self, now: int, limit: int) -> tuple[int, int]:
        self._check_open()
        expired = self._sums.sweep((record.session for record in self._records.values()), now)
        line = rules.purge_line(now, self._life)
        if line is None:
            return expired, 0
        ends = {key: record.session.expires_at for key, record in self._records.items()}
        due = [(end, key) for key, end in ends.items() if end is not None and end <= line]
        gone = [key for _, key in sorted(due) if not self._has_running(self._records[key])][:limit]
        for key in gone:
            self._remove(key)
        return expired, len(gone)

    def _add(self, session: Session, cap: SessionCap | None) -> Record:
        if session.key in self._records:
            raise SessionExists(session_id=session.key.session_id)
        if cap is not None and session.user_id is not None:
            self._make_room(session, cap)
        record = self._records[session.key] = Record(session, session.state, self._life.event_limit)
        self._sums.count_created()
        if session.user_id is not None:
            self._of_user.setdefault((session.key.owner, session.user_id), set()).add(session.key)
        return record

    def _make_room(self, session: Session, cap: SessionCap) -> None:
        keys = self._of_user.get((session.key.owner, session.user_id or ""), set())
        excess = len(keys) + 1 - cap.most
        if excess > 0:
            gone = [victim.key for victim in cap.victims if victim.key in keys and self._may_go(victim)]
            if len(gone) < excess:
                raise SessionLimit(session_id=session.key.session_id)
            for key in gone[:excess]:
                self._remove(key)

    def _may_go(self, victim: Session) -> bool:
        record = self._find(victim)
        is_same = record is not None and record.session.last_accessed == victim.last_accessed
        return is_same and not self._has_running(self._records[victim.key])

    def _has_running(self, record: Record) -> bool:
        return record.has_running(self._boot_id)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailable("The store is closed.")

    def _at(self, key: SessionKey) -> Record:
        self._check_open()
        record = self._records.get(key)
        if record is None:
            raise SessionNotFound(session_id=key.session_id)
        return record

    def _find(self, session: Session) -> Record | None:
        self._check_open()
        record = self._records.get(session.key)
        return record if record is not None and record.session.uid == session.uid else None

    def _get(self, session: Session) -> Record:
        record = self._find(session)
        if record is None:
            raise SessionNotFound(session_id=session.key.session_id)
        return record

    def _put(self, record: Record, turn: Turn) -> None:
        record.put(turn)
        if turn.status is TurnStatus.RUNNING or turn.is_committed:
            self._keys.bind(record, turn)
        else:
            self._keys.release(record, turn.turn_id)
        if turn.status is not TurnStatus.RUNNING:
            self._sums.count_turn(record.session, turn)

    def _remove(self, key: SessionKey) -> Erased:
        record = self._records.pop(key)
        self._keys.release_all(record)
        self._sums.count_removed(record.session)
        user = key.owner, record.session.user_id or ""
        if user in self._of_user:
            self._of_user[user].discard(key)
            if not self._of_user[user]:
                del self._of_user[user]
        return Erased(1, len(record.turns), len(record.checkpoints), len(record.facts))
