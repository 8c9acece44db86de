"""A write to one session as it is being made up: what its record will be, and what else is to be done.

Nothing is sent from here. All of a draft happens in one step of the server, or nothing of it.
"""

from app.domain.checkpoint import AutoCheckpoint, Checkpoint
from app.domain.compaction import Note
from app.domain.ids import to_id_bytes
from app.domain.journal import Fact, LoggedFact
from app.domain.session import LifeSpan, Session
from app.domain.turn import JsonObject, Turn, TurnStatus, Usage
from app.stores import rules
from app.stores.buckets import PREFIX, bucket_of
from app.stores.redis import keys, rows, side_rows
from app.stores.redis.rows import Record
from app.stores.redis.wire import Word
from app.stores.sealing import Sealer

MARGIN_MS = 7 * rules.MS_PER_DAY
"""How long after its purge a session's keys go by themselves, if nothing sweeps."""
SLACK_MS = MARGIN_MS // 2


class Draft:
    """Begins as ``record`` is; the methods say what is to change."""

    def __init__(self, sealer: Sealer, record: Record) -> None:
        self.sealer = sealer
        self.was = record
        self.session = record.session
        self.now = record.session.last_accessed
        self.state_number = record.state_number
        self.root_state = record.root_state
        self.states = record.states
        self.facts = record.facts
        self.fact_ms = record.fact_ms
        self.commands: list[Word] = []

    def do(self, command: str, room: Word, *words: Word) -> None:
        """Add a command on one of the session's rooms, or one of ``carry_out`` in ``lua/common.lua``."""
        self.commands += (len(words) + 2, command, room, *words)

    def save(self, session: Session, now: int) -> None:
        """Let the record be ``session``, as of ``now``."""
        self.session, self.now = session, now

    def to_record(self, token: bytes) -> Record:
        """Return the record as it will be."""
        # What changes the JSON of a record changes a revision.
        was = self.was.session
        is_same = (self.session.rev, self.session.state_rev) == (was.rev, was.state_rev) and self.was.token
        json = self.was.json if is_same else rows.to_json(self.sealer, self.session)
        return Record(
            self.session,
            token,
            json,
            self.state_number,
            self.root_state,
            self.states,
            self.facts,
            self.fact_ms,
        )

    def keep_state(self) -> int | None:
        """Keep the session's state as it is now unless it is kept; return its number."""
        if self.session.state and self.state_number is None:
            self.states += 1
            self.state_number = self.states
            self.put_state(self.states, self.session.state)
        return self.state_number

    def put_state(self, number: int, state: JsonObject) -> None:
        self.do("HSET", "k", number, side_rows.to_state(self.sealer, self.was.uid, number, state))

    def log(self, fact: Fact, time_ms: int, life: LifeSpan) -> None:
        """Log a fact, its time being ``rules.fact_time``; of too many the oldest go."""
        self.facts, self.fact_ms = self.facts + 1, max(time_ms, self.fact_ms)
        self.put_fact(LoggedFact(self.facts, self.fact_ms, fact))
        if life.event_limit:
            self.do("ZREMRANGEBYRANK", "f", 0, -life.event_limit - 1)

    def put_fact(self, logged: LoggedFact) -> None:
        self.do("ZADD", "f", logged.created_at, side_rows.to_fact(self.sealer, self.was.uid, logged))

    def put_turn(self, turn: Turn, state: int | None) -> None:
        turn_id = to_id_bytes(turn.turn_id)
        self.do("HSET", "t", turn_id, rows.to_turn(self.sealer, self.was.uid, turn, state))
        self.do("ZADD", "i", turn.started_at, turn_id)

    def end_turn(self, turn: Turn, state: int | None) -> None:
        """Store the turn as it ended, count it, and bind or release its key."""
        self.put_turn(turn, state)
        if not turn.is_committed:
            self.do("release", to_id_bytes(turn.turn_id))
        elif turn.binding is not None:
            self.do("bind", *bind_words(self.sealer, self.was.tag, turn))
        counts: list[Word] = [
            word for name, change in rules.counts_of(turn).items() for word in (name, change)
        ]
        if turn.status is TurnStatus.FINISHED:
            counts += ["turns_finished", 1, "response_ms", turn.duration_ms]
            counts += [f"{PREFIX}{bucket_of(turn.duration_ms)}", 1]
        self.do("count", *counts)
        self.use(rules.day_of(turn), 1, turn.usage)

    def use(self, day: int, turns: int, usage: Usage) -> None:
        """Count what was used on the account of the session's user."""
        user = user_name(self.session)
        if user:
            self.do("usage", user, day, turns, usage.prompt_tokens, usage.completion_tokens)

    def put_checkpoint(self, checkpoint: Checkpoint, state: int | None) -> None:
        checkpoint_id = to_id_bytes(checkpoint.checkpoint_id)
        row = side_rows.to_checkpoint(self.sealer, self.was.uid, checkpoint, state)
        self.do("HSET", "c", checkpoint_id, row)
        for room in "da" if checkpoint.automatic else "d":
            self.do("ZADD", room, checkpoint.created_at, checkpoint_id)

    def put_automatic(self, wanted: AutoCheckpoint, turn: Turn, state: int | None) -> None:
        """Name the turn that is being committed; of such names the newest ``wanted.keep`` stay."""
        self.put_checkpoint(rules.automatic_checkpoint(wanted, turn), state)
        self.do("trim", wanted.keep)

    def put_note(self, note: Note, depth: int, number: int) -> None:
        body, noted = side_rows.to_note(self.sealer, self.was.uid, note, depth, number)
        self.do("HSET", "n", to_id_bytes(note.note_id), body)
        self.do("HSET", "o", to_id_bytes(note.note_id), noted)


def new_draft(sealer: Sealer, session: Session, *, fork_of: Record | None = None) -> Draft:
    """Return the draft of a session that is to be made; a fork takes over its origin's numbers of states."""
    draft = Draft(sealer, Record(session, b""))
    if fork_of is not None:
        draft.states, draft.root_state = fork_of.states, fork_of.root_state
    elif session.state:
        draft.root_state = draft.keep_state()
    return draft


def activity_words(session: Session, now: int, life: LifeSpan) -> list[Word]:
    """Return what tells the scripts where the session stands in the indexes, and how long to keep it."""
    expires_at: Word = "" if session.expires_at is None else session.expires_at
    return [
        session.last_accessed, expires_at, int(session.archived), int(session.marked_idle), now,
        life.idle_after_s * 1000, _span_of(session, life), SLACK_MS,
    ]  # fmt: skip


def create_words(draft: Draft, record: Record, life: LifeSpan, *, is_capped: bool) -> list[Word]:
    """Return what ``create.lua`` wants of one session; ``is_capped``: its user's sessions are counted."""
    session = record.session
    user = user_name(session) if is_capped else ""
    words: list[Word] = [
        f"u:{user}" if user else "", record.tag, record.uid, record.token, keys.member_of(session),
        "\n".join(keys.indexes_of(session)),
        head_word(session), rows.to_record(draft.sealer, record), record.json,
        *activity_words(session, draft.now, life), session.last_accessed - session.created_at,
        *draft.commands,
    ]  # fmt: skip
    return [len(words), *words]


def bind_words(sealer: Sealer, tag: str, turn: Turn) -> tuple[Word, Word, Word]:
    """Return the turn, and the name and the seal of its idempotency key."""
    assert turn.binding is not None
    turn_id = to_id_bytes(turn.turn_id)
    name = keys.bound_name(turn.binding.owner, turn.binding.key)
    return turn_id, name, side_rows.to_bound(sealer, name, tag, turn_id, turn.binding.fingerprint)


def head_word(session: Session) -> bytes:
    return b"" if session.head is None else to_id_bytes(session.head)


def user_name(session: Session) -> str:
    return "" if session.user_id is None else keys.user_of(session.key.owner, session.user_id)


def _span_of(session: Session, life: LifeSpan) -> Word:
    """Return how long the keys are kept from now on, in ms, "" for ever.

    Counted from the last activity by the server's clock: whatever clock the times are from, no key
    goes before its session may be purged.
    """
    if session.expires_at is None or not life.retention_s:
        return ""
    until_purge = session.expires_at - session.last_accessed + life.retention_s * 1000
    return max(0, until_purge) + MARGIN_MS
