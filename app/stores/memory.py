"""A store in plain dictionaries, for tests and for embedding; it ends with the process.

Every method runs without waiting, so each is one step for the rest of the event loop.
What is stored are the domain's frozen values themselves; whoever hands them in keeps
their dictionaries unchanged.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

from app.domain.errors import (
    HeadMoved,
    PreconditionFailed,
    SessionExists,
    SessionLimit,
    SessionNotFound,
    StoreUnavailable,
    TurnNotFound,
)
from app.domain.ids import SessionKey
from app.domain.session import LifeSpan, Path, Session, SessionCap, SessionChange, SessionPage, SessionQuery
from app.domain.stats import DayUsage, UserUsage
from app.domain.turn import BoundTurn, Turn, TurnPage, TurnStatus
from app.stores import rules
from app.stores.codec import to_turn_body
from app.stores.cursor import from_cursor, to_cursor

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Record:
    session: Session
    turns: dict[str, Turn] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)  # turn id: what is bound to it


class _Bound(NamedTuple):
    record: _Record
    turn_id: str
    fingerprint: bytes


class MemoryStore:
    """Keeps its content over ``close`` and ``open``, as a file would."""

    def __init__(self, life: LifeSpan) -> None:
        self.counters: Counter[str] = Counter()
        self._life = life
        self._records: dict[SessionKey, _Record] = {}
        self._of_user: dict[tuple[str, str], set[SessionKey]] = {}
        self._usage: dict[tuple[str, str | None], dict[int, Counter[str]]] = {}
        self._bound: dict[tuple[str, str], _Bound] = {}
        self._boot_id = ""
        self._is_closed = False

    async def open(self, boot_id: str) -> None:
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
        return tuple(sorted((self._records[key].session for key in keys), key=_session_order)[:limit])

    async def find_session(self, key: SessionKey) -> Session | None:
        self._check_open()
        record = self._records.get(key)
        return record.session if record else None

    async def list_sessions(self, query: SessionQuery) -> SessionPage:
        self._check_open()
        after = _session_position(query.cursor)
        matches = [r.session for r in self._records.values() if _fits(r.session, query, self._life)]
        matches.sort(key=_session_order, reverse=True)
        rest = matches if after is None else [s for s in matches if _session_order(s) < after]
        page = tuple(rest[: query.limit])
        total = len(matches) if rules.has_exact_total(query) or len(matches) <= rules.TOTAL_LIMIT else None
        has_more = len(rest) > len(page)
        return SessionPage(page, total, to_cursor("s", *_session_order(page[-1])) if has_more else None)

    async def update_session(
        self, key: SessionKey, change: SessionChange, now: int, *, expected_etag: str | None = None
    ) -> Session:
        self._check_open()
        record = self._records.get(key)
        if record is None:
            raise SessionNotFound(session_id=key.session_id)
        if expected_etag is not None and record.session.etag != expected_etag:
            raise PreconditionFailed(session_id=key.session_id)
        record.session = change.apply(record.session, now, self._life)
        return record.session

    async def touch_session(self, key: SessionKey, now: int) -> Session:
        self._check_open()
        record = self._records.get(key)
        if record is None:
            raise SessionNotFound(session_id=key.session_id)
        record.session = record.session.touched(now, self._life)
        return record.session

    async def delete_session(self, key: SessionKey) -> bool:
        self._check_open()
        if key not in self._records:
            return False
        self._remove(key)
        return True

    async def delete_sessions(self, keys: Sequence[SessionKey]) -> int:
        self._check_open()
        found = [key for key in dict.fromkeys(keys) if key in self._records]
        for key in found:
            self._remove(key)
        return len(found)

    async def list_keys(
        self, owner: str, *, user_id: str | None = None, agent_id: str | None = None, limit: int
    ) -> tuple[SessionKey, ...]:
        self._check_open()
        query = SessionQuery(owner=owner, now=0, user_id=user_id, agent_id=agent_id)
        found = (key for key, r in self._records.items() if _fits(r.session, query, self._life))
        return tuple(islice(found, limit))

    async def load_path(self, session: Session) -> Path:
        self._check_open()
        record = self._get(session)
        turns = list(_up(record, session.head))
        turns.reverse()
        messages = tuple(message for turn in turns for message in turn.messages)
        return Path(session.head, session.note, messages, sum(record.sizes[t.turn_id] for t in turns))

    async def start_turn(self, session: Session, turn: Turn) -> None:
        self._check_open()
        record = self._find(session)
        if record is None or turn.turn_id in record.turns:
            return
        self._put(record, turn)
        record.session = record.session.touched(turn.started_at, self._life)

    async def commit_turn(self, session: Session, turn: Turn) -> Session:
        self._check_open()
        rules.check_committed(turn)
        record = self._get(session)
        known = record.turns.get(turn.turn_id)
        if known is not None and known.is_committed:
            return record.session
        if known is not None and known.status is not TurnStatus.RUNNING:
            raise HeadMoved(session_id=session.key.session_id, turn_id=turn.turn_id)
        rules.check_head(record.session, turn)
        self._put(record, turn)
        record.session = rules.after_commit(record.session, turn, self._life)
        return record.session

    async def record_turn(self, session: Session, turn: Turn) -> None:
        self._check_open()
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
        bound = self._bound.get((owner, key))
        if bound is None or not bound.record.turns[bound.turn_id].is_committed:
            return None
        session = bound.record.session
        turn = await self.get_turn(session, bound.turn_id)
        return BoundTurn(session.key.session_id, bound.fingerprint, turn)

    async def get_turn(self, session: Session, turn_id: str) -> Turn:
        self._check_open()
        record = self._find(session)
        turn = record.turns.get(turn_id) if record else None
        if record is None or turn is None:
            raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
        return replace(turn, on_branch=turn_id in _branch_ids(record, turn.depth))

    async def list_turns(self, session: Session, limit: int, cursor: str | None = None) -> TurnPage:
        self._check_open()
        after = None if cursor is None else from_cursor("t", cursor)
        record = self._find(session)
        if record is None:
            return TurnPage((), 0, None)
        ordered = sorted(record.turns.values(), key=_turn_order, reverse=True)
        rest = ordered if after is None else [turn for turn in ordered if _turn_order(turn) < after]
        page = rest[:limit]
        branch = _branch_ids(record, min((turn.depth for turn in page), default=0))
        turns = tuple(replace(turn, on_branch=turn.turn_id in branch) for turn in page)
        has_more = len(rest) > len(page)
        return TurnPage(turns, len(ordered), to_cursor("t", *_turn_order(page[-1])) if has_more else None)

    async def list_branch(self, session: Session, limit: int, before: str | None = None) -> tuple[Turn, ...]:
        self._check_open()
        record = self._find(session)
        if before is not None:
            turn = record.turns.get(before) if record else None
            if record is None or turn is None or before not in _branch_ids(record, turn.depth):
                raise TurnNotFound(session_id=session.key.session_id, turn_id=before)
            start = turn.parent
        elif record is not None:
            start = record.session.head
        if record is None:
            return ()
        newest = [turn for turn, _ in zip(_up(record, start), range(limit), strict=False)]
        return tuple(replace(turn, on_branch=True) for turn in reversed(newest))

    async def get_usage(self, owner: str, user_id: str, limit: int) -> UserUsage:
        self._check_open()
        names = ("turns", "prompt_tokens", "completion_tokens")
        found = self._usage.get((owner, user_id), {})
        days = [DayUsage(day, *(found[day][name] for name in names)) for day in sorted(found, reverse=True)]
        turns, read, written = (sum(counts[name] for counts in found.values()) for name in names)
        return UserUsage(turns, read, written, tuple(days[:limit]))

    async def expire_and_purge(self, now: int, since: int, limit: int) -> tuple[int, int]:
        self._check_open()
        ends = {key: r.session.expires_at for key, r in self._records.items()}
        expired = sum(1 for end in ends.values() if end is not None and since < end <= now)
        line = rules.purge_line(now, self._life)
        if line is None:
            return expired, 0
        due = [(end, key) for key, end in ends.items() if end is not None and end <= line]
        gone = [key for _, key in sorted(due) if not self._has_running(key)][:limit]
        for key in gone:
            self._remove(key)
        return expired, len(gone)

    def _add(self, session: Session, cap: SessionCap | None) -> None:
        if session.key in self._records:
            raise SessionExists(session_id=session.key.session_id)
        if cap is not None and session.user_id is not None:
            self._make_room(session, cap)
        self._records[session.key] = _Record(session)
        if session.user_id is not None:
            self._of_user.setdefault((session.key.owner, session.user_id), set()).add(session.key)

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
        return is_same and not self._has_running(victim.key)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailable("The store is closed.")

    def _find(self, session: Session) -> _Record | None:
        record = self._records.get(session.key)
        return record if record is not None and record.session.uid == session.uid else None

    def _get(self, session: Session) -> _Record:
        record = self._find(session)
        if record is None:
            raise SessionNotFound(session_id=session.key.session_id)
        return record

    def _put(self, record: _Record, turn: Turn) -> None:
        record.turns[turn.turn_id] = replace(turn, binding=None)
        record.sizes[turn.turn_id] = len(to_turn_body(turn))
        if turn.status is TurnStatus.RUNNING or turn.is_committed:
            self._bind(record, turn)
        else:
            self._release(record, turn.turn_id)
        if turn.status is not TurnStatus.RUNNING:
            counts = rules.counts_of(turn)
            self.counters.update(counts)
            user = record.session.key.owner, record.session.user_id
            self._usage.setdefault(user, {}).setdefault(rules.day_of(turn), Counter()).update(counts)

    def _bind(self, record: _Record, turn: Turn) -> None:
        """Bind the turn's key, unless a committed turn has it."""
        if turn.binding is None:
            return
        name = turn.binding.owner, turn.binding.key
        holder = self._bound.get(name)
        if holder is not None and (holder.record is not record or holder.turn_id != turn.turn_id):
            if holder.record.turns[holder.turn_id].is_committed:
                _log.error("the idempotency key of turn %s belongs to another committed turn", turn.turn_id)
                return
            self._release(holder.record, holder.turn_id)
        self._bound[name] = _Bound(record, turn.turn_id, turn.binding.fingerprint)
        record.keys[turn.turn_id] = name

    def _release(self, record: _Record, turn_id: str) -> None:
        name = record.keys.pop(turn_id, None)
        if name is not None:
            del self._bound[name]

    def _remove(self, key: SessionKey) -> None:
        record = self._records.pop(key)
        for name in record.keys.values():
            del self._bound[name]
        user = key.owner, record.session.user_id or ""
        if user in self._of_user:
            self._of_user[user].discard(key)
            if not self._of_user[user]:
                del self._of_user[user]

    def _has_running(self, key: SessionKey) -> bool:
        turns = self._records[key].turns.values()
        return any(t.status is TurnStatus.RUNNING and t.boot_id == self._boot_id for t in turns)


def _up(record: _Record, turn_id: str | None) -> Iterator[Turn]:
    while turn_id is not None:
        turn = record.turns[turn_id]
        yield turn
        turn_id = turn.parent


def _branch_ids(record: _Record, least_depth: int) -> set[str]:
    ids = set()
    for turn in _up(record, record.session.head):
        if turn.depth < least_depth:
            break
        ids.add(turn.turn_id)
    return ids


def _session_order(session: Session) -> tuple[int, str]:
    return session.last_accessed, session.uid


def _turn_order(turn: Turn) -> tuple[int, str]:
    return turn.started_at, turn.turn_id


def _session_position(cursor: str | None) -> tuple[int, str] | None:
    return None if cursor is None else from_cursor("s", cursor)


def _fits(session: Session, query: SessionQuery, life: LifeSpan) -> bool:
    return (
        (query.owner is None or session.key.owner == query.owner)
        and (query.user_id is None or session.user_id == query.user_id)
        and (query.agent_id is None or session.agent_id == query.agent_id)
        and (query.window_id is None or session.window_id == query.window_id)
        and (query.status is None or session.status_at(query.now, life) is query.status)
        and (query.text is None or _contains(session, query.text))
    )


def _contains(session: Session, text: str) -> bool:
    return text.casefold() in (session.title or "").casefold() or session.key.session_id.startswith(text)
