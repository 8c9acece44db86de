"""Which sessions this process has, where others use the same store, and what it asks the others.

A process that is alone has every session: ``Ownership()`` then costs nothing.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from app.domain.erasure import ErasureNotice
from app.domain.errors import (
    AgentPoolError,
    KeyTaken,
    LeasedElsewhere,
    NodeUnreachable,
    RunsElsewhere,
    SessionBusy,
    StoreUnavailable,
    TurnQueueFull,
)
from app.domain.ids import SessionKey
from app.domain.lease import Node
from app.domain.turn import CancelOrder, CancelReason, JsonObject
from app.ports import NewId, Nodes, SessionLeases

RENEWALS = 4
"""Renewals within a lease's duration: two may fail, and take their time."""
RETRY_S = 1.0
"""After a renewal that failed, where that is sooner."""
REAP_LIMIT = 200

NOBODY = Node("")

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Manners:
    """What to do while somebody else has a session: wait, or not, or end their turn for ``reason``."""

    may_wait: bool = True
    reason: CancelReason | None = None


def _ignore() -> None:
    pass


@dataclass(slots=True)
class _Held:
    """A lease. Until ``is_sure`` the store may not have been reached: it is given back, but not renewed."""

    on_lost: Callable[[], None]
    is_sure: bool = True


class Ownership:
    """The leases that this process holds. Every change of what it knows of them is a plain call.

    ``queue_wait_s``: how long a session is waited for that another process has.
    """

    def __init__(
        self,
        leases: SessionLeases | None = None,
        nodes: Nodes | None = None,
        *,
        here: Node = NOBODY,
        new_id: NewId | None = None,
        queue_wait_s: float = 30.0,
    ) -> None:
        self._leases = leases
        self._asks = nodes
        self.here = here
        self._new_id = new_id
        self._queue_wait_s = queue_wait_s
        self._held: dict[tuple[SessionKey, str], _Held] = {}

    @property
    def is_shared(self) -> bool:
        """Whether other processes may have sessions of the same store."""
        return self._leases is not None

    def keep(self, key: SessionKey, nonce: str, on_lost: Callable[[], None] = _ignore) -> None:
        """Renew the lease from now on, and call ``on_lost`` when that fails because others took it."""
        if self._leases is not None:
            self._held[key, nonce] = _Held(on_lost)

    def forget(self, key: SessionKey, nonce: str) -> None:
        """Do not renew it any more: the store has it back."""
        self._held.pop((key, nonce), None)

    def has(self, key: SessionKey, nonce: str) -> bool:
        return (key, nonce) in self._held

    async def take(self, key: SessionKey, nonce: str, on_lost: Callable[[], None] = _ignore) -> None:
        """Have the session under ``nonce``.

        Raises:
            LeasedElsewhere
        """
        if self._leases is None or self.has(key, nonce):
            return
        # First: what a cancelled call may have taken is given back.
        held = self._held[key, nonce] = _Held(on_lost, is_sure=False)
        try:
            await self._leases.take(key, nonce)
        except LeasedElsewhere:
            self.forget(key, nonce)
            raise
        held.is_sure = True

    async def give_back(self, key: SessionKey, nonce: str) -> None:
        """Give the session back if it is held; a store that does not answer lets it run out by itself."""
        if self._leases is None or self._held.pop((key, nonce), None) is None:
            return
        try:
            await self._leases.give_back(key, nonce)
        except StoreUnavailable as error:
            _log.warning("session %r stays leased for a while: %s", key.session_id, error)

    @asynccontextmanager
    async def hold(self, key: SessionKey, manners: Manners) -> AsyncIterator[None]:
        """Have the session to oneself.

        Raises:
            SessionBusy, TurnQueueFull: somebody else has it.
        """
        if self._leases is None or self._new_id is None:
            yield
            return
        nonce, patience = self._new_id(), Patience(self._queue_wait_s)
        try:
            while not self.has(key, nonce):
                try:
                    await self.take(key, nonce)
                except LeasedElsewhere as busy:
                    await self.wait_for(busy, key, manners, patience)
            yield
        finally:
            await self.give_back(key, nonce)

    def patience(self) -> "Patience":
        """Return for how long to wait for a session that another process has."""
        return Patience(self._queue_wait_s)

    async def wait_for(
        self, busy: LeasedElsewhere, key: SessionKey, manners: Manners, patience: "Patience"
    ) -> None:
        """Return when it may be had, having asked who has it first to end if ``manners`` says so.

        Whoever gets it next was in line before, and is left alone.

        Raises:
            SessionBusy: it is not to be waited for.
            TurnQueueFull: ``patience`` is over.
        """
        assert self._leases is not None
        holder = busy.holder
        if not manners.may_wait:
            raise SessionBusy(session_id=key.session_id, turn_id=holder.turn_id) from None
        if patience.left_s <= 0:
            raise TurnQueueFull(session_id=key.session_id, retry_after_s=1) from None
        if manners.reason is not None and not patience.has_interrupted:
            patience.has_interrupted = True
            keeps = manners.reason is CancelReason.INTERRUPT
            order = CancelOrder(manners.reason, keeps, turn_id=holder.turn_id)
            if holder.is_turn and self._is_other(holder.node):
                await self._ask([holder.node], lambda ask, node: ask.cancel(node, key, order))
        await self._leases.wait_free(key, patience.left_s)

    async def cancel(self, key: SessionKey, order: CancelOrder) -> tuple[str, ...]:
        """Ask the turns of the session on other nodes to end; return which were asked.

        Raises:
            NodeUnreachable: the node that has the session does not answer.
        """
        if self._leases is None:
            return ()
        holder = await self._leases.holder(key)
        if order.turn_id is None and not order.all:
            if holder is None or not holder.is_turn or not self._is_other(holder.node):
                return await self._cancel_first(key, order)
            order = replace(order, turn_id=holder.turn_id)  # those that wait for it are not meant
        asked = await self._ask(await self._others(), lambda ask, node: ask.cancel(node, key, order))
        wanted = holder is not None and holder.is_turn and order.turn_id in (None, holder.turn_id)
        if holder is not None and wanted and self._is_other(holder.node) and holder.node not in asked:
            raise NodeUnreachable(holder.node, session_id=key.session_id, turn_id=holder.turn_id)
        ended = [turn_id for turn_ids in asked.values() for turn_id in turn_ids]
        return tuple(sorted(ended, key=lambda turn_id: holder is None or turn_id != holder.turn_id))

    async def _cancel_first(self, key: SessionKey, order: CancelOrder) -> tuple[str, ...]:
        """End one turn of those that wait somewhere, while none runs elsewhere."""
        for node in await self._others():
            asked = await self._ask([node], lambda ask, node: ask.cancel(node, key, order))
            if turn_ids := asked.get(node):
                return turn_ids
        return ()

    async def cancel_holder(self, key: SessionKey, reason: CancelReason) -> None:
        """Ask the turn that has the session, if it is another node's, to end; without a promise."""
        if self._leases is None:
            return
        holder = await self._leases.holder(key)
        if holder is not None and holder.is_turn and self._is_other(holder.node):
            order = CancelOrder(reason, keep_partial=False, turn_id=holder.turn_id)
            await self._ask([holder.node], lambda ask, node: ask.cancel(node, key, order))

    async def forget_elsewhere(self, keys: Sequence[SessionKey], notice: ErasureNotice) -> None:
        """Tell other nodes of an erasure, to end the turns of these sessions and drop what is gone."""
        if self._leases is not None:
            await self._ask(await self._others(), lambda ask, node: ask.forget(node, keys, notice))

    async def locate(self, key: SessionKey, turn_id: str) -> Node | None:
        """Return the other node that has this turn in flight."""
        if self._leases is None:
            return None
        holder = await self._leases.holder(key)
        if holder is not None and holder.turn_id == turn_id:
            return holder.node if self._is_other(holder.node) else None
        found = await self._ask(await self._others(), lambda ask, node: ask.turns_of(node, key))
        return next((node for node, turn_ids in found.items() if turn_id in turn_ids), None)

    async def turns_elsewhere(self, key: SessionKey) -> tuple[str | None, tuple[str, ...]]:
        """Return the turn that another node runs, and the turns that wait on others."""
        if self._leases is None:
            return None, ()
        holder = await self._leases.holder(key)
        running = holder.turn_id if holder is not None and self._is_other(holder.node) else None
        found = await self._ask(await self._others(), lambda ask, node: ask.turns_of(node, key))
        turn_ids = (turn_id for turns in found.values() for turn_id in turns)
        return running, tuple(turn_id for turn_id in turn_ids if turn_id != running)

    async def nodes(self) -> tuple[Node, ...]:
        """Return the processes of the store, this one first."""
        return self.here, *(await self._others() if self._leases is not None else ())

    async def locate_live(self, key: SessionKey) -> Node | None:
        """Return another node on which the session has a live agent."""
        if self._leases is None:
            return None
        found = await self._ask(await self._others(), lambda ask, node: ask.has_live(node, key))
        return next((node for node, is_live in found.items() if is_live), None)

    async def stats_elsewhere(self) -> dict[Node, JsonObject]:
        """Return what each other node that answers says of its pool."""
        if self._leases is None:
            return {}
        return await self._ask(await self._others(), lambda ask, node: ask.stats_of(node))

    async def find_successor(self) -> Node | None:
        """Return the other node that was started last: the least likely to be about to end, too."""
        if self._leases is None:
            return None
        try:
            others = [node for node in await self._others() if node.url is not None]
        except StoreUnavailable:
            return None
        return max(others, key=lambda node: node.boot_id, default=None)  # ids are in order of time

    def referral(self, taken: KeyTaken) -> RunsElsewhere:
        """Return where to repeat a request whose key has a turn already: here, if that has ended."""
        node = self.here if taken.holder is None else taken.holder.node
        return RunsElsewhere(node, session_id=taken.session_id, turn_id=taken.turn_id)

    async def wait_gone(self, node: Node) -> None:
        """Return when the node does not announce itself any more, as far as the store can be asked."""
        assert self._leases is not None
        is_there = True
        while is_there:
            await asyncio.sleep(self._leases.duration_s / RENEWALS)
            try:
                is_there = node in await self._leases.nodes()
            except AgentPoolError:
                continue

    async def end_abandoned(self) -> None:
        """End the turns of processes that have died."""
        if self._leases is not None:
            await self._leases.reap(REAP_LIMIT)

    async def keep_for_ever(self) -> None:
        """Renew what is held and say that this process is there, again and again; ends what others left.

        A store that does not answer takes nothing away: the commit decides.
        """
        assert self._leases is not None
        loop = asyncio.get_running_loop()
        pause_s = self._leases.duration_s / RENEWALS
        while True:
            began = loop.time()
            steps = (self._renew, self._leases.announce, self.end_abandoned)
            is_well = all([await self._is_done(step) for step in steps])
            due = began + (pause_s if is_well else min(pause_s, RETRY_S))
            await asyncio.sleep(max(0.0, due - loop.time()))

    async def _is_done(self, step: Callable[[], Awaitable[None]]) -> bool:
        """Take the step, whatever became of the others; say whether it went well."""
        try:
            await step()
        except AgentPoolError as error:
            _log.warning("the leases could not be kept up now: %s", error)
        except Exception:
            _log.exception("keeping the leases up failed; the next time is in its turn")
        else:
            return True
        return False

    async def _renew(self) -> None:
        assert self._leases is not None
        held = {one: lease for one, lease in self._held.items() if lease.is_sure}
        for one, is_kept in zip(held, await self._leases.renew(list(held)), strict=True):
            # What was given back while this waited is not lost.
            if not is_kept and self._held.get(one) is held[one]:
                _log.warning("session %r was taken by another process", one[0].session_id)
                self._held.pop(one).on_lost()

    def _is_other(self, node: Node) -> bool:
        return node.boot_id != self.here.boot_id

    async def _others(self) -> list[Node]:
        assert self._leases is not None
        return [node for node in await self._leases.nodes() if self._is_other(node)]

    async def _ask(
        self, nodes: Iterable[Node], question: Callable[[Nodes, Node], Awaitable[T]]
    ) -> dict[Node, T]:
        """Ask all at once; return what those said that answered."""
        ask = self._asks
        if ask is None:
            return {}
        asked = list(nodes)
        answers = await asyncio.gather(*(question(ask, node) for node in asked), return_exceptions=True)
        said: dict[Node, T] = {}
        for node, answer in zip(asked, answers, strict=True):
            if isinstance(answer, NodeUnreachable):
                _log.warning("node %s does not answer", node.url)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                said[node] = answer
        return said


class Patience:
    """How long is left of a wait that began when this was made, and whether it has ended a turn for that."""

    __slots__ = ("_until", "has_interrupted")

    def __init__(self, limit_s: float) -> None:
        self.has_interrupted = False
        self._until = asyncio.get_running_loop().time() + limit_s

    @property
    def left_s(self) -> float:
        return self._until - asyncio.get_running_loop().time()
