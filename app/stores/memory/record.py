"""One session in memory: its record, its tree of turns, and what is remembered beside the tree.

Nothing is ever taken from the tree. With each committed turn the state is kept that
held at its commit, so that any place of the tree can be gone back to.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from app.domain.branch import Back, HeadTarget, ToCheckpoint
from app.domain.checkpoint import AutoCheckpoint, Checkpoint
from app.domain.compaction import Note
from app.domain.dump import CheckpointDump, SessionDump
from app.domain.errors import CheckpointNotFound, SnapshotUnreadable, TurnNotFound
from app.domain.journal import Entry, Fact, LoggedFact, Position, position_of
from app.domain.session import Path, Session
from app.domain.turn import JsonObject, Turn, TurnStatus
from app.stores import rules
from app.stores.codec import to_turn_body


@dataclass(frozen=True, slots=True)
class _Named:
    checkpoint: Checkpoint
    state: JsonObject


@dataclass(slots=True)
class Record:
    """A session as it is now. ``root_state`` is what it was created with."""

    session: Session
    root_state: JsonObject
    fact_limit: int  # how many facts stay, 0: all
    turns: dict[str, Turn] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    states: dict[str, JsonObject] = field(default_factory=dict)  # committed turn: the session's state then
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)  # turn id: what is bound to it
    notes: dict[str, Note] = field(default_factory=dict)
    facts: list[LoggedFact] = field(default_factory=list)
    checkpoints: dict[str, _Named] = field(default_factory=dict)
    _noted: dict[str, Note] = field(default_factory=dict)  # turn id: the newest note on it
    _last_fact: tuple[int, int] = 0, 0  # number and time, also of one that was dropped since

    def put(self, turn: Turn) -> None:
        self.turns[turn.turn_id] = turn if turn.binding is None else replace(turn, binding=None)
        self.sizes[turn.turn_id] = len(to_turn_body(turn))

    def up(self, turn_id: str | None) -> Iterator[Turn]:
        """Return the path to a turn, backwards."""
        while turn_id is not None:
            turn = self.turns[turn_id]
            yield turn
            turn_id = turn.parent

    def branch_ids(self, least_depth: int) -> set[str]:
        ids = set()
        for turn in self.up(self.session.head):
            if turn.depth < least_depth:
                break
            ids.add(turn.turn_id)
        return ids

    def newest_of_branch(self, limit: int, before: str | None) -> tuple[Turn, ...]:
        """Return the newest turns of the branch, or of those before ``before``, ascending.

        Raises:
            TurnNotFound: ``before`` is not on the branch.
        """
        start = self.session.head
        if before is not None:
            turn = self.turns.get(before)
            if turn is None or before not in self.branch_ids(turn.depth):
                raise TurnNotFound(session_id=self.session.key.session_id, turn_id=before)
            start = turn.parent
        return tuple(replace(turn, on_branch=True) for turn in islice(self.up(start), limit))[::-1]

    def has_running(self, boot_id: str) -> bool:
        return any(t.status is TurnStatus.RUNNING and t.boot_id == boot_id for t in self.turns.values())

    def place_at(self, turn_id: str | None) -> rules.Place:
        """Return the place right after a committed turn.

        Raises:
            TurnNotFound: there is no such turn, or it was never committed.
        """
        if turn_id is None:
            return rules.Place(None, 0, None, self.root_state)
        turn = self.turns.get(turn_id)
        if turn is None or not turn.is_committed:
            raise TurnNotFound(session_id=self.session.key.session_id, turn_id=turn_id)
        return rules.Place(turn_id, turn.depth, self._note_at(turn_id), self.states[turn_id])

    def place_of(self, target: HeadTarget | None) -> rules.Place:
        """Return where ``target`` is as seen from the head; ``None`` is where the session is.

        Raises:
            TurnNotFound, CheckpointNotFound: the target is not there, or was never committed.
            InvalidInput: back by more turns than there are.
        """
        session = self.session
        if target is None:
            return rules.Place(session.head, session.depth, session.note, session.state)
        if isinstance(target, Back):
            rules.check_back(session, target.turns)
            path = [*(turn.turn_id for turn in self.up(session.head)), None]
            return self.place_at(path[target.turns])
        if isinstance(target, ToCheckpoint):
            named = self._get_named(target.checkpoint_id)
            return self.place_at(named.checkpoint.turn_id)._replace(state=named.state)
        return self.place_at(target.turn_id)

    def path_of(self, session: Session) -> Path:
        """Return the model context at ``session.head``, from the note ``session.note`` down.

        Raises:
            SnapshotUnreadable: the note is not there.
        """
        note = None
        if session.note is not None and (note := self.notes.get(session.note)) is None:
            raise SnapshotUnreadable(session_id=session.key.session_id)
        turns = []
        for turn in self.up(session.head):
            if note is not None and turn.turn_id == note.turn_id:
                break
            turns.append(turn)
        turns.reverse()
        messages = tuple(message for turn in turns for message in turn.messages)
        stored_bytes = sum(self.sizes[turn.turn_id] for turn in turns)
        if note is None:
            return Path(session.head, None, messages, stored_bytes)
        stored_bytes += len(note.summary.encode(errors="surrogatepass"))
        return Path(session.head, note.note_id, messages, stored_bytes, note.summary)

    def add_note(self, note: Note) -> None:
        """Keep the note; it is the session's if it is the newest on the path to the head."""
        self.notes[note.note_id] = self._noted[note.turn_id] = note
        self.session = replace(self.session, note=self._note_at(self.session.head))

    def find_note(self, turn_id: str | None) -> Note | None:
        """Return the newest note on the path to a turn."""
        if not self._noted:
            return None
        return next((self._noted[t.turn_id] for t in self.up(turn_id) if t.turn_id in self._noted), None)

    def _note_at(self, turn_id: str | None) -> str | None:
        note = self.find_note(turn_id)
        return None if note is None else note.note_id

    def copy_path(self, origin: "Record", place: rules.Place) -> None:
        """Make the path to ``place`` this session's only one, with its states and its notes."""
        self.root_state = origin.root_state
        for turn in origin.up(place.head):
            self.turns[turn.turn_id] = turn
            self.sizes[turn.turn_id] = origin.sizes[turn.turn_id]
            self.states[turn.turn_id] = origin.states[turn.turn_id]
        self.notes = {n.note_id: n for n in origin.notes.values() if n.turn_id in self.turns}
        self._noted = {turn_id: n for turn_id, n in origin._noted.items() if turn_id in self.turns}

    def load(self, dump: SessionDump) -> None:
        """Take in all that a dump has beside its session."""
        self.root_state = dump.root_state
        for dumped in dump.turns:
            self.put(dumped.turn)
            if dumped.state is not None:
                self.states[dumped.turn.turn_id] = dumped.state
        for note in dump.notes:
            self.notes[note.note_id] = self._noted[note.turn_id] = note
        for one in dump.checkpoints:
            self.checkpoints[one.checkpoint.checkpoint_id] = _Named(one.checkpoint, one.state)
        self.facts = list(dump.facts)
        if self.facts:
            self._last_fact = self.facts[-1].number, self.facts[-1].created_at

    def dump_checkpoints(self) -> tuple[CheckpointDump, ...]:
        """Return the checkpoints in the order of their ids."""
        ids = sorted(self.checkpoints)
        return tuple(CheckpointDump(self.checkpoints[i].checkpoint, self.checkpoints[i].state) for i in ids)

    def log(self, fact: Fact, time_ms: int) -> None:
        """Log a fact, its time being ``rules.fact_time``; with a limit only the newest stay."""
        number, previous = self._last_fact
        self._last_fact = number + 1, max(time_ms, previous)
        self.facts.append(LoggedFact(*self._last_fact, fact))
        if self.fact_limit:
            del self.facts[: -self.fact_limit]

    def entries(self, position: Position | None, *, newest_first: bool) -> list[Entry]:
        """Return what lies beyond ``position``, the nearest first."""
        story: list[Entry] = [*self.facts, *self.turns.values()]
        story.sort(key=position_of, reverse=newest_first)
        if position is None:
            return story
        if newest_first:
            return [entry for entry in story if position_of(entry) < position]
        return [entry for entry in story if position_of(entry) > position]

    def add_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """Name the head and the state as they are.

        Raises:
            InvalidInput: as many are named as may be.
        """
        known = self.checkpoints.get(checkpoint.checkpoint_id)
        if known is not None:
            return known.checkpoint
        if not checkpoint.automatic:
            rules.check_named(sum(not named.checkpoint.automatic for named in self.checkpoints.values()))
        named = _Named(replace(checkpoint, turn_id=self.session.head), self.session.state)
        self.checkpoints[checkpoint.checkpoint_id] = named
        return named.checkpoint

    def add_automatic(self, wanted: AutoCheckpoint, turn: Turn) -> None:
        """Name the head after its commit, and keep only the newest of such names."""
        self.add_checkpoint(rules.automatic_checkpoint(wanted, turn))
        automatic = [one.checkpoint_id for one in self.newest_checkpoints() if one.automatic]
        for checkpoint_id in automatic[wanted.keep :]:
            del self.checkpoints[checkpoint_id]

    def newest_checkpoints(self) -> list[Checkpoint]:
        return sorted((n.checkpoint for n in self.checkpoints.values()), key=checkpoint_order, reverse=True)

    def get_checkpoint(self, checkpoint_id: str) -> Checkpoint:
        return self._get_named(checkpoint_id).checkpoint

    def delete_checkpoints(self, checkpoint_id: str | None) -> int:
        """Forget one checkpoint, or all; return how many there were."""
        gone = [one for one in self.checkpoints if checkpoint_id in (None, one)]
        for one in gone:
            del self.checkpoints[one]
        return len(gone)

    def _get_named(self, checkpoint_id: str) -> _Named:
        named = self.checkpoints.get(checkpoint_id)
        if named is None:
            raise CheckpointNotFound(session_id=self.session.key.session_id)
        return named


def checkpoint_order(checkpoint: Checkpoint) -> tuple[int, str]:
    return checkpoint.created_at, checkpoint.checkpoint_id
