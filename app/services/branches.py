"""Checkpoints and branches: names for turns, moves of the head, copies that go their own way.

Nothing here rewrites a turn.
"""

from app.domain.branch import Back, HeadTarget, ToCheckpoint, ToTurn
from app.domain.chat import OnBusy
from app.domain.checkpoint import Checkpoint, CheckpointPage, check_data
from app.domain.errors import CheckpointNotFound
from app.domain.session import UNSET, Unset
from app.domain.turn import JsonObject
from app.services.session_base import SessionBase, SessionRef, SessionView


class SessionBranches(SessionBase):
    """The part of ``SessionManager`` that moves and names heads."""

    async def create_checkpoint(
        self,
        ref: SessionRef,
        *,
        label: str | None = None,
        data: JsonObject | None = None,
        user_id: str | None = None,
    ) -> Checkpoint:
        """Name the head and the state as they are now, with free ``data`` of up to 256 KiB.

        Raises:
            SessionNotFound
            InvalidInput: ``data`` is too large, or the session has as many checkpoints as it may.
        """
        session = await self._get(ref, user_id)
        checkpoint = Checkpoint(
            checkpoint_id=self._admission.new_id(),
            turn_id=session.head,
            label=label,
            data=check_data(data or {}),
            created_at=self._admission.clock.now_ms(),
        )
        return await self._store.add_checkpoint(session, checkpoint)

    async def list_checkpoints(
        self, ref: SessionRef, *, limit: int = 50, cursor: str | None = None, user_id: str | None = None
    ) -> CheckpointPage:
        """Return a page of checkpoints, newest first.

        Raises:
            SessionNotFound
            InvalidInput: ``cursor`` did not come from a page of this list.
        """
        return await self._store.list_checkpoints(await self._get(ref, user_id), limit, cursor)

    async def latest_checkpoint(self, ref: SessionRef, user_id: str | None = None) -> Checkpoint:
        """Return the newest checkpoint.

        Raises:
            SessionNotFound, CheckpointNotFound
        """
        session = await self._get(ref, user_id)
        page = await self._store.list_checkpoints(session, 1)
        if not page.checkpoints:
            raise CheckpointNotFound(session_id=session.key.session_id)
        return page.checkpoints[0]

    async def get_checkpoint(
        self, ref: SessionRef, checkpoint_id: str, user_id: str | None = None
    ) -> Checkpoint:
        """Return one checkpoint.

        Raises:
            SessionNotFound, CheckpointNotFound
        """
        return await self._store.get_checkpoint(await self._get(ref, user_id), checkpoint_id)

    async def delete_checkpoint(
        self, ref: SessionRef, checkpoint_id: str, user_id: str | None = None
    ) -> None:
        """Forget a checkpoint; its turn stays.

        Raises:
            SessionNotFound, CheckpointNotFound
        """
        session = await self._get(ref, user_id)
        if not await self._store.delete_checkpoints(session, checkpoint_id):
            raise CheckpointNotFound(session_id=session.key.session_id)

    async def clear_checkpoints(self, ref: SessionRef, user_id: str | None = None) -> int:
        """Forget all checkpoints of a session; return how many there were.

        Raises:
            SessionNotFound
        """
        return await self._store.delete_checkpoints(await self._get(ref, user_id))

    async def restore(
        self,
        ref: SessionRef,
        checkpoint_id: str,
        *,
        on_busy: OnBusy = OnBusy.QUEUE,
        expected_head: str | Unset | None = UNSET,
        user_id: str | None = None,
    ) -> SessionView:
        """Move the head to a checkpoint's turn and bring back its state; otherwise as ``rewind``.

        Raises:
            CheckpointNotFound, and what ``rewind`` raises.
        """
        return await self._move(ref, ToCheckpoint(checkpoint_id), on_busy, expected_head, user_id)

    async def rewind(
        self,
        ref: SessionRef,
        target: ToTurn | Back,
        *,
        on_busy: OnBusy = OnBusy.QUEUE,
        expected_head: str | Unset | None = UNSET,
        user_id: str | None = None,
    ) -> SessionView:
        """Move the head to a committed turn, or back by some, and bring back the state of then.

        A running turn is waited for, or cancelled, as ``on_busy`` says. ``expected_head``: the
        head that the session must have when it is moved.

        Raises:
            SessionNotFound, SessionArchived, SessionExpired, TurnNotFound
            InvalidInput: back by more turns than there are.
            HeadMoved: the head is not ``expected_head``.
            SessionBusy, TurnQueueFull, Draining: the session could not be had.
        """
        return await self._move(ref, target, on_busy, expected_head, user_id)

    async def fork(
        self,
        ref: SessionRef,
        target: HeadTarget | None = None,
        *,
        session_id: str | None = None,
        metadata: JsonObject | None = None,
        user_id: str | None = None,
    ) -> SessionView:
        """Make a session that goes on from ``target`` (``None``: the head); neither changes the other.

        Raises:
            SessionNotFound, SessionExists, SessionLimit, TurnNotFound, CheckpointNotFound
        """
        origin = await self._get(ref, user_id)
        return self._view(await self._admission.fork(origin, target, session_id, metadata))

    async def _move(
        self,
        ref: SessionRef,
        target: HeadTarget,
        on_busy: OnBusy,
        expected_head: str | Unset | None,
        user_id: str | None,
    ) -> SessionView:
        admission = self._admission
        session = await self._get(ref, user_id)  # before it waits: who may not see it waits for nothing
        async with self._holds.hold(session.key, on_busy):
            session = await admission.get(session.key, user_id)
            admission.require_open(session)
            admission.require_head(session, expected_head)
            moved = await self._store.move_head(session, target, admission.clock.now_ms())
        return self._view(moved)
