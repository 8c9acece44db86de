"""What keeps the sessions."""

from collections.abc import Sequence
from typing import Protocol

from app.domain.branch import HeadTarget
from app.domain.checkpoint import AutoCheckpoint, Checkpoint, CheckpointPage
from app.domain.compaction import Note
from app.domain.erasure import Erased
from app.domain.errors import SessionExists, SessionLimit
from app.domain.ids import SessionKey
from app.domain.journal import Entry, Position
from app.domain.session import Path, Session, SessionCap, SessionChange, SessionPage, SessionQuery
from app.domain.state import SharedState, StateScope
from app.domain.stats import SessionStats, UserUsage
from app.domain.turn import BoundTurn, JsonObject, Turn, TurnPage, Usage
from app.ports.leases import SessionLeases


class SessionStore(Protocol):
    """Where sessions live. No opinions: it never trims, merges or summarises.

    A store is made with the ``LifeSpan`` that its sessions have. What concerns a session whose
    record, or what it needs of it, is broken raises ``SnapshotUnreadable``.
    Every method may raise ``StoreUnavailable``; with ``outcome_unknown`` the
    write may or may not have happened, and repeating it is safe.
    A returned write is durable as far as the store can be.
    """

    @property
    def leases(self) -> SessionLeases | None:
        """Who has which session; ``None`` if no other process can have the store open."""

    async def open(self, boot_id: str, node_url: str | None = None) -> None:
        """Open, migrate, and turn start records of dead boots into failed turns (``INTERRUPTED``).

        A boot is dead when another one opens the store; where there are leases, when they have
        run out. ``node_url`` is where other processes reach this one.

        Raises:
            StoreLocked: another process has it.
        """

    async def close(self) -> None:
        """Finish every accepted write, then close. May be called twice."""

    async def ping(self) -> None:
        """Return when the store answers."""

    def session_count_nowait(self) -> int | None:
        """Return how many sessions are stored and not purged, ``None`` when unknown."""

    async def create_session(self, session: Session) -> None:
        """Store a new session.

        Raises:
            SessionExists: its key is taken.
        """

    async def ensure_session(self, session: Session) -> Session:
        """Return the session that is stored under this key; if there is none, store this one."""

    async def create_sessions(
        self, sessions: Sequence[Session], cap: SessionCap | None = None
    ) -> tuple[SessionExists | SessionLimit | None, ...]:
        """Store new sessions in one step, one after the other; return for each why it was refused.

        With ``cap`` a session of a user who has as many already takes the places of victims,
        or is refused. A refused one changes nothing.
        """

    async def list_oldest(self, owner: str, user_id: str, limit: int) -> tuple[Session, ...]:
        """Return the user's sessions, oldest activity first, up to ``limit`` of them."""

    async def find_session(self, key: SessionKey) -> Session | None: ...

    def recall_session(self, key: SessionKey) -> Session | None:
        """Return what this process saw of the session last, which may be old; ``None`` if not known.

        Costs nothing. A store whose ``find_session`` costs next to nothing knows none.
        """

    async def list_sessions(self, query: SessionQuery) -> SessionPage:
        """Return one page.

        Raises:
            InvalidInput: the cursor is not one of this store's.
        """

    async def update_session(
        self, key: SessionKey, change: SessionChange, now: int, *, expected_etag: str | None = None
    ) -> Session:
        """Apply ``change`` to the record in one step and return the result.

        Raises:
            SessionNotFound, PreconditionFailed
        """

    async def patch_state(
        self, key: SessionKey, patch: JsonObject, now: int, *, expected_rev: int | None = None
    ) -> Session:
        """Merge ``patch`` (RFC 7396) into the session's state in one step, log it, return the result.

        The revision grows. ``expected_rev`` is the ``state_rev`` that the session must have.

        Raises:
            SessionNotFound, PreconditionFailed
            InvalidInput: the state would be larger than it may be.
        """

    async def get_shared(self, scope: StateScope) -> SharedState:
        """Return the state of a user or an application; one that was never set is empty.

        Raises:
            SnapshotUnreadable: it is broken.
        """

    async def patch_shared(
        self, scope: StateScope, patch: JsonObject, now: int, *, expected_rev: int | None = None
    ) -> SharedState:
        """Merge ``patch`` (RFC 7396) into it in one step and return the result.

        Raises:
            PreconditionFailed: its revision is not ``expected_rev``.
            InvalidInput: the state would be larger than it may be.
            SnapshotUnreadable: what is stored is broken.
        """

    async def list_scopes(self, owner: str, user_id: str) -> tuple[StateScope, ...]:
        """Return where the user has state, ascending. May look at all that is stored: it is for rare use."""

    async def forget_user(self, owner: str, user_id: str) -> Erased:
        """Remove the user's states and usage; their sessions must be gone. Repeating is harmless.

        What was stored of the user, and of sessions deleted before, is then in no file of the store's, as
        far as it can see to that: SQLite's hold no byte of it, PostgreSQL's and Redis' until they are
        vacuumed, or rewritten.
        """

    async def touch_session(self, key: SessionKey, now: int) -> Session:
        """Count activity at ``now``: the expiry clock starts again, also of an expired session.

        The revision stays. Returns the session as it is then.

        Raises:
            SessionNotFound
        """

    async def delete_session(self, key: SessionKey) -> bool:
        """Remove the session and everything that belongs to it; say whether it was there."""

    async def delete_sessions(self, keys: Sequence[SessionKey]) -> Erased:
        """Remove these sessions as ``delete_session`` does, in one step; return what was there."""

    async def list_keys(
        self, owner: str | None, *, user_id: str | None = None, agent_id: str | None = None, limit: int
    ) -> tuple[SessionKey, ...]:
        """Return up to ``limit`` sessions of the user or the agent, in no order, unreadable ones too.

        ``owner`` ``None``: those of all owners.
        """

    async def load_path(self, session: Session) -> Path:
        """Return the model context at ``session.head``, from the note ``session.note`` down.

        Raises:
            SnapshotUnreadable: a stored turn on the path, or the note, is broken.
            SessionNotFound: this incarnation was deleted.
        """

    async def at_turn(self, session: Session, turn_id: str | None) -> Session:
        """Return ``session`` as it would be with its head at that committed turn (``None``: the root).

        Head, note, depth and state are those of that place, nothing is written. What the state
        was is what it was when that turn was committed; at the root, when the session was made.

        Raises:
            TurnNotFound: there is no such turn, or it was never committed.
        """

    async def move_head(self, session: Session, target: HeadTarget, now: int) -> Session:
        """Move the head from ``session.head``, bring back the state of that place, and log it, in one step.

        That is activity. Writes the same however long the session is. Returns the session as it is then.

        Raises:
            SessionNotFound
            HeadMoved: the head is not ``session.head`` any more.
            TurnNotFound, CheckpointNotFound: the target is not there, or was never committed.
            InvalidInput: back by more turns than there are.
        """

    async def fork_session(
        self, origin: Session, target: HeadTarget | None, new: Session, cap: SessionCap | None = None
    ) -> Session:
        """Store ``new`` with a copy of the path to ``target`` (``None``: the head), in one step.

        The copied turns keep their ids; ``new`` gets head, depth, note and state of that place, and
        its root the state of the origin's. Nothing else is copied, no key, and nothing is counted.
        Returns the new session.

        Raises:
            SessionNotFound: the origin is gone.
            SessionExists, SessionLimit: as ``create_sessions``.
            TurnNotFound, CheckpointNotFound, InvalidInput: as ``move_head``.
            SnapshotUnreadable: a turn on the path is broken.
        """

    async def add_checkpoint(self, session: Session, checkpoint: Checkpoint) -> Checkpoint:
        """Store a name for the head and the state as they are in this step; return it with its ``turn_id``.

        Raises:
            SessionNotFound
            InvalidInput: the session has ``NAMED_MAX`` checkpoints that are not automatic.
        """

    async def list_checkpoints(
        self, session: Session, limit: int, cursor: str | None = None
    ) -> CheckpointPage:
        """Return a page, newest first."""

    async def get_checkpoint(self, session: Session, checkpoint_id: str) -> Checkpoint:
        """Return one checkpoint.

        Raises:
            CheckpointNotFound, SnapshotUnreadable
        """

    async def delete_checkpoints(self, session: Session, checkpoint_id: str | None = None) -> int:
        """Remove one checkpoint, or all; return how many there were. No turn is touched."""

    async def add_note(self, session: Session, note: Note, usage: Usage) -> Session:
        """Store a compaction note, count ``usage`` as its user's, log it; return the session as it is then.

        It becomes the session's note if it is the newest one on the path to the head.

        Raises:
            SessionNotFound
            TurnNotFound: its turn is not there, or was never committed.
        """

    async def get_note(self, session: Session) -> Note | None:
        """Return the newest note on the path to ``session.head``.

        Raises:
            SnapshotUnreadable: it is broken.
        """

    async def list_notes(self, session: Session) -> tuple[Note, ...]:
        """Return every note of the session, on whatever path, the oldest first.

        Raises:
            SnapshotUnreadable: one is broken.
        """

    async def list_entries(
        self, session: Session, position: Position | None, limit: int, *, newest_first: bool
    ) -> tuple[Entry, ...]:
        """Return up to ``limit`` turns and logged facts beyond ``position``, the nearest first.

        That is ascending from ``position``, or descending with ``newest_first``; ``None`` is before
        the first, or behind the last. Running turns are listed, too. A turn that cannot be read is
        listed as failed, ``SNAPSHOT_UNREADABLE``; a fact that cannot is left out.
        """

    async def start_turn(self, session: Session, turn: Turn) -> Session | None:
        """Note that ``turn`` runs, and count it as activity of the session. Binds ``turn.binding``.

        Without leases a store may queue this and return: a lost start record loses nothing but
        the trace of a turn that a crash interrupted.

        Where there are leases, the session's is taken for the turn in the same step and round
        trip. If the session is not as ``session`` says any more (head, note, ``rev``, ``state_rev``),
        it is returned as it is, with the lease taken but nothing noted; else ``None``.

        Raises, where there are leases:
            LeasedElsewhere: somebody else has the session.
            KeyTaken: another turn has the idempotency key, and is running or committed.
            SessionNotFound: this incarnation was deleted.
            HeadMoved: the turn has been ended by others already.
        """

    async def commit_turn(
        self,
        session: Session,
        turn: Turn,
        *,
        resets_state: bool = False,
        checkpoint: AutoCheckpoint | None = None,
    ) -> Session:
        """Store ``turn``, its ``binding`` with it, and move the head from ``session.head``, in one step.

        The turn continues ``turn.parent``, which may be another one than the head. With
        ``resets_state`` the state of that place comes back; else the session's stays as it is. It is
        stored with the turn. ``checkpoint`` is made in the same step.
        Repeating a commit that has happened returns the same result. Returns the
        session as it is then. The turn's lease, if there are leases, is given back, too; that it
        has run out does not matter as long as nobody has taken the session or ended the turn.

        Raises:
            HeadMoved: the head is not ``session.head``, or the turn was recorded as failed.
            SessionNotFound: this incarnation (``session.uid``) was deleted.
        """

    async def record_turn(self, session: Session, turn: Turn) -> None:
        """Store a failed or dropped turn beside the tree and release its key; the head stays.

        Repeating is harmless. Does nothing if the session is gone or the turn has been committed.
        The turn's lease, if there are leases, is given back.
        """

    async def find_bound(self, owner: str, key: str) -> BoundTurn | None:
        """Return the committed turn that holds this idempotency key, ``None`` if none does.

        Raises:
            KeyTaken: where there are leases, a turn that runs holds it.
        """

    async def get_turn(self, session: Session, turn_id: str) -> Turn:
        """Return one turn, ``on_branch`` set.

        Raises:
            TurnNotFound, SnapshotUnreadable
        """

    async def list_turns(self, session: Session, limit: int, cursor: str | None = None) -> TurnPage:
        """Return a page of all turns, newest first, ``on_branch`` set.

        A turn that cannot be read is listed as failed, ``SNAPSHOT_UNREADABLE``.
        """

    async def list_branch(self, session: Session, limit: int, before: str | None = None) -> tuple[Turn, ...]:
        """Return the newest ``limit`` turns of the current branch, or of those before ``before``, ascending.

        Raises:
            TurnNotFound: ``before`` is not on the current branch.
        """

    async def get_usage(self, owner: str, user_id: str, limit: int) -> UserUsage:
        """Return what the user's ended turns took, with the newest ``limit`` days; zeros if none ended."""

    async def get_session_stats(self) -> SessionStats:
        """Return the counters, at a cost that does not depend on how many sessions there are."""

    async def expire_and_purge(self, now: int, limit: int) -> tuple[int, int]:
        """Bring the statistics' statuses up to ``now`` and remove up to ``limit`` sessions that are due.

        Those whose retention is over go, with all that belongs to them, in an own step each
        or together, but none by half. The cost does not depend on how many others there are.
        Returns (sessions that have expired since the last call, sessions removed).
        """
