"""What a store in SQLite takes in from another, as works of the writer."""

from collections import Counter
from typing import Any

from app.domain.dump import RestDump, SessionDump
from app.domain.errors import PreconditionFailed, SnapshotUnreadable
from app.domain.ids import to_id_bytes
from app.domain.session import Session
from app.domain.state import StateScope
from app.domain.turn import JsonObject
from app.ports.moving import Resealed
from app.stores.buckets import PREFIX
from app.stores.codec import to_json_text, to_turn_body
from app.stores.side_rows import from_shared_row, to_checkpoint_row, to_fact_row
from app.stores.sqlite import keys, notes, records, states
from app.stores.sqlite.checkpoints import ADD_CHECKPOINT
from app.stores.sqlite.dumping import LIST_SHARED, TOTALS, totals_of_sessions
from app.stores.sqlite.journal import ADD_FACT
from app.stores.sqlite.notes import Noted
from app.stores.sqlite.rows import Home
from app.stores.sqlite.tree import find_by_key
from app.stores.sqlite.unit import Unit
from app.stores.sqlite.writes import add_turn

# It may be broken, and its times no numbers.
_FIND_LIFE = (
    "SELECT id, CAST(last_accessed - created_at AS INTEGER) FROM sessions WHERE owner = ? AND session_id = ?"
)
_ADD_USAGE = (
    "INSERT INTO usage_days (owner, user_id, day, turns, prompt_tokens, completion_tokens)"
    " VALUES (?, ?, ?, ?, ?, ?)"
)
_SUM_USAGE = (
    "INSERT INTO usage_days (owner, user_id, day, turns, prompt_tokens, completion_tokens)"
    " SELECT owner, user_id, -1, sum(turns), sum(prompt_tokens), sum(completion_tokens)"
    " FROM usage_days GROUP BY owner, user_id"
)


class _States:
    """Numbers for the states of a session, each kept once; ``None`` is that of the empty one."""

    def __init__(self) -> None:
        self.kept: dict[int, JsonObject] = {}
        self._numbers: dict[str, int] = {}

    def keep(self, state: JsonObject) -> int | None:
        if not state:
            return None
        text = to_json_text(state)
        number = self._numbers.setdefault(text, len(self._numbers) + 1)
        self.kept[number] = state
        return number


def load_session(unit: Unit, dump: SessionDump, over: Session | None) -> None:
    if over is not None:
        there = find_by_key(unit.connection, over.key)
        if there is None or there.session != over:
            raise PreconditionFailed(session_id=over.key.session_id)
    known: Any = unit.connection.execute(_FIND_LIFE, dump.session.key).fetchone()
    if known is not None:
        records.remove(unit, known[0])
        unit.count("created", -1)
        unit.count("lifetime_ms", -known[1])
    states = _States()
    root = states.keep(dump.root_state)
    at_turns = [states.keep(dumped.state or {}) for dumped in dump.turns]
    at_checkpoints = [states.keep(one.state) for one in dump.checkpoints]
    number = records.add(unit, dump.session, state_number=states.keep(dump.session.state), root_state=root)
    home = Home(number, to_id_bytes(dump.session.uid), has_user=False)
    for dumped, state in zip(dump.turns, at_turns, strict=True):
        add_turn(unit, home, dumped.turn, to_turn_body(dumped.turn), state)
        keys.take(unit.connection, number, dumped.turn)
    _load_beside(unit, number, dump, states, at_checkpoints)


def load_rest(unit: Unit, rest: RestDump) -> None:
    connection = unit.connection
    connection.execute("DELETE FROM shared_state")
    for dumped in rest.shared:
        # When it was changed last is not told, and nobody asks.
        states.set_shared(unit, dumped.scope, dumped.shared, 0)
    connection.execute("DELETE FROM usage_days")
    days = [(one.owner, one.user_id, one.usage) for one in rest.usage]
    connection.executemany(
        _ADD_USAGE,
        [(*user, d.day, d.turns, d.prompt_tokens, d.completion_tokens) for *user, d in days],
    )
    connection.execute(_SUM_USAGE)
    totals = Counter(rest.totals)
    totals.update(totals_of_sessions(connection))
    buckets = {name for name in unit.totals if name.startswith(PREFIX)}
    for name in {*TOTALS, *buckets, *totals}:
        unit.count(name, totals[name] - unit.value(name))


def reseal_rest(unit: Unit) -> Resealed:
    rows: list[Any] = unit.connection.execute(LIST_SHARED).fetchall()
    broken = 0
    for app_name, owner, user_id, *row in rows:
        scope = StateScope(app_name, owner, user_id or None)
        try:
            states.set_shared(unit, scope, from_shared_row(unit.sealer, scope, row), row[1])
        except SnapshotUnreadable:
            broken += 1
    return Resealed(len(rows) - broken, broken)


def _load_beside(
    unit: Unit, number: int, dump: SessionDump, states: _States, at_checkpoints: list[int | None]
) -> None:
    connection, uid = unit.connection, to_id_bytes(dump.session.uid)
    for state_number, state in states.kept.items():
        records.add_state(unit, number, uid, state_number, state)
    depths = {dumped.turn.turn_id: dumped.turn.depth for dumped in dump.turns}
    notes.copy_notes(unit, number, uid, [Noted(note, depths[note.turn_id], 0) for note in dump.notes])
    connection.executemany(
        ADD_FACT, [(*to_fact_row(unit.sealer, uid, logged), number) for logged in dump.facts]
    )
    named = zip(dump.checkpoints, at_checkpoints, strict=True)
    connection.executemany(
        ADD_CHECKPOINT,
        [(*to_checkpoint_row(unit.sealer, uid, one.checkpoint, state), number) for one, state in named],
    )
