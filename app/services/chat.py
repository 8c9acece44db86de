"""Chat: accept a turn, watch it, cancel it. What happens in between is the conductor's."""

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from app.domain.branch import ROOT
from app.domain.catalog import AgentProfile, ModelOffer
from app.domain.chat import (
    ChatReply,
    ChatRequest,
    OnBusy,
    OnDisconnect,
    PastTurn,
    RegenerateRequest,
)
from app.domain.compaction import Note
from app.domain.errors import (
    AgentNotFound,
    AgentPoolError,
    Draining,
    IdempotencyMismatch,
    InvalidInput,
    KeyTaken,
    SessionArchived,
    SessionExpired,
    SessionNotFound,
    TurnCancelled,
    TurnNotFound,
    UnknownModel,
)
from app.domain.events import TurnEvent, TurnFailed, TurnFinished
from app.domain.idempotency import Binding
from app.domain.ids import SessionKey, parse_session_id
from app.domain.replay import replay
from app.domain.session import TITLE_FROM_MESSAGE_CHARS, Session
from app.domain.turn import TurnError
from app.pool.manager import AgentManager
from app.ports import AgentFactory, NewId, SessionStore
from app.services.admission import Admission, NewSession
from app.services.compaction import Compactor
from app.services.conductor import Conductor
from app.services.departure import Departure
from app.services.holds import INTERRUPTS, Holds
from app.services.ownership import Ownership
from app.services.turns import Flight, Turns, user_of
from app.services.watching import TurnWatching


class TurnFailure(AgentPoolError):
    """A turn that started and failed, as an error with the code it failed with."""

    def __init__(self, error: TurnError, flight: Flight) -> None:
        super().__init__(
            error.detail,
            session_id=flight.key.session_id,
            turn_id=flight.turn_id,
            retry_after_s=error.retry_after_s,
        )
        self.code = error.code  # type: ignore[misc]  # of this instance: that of its cause
        self._outcome_unknown = error.outcome_unknown

    @property
    def extra(self) -> dict[str, Any]:
        return {"outcome": "unknown"} if self._outcome_unknown else {}


class ChatService(TurnWatching):
    """Holds conversations: ``chat`` and ``stream`` for a program, the rest for faces."""

    def __init__(
        self,
        store: SessionStore,
        factory: AgentFactory,
        admission: Admission,
        pool: AgentManager,
        turns: Turns,
        conductor: Conductor,
        compactor: Compactor,
        new_id: NewId,
        ownership: Ownership | None = None,
        *,
        auto_create: bool = True,
    ) -> None:
        super().__init__(store, admission, pool, turns, ownership or Ownership())
        self._factory = factory
        self._conductor = conductor
        self._holds = Holds(pool, turns, self._ownership)
        self._compactor = compactor
        self._new_id = new_id
        self._auto_create = auto_create

    async def chat(self, session_id: str | None, message: str, **choices: Any) -> ChatReply:
        """Carry out one turn and return its answer; ``choices`` are those of ``ChatRequest``.

        Cancelling the call does not cancel the turn, unless it still waits for its session.

        Raises:
            AgentPoolError: refused or failed; ``code`` says how, and the session is as before.
        """
        flight = await self.begin(ChatRequest(session_id=session_id, message=message, **choices))
        if isinstance(flight, Flight):
            try:
                await flight.wait_ended()
            finally:
                flight.leave()
        return self.reply_of(flight)

    async def stream(self, session_id: str | None, message: str, **choices: Any) -> AsyncIterator[TurnEvent]:
        """Carry out one turn and yield its events, the terminal one last.

        Closing the iterator does not cancel the turn, unless it still waits for its session.

        Raises:
            AgentPoolError: the turn was refused before it started.
        """
        flight = await self.begin(ChatRequest(session_id=session_id, message=message, **choices))
        if isinstance(flight, PastTurn):
            for _, event in replay(flight.turn, flight.session_id):
                yield event
            return
        position = 0
        try:
            await flight.wait_started()
            while position < len(flight.log.events) or not flight.log.is_closed:
                await flight.log.wait_beyond(position)
                for event in flight.log.events[position:]:
                    position += 1
                    yield event
        finally:
            flight.leave()

    async def begin(self, request: ChatRequest) -> Flight | PastTurn:
        """Accept a turn, creating its session if need be, and return it as it sets out.

        With an idempotency key, the turn that the first such request made is returned: in
        flight, or as it is stored. The caller watches the flight until ``Flight.leave``.

        Raises:
            InvalidInput, SessionNotFound, SessionArchived, SessionExpired, AgentNotFound,
            UnknownModel, Draining, StoreUnavailable: refused, and no turn was accepted.
            RateLimited: likewise, since the session's user has as much as allowed.
            IdempotencyMismatch: the key was used for another request.
        """
        return await self._begin(request.binding, partial(self._accept_chat, request))

    async def begin_again(self, request: RegenerateRequest) -> Flight | PastTurn:
        """Accept a turn that answers the head turn's input once more; otherwise as ``begin``.

        It becomes the head, beside that turn, which stays as it is; so does the session's state.
        A session without a turn refuses it with ``TurnNotFound`` when it starts.
        """
        return await self._begin(request.binding, partial(self._accept_again, request))

    async def compact(
        self, key: SessionKey, *, on_busy: OnBusy = OnBusy.QUEUE, user_id: str | None = None
    ) -> Note:
        """Have the model sum up the conversation so far, and send it the summary from then on.

        History, head and counts stay as they are. Turns of the session wait meanwhile.

        Raises:
            SessionNotFound
            TurnNotFound: there is no turn yet.
            SessionBusy, TurnQueueFull, Draining: the session could not be had.
            RateLimited: its user has as much as allowed.
            ModelUnavailable, ModelRateLimited, ModelError, TurnTimeout: no summary; nothing has changed.
        """
        user = user_of(await self._admission.get(key, user_id))
        quota = self._turns.quota
        quota.admit(user, await quota.learn(user))
        try:
            async with self._holds.hold(key, on_busy):
                await self._compactor.wait(key)
                return await self._compactor.compact(await self._admission.get(key, user_id))
        finally:
            quota.release(user)
            quota.forget(user)

    def reply_of(self, ended: Flight | PastTurn) -> ChatReply:
        """Return the answer of a turn that has ended.

        Raises:
            AgentPoolError: it did not finish; ``code`` says how.
        """
        turn = ended.turn
        terminal: TurnEvent | None
        if isinstance(ended, Flight):
            session_id, terminal = ended.key.session_id, ended.log.terminal
        else:
            session_id, terminal = ended.session_id, replay(ended.turn, ended.session_id)[-1][1]
        if isinstance(terminal, TurnFailed) and isinstance(ended, Flight):
            raise TurnFailure(terminal.error, ended)
        if turn is None or not isinstance(terminal, TurnFinished):
            raise TurnCancelled(session_id=session_id, turn_id=turn.turn_id if turn is not None else None)
        return ChatReply(
            session_id=session_id,
            turn_id=turn.turn_id,
            head=terminal.head,
            reply=terminal.reply,
            finish_reason=terminal.finish_reason,
            provider=turn.provider,
            model=turn.model,
            agent_id=turn.agent_id,
            usage=terminal.usage,
            message_count=terminal.message_count,
            turn_count=terminal.turn_count,
            activation=turn.activation,
            queued_ms=terminal.queued_ms,
            duration_ms=terminal.duration_ms,
            created_at=turn.started_at,
        )

    def agents(self) -> tuple[AgentProfile, ...]:
        """Return the profiles that ``agent_id`` may name."""
        return self._factory.profiles()

    def models(self) -> tuple[ModelOffer, ...]:
        """Return what ``provider`` and ``model`` may name."""
        return self._factory.offers()

    async def _find_flight(self, binding: Binding) -> Flight | None:
        """Return the turn in flight that the key made, ``None`` once nobody has it."""
        while (claim := self._turns.find_claim(binding)) is not None:
            flight = await claim.wait()
            if flight is None:
                continue  # refused before acceptance, so it has bound nothing
            if flight.is_lost:
                await flight.log.wait_closed()  # its key is free in the same step
                continue
            if claim.binding.fingerprint != binding.fingerprint:
                raise IdempotencyMismatch(session_id=flight.key.session_id, turn_id=flight.turn_id)
            return flight
        return None

    async def _find_past(self, binding: Binding) -> PastTurn | None:
        try:
            bound = await self._store.find_bound(binding.owner, binding.key)
        except KeyTaken as taken:
            raise self._ownership.referral(taken) from None
        if bound is None:
            return None
        if bound.fingerprint != binding.fingerprint:
            raise IdempotencyMismatch(session_id=bound.session_id, turn_id=bound.turn.turn_id)
        return PastTurn(bound.session_id, bound.turn)

    async def _begin(
        self, binding: Binding | None, accept: Callable[[Binding | None], Awaitable[Flight]]
    ) -> Flight | PastTurn:
        """Return the turn that the key made, or a new one that ``accept`` sends on its way."""
        if binding is None:
            return await accept(None)
        flight = await self._find_flight(binding)
        if flight is not None:
            flight.join()
            return flight
        claim = self._turns.claim(binding)  # no await since nobody had it
        try:
            past = await self._find_past(binding)
            if past is not None:
                return past
            flight = await accept(binding)
            claim.decide(flight)
            return flight
        finally:
            if claim.flight is None:
                self._turns.release(claim)

    async def _accept_chat(self, request: ChatRequest, binding: Binding | None) -> Flight:
        """Accept the turn in the session as this process saw it last, unless that would refuse it."""
        accept = partial(
            self._accept, request=request, binding=binding, message=request.message, parent=request.parent
        )
        known = self._recall(request)
        if known is not None:
            try:
                return await accept(known, seek=partial(self._find_or_create, request))
            except (SessionNotFound, SessionArchived, SessionExpired, AgentNotFound, UnknownModel):
                pass
        if request.user_id is not None:  # a turn that will be refused is to leave no empty session behind
            user = (request.owner, request.user_id)
            self._turns.quota.check(user, await self._turns.quota.learn(user))
        return await accept(await self._find_or_create(request))

    def _recall(self, request: ChatRequest) -> Session | None:
        if request.session_id is None:
            return None
        key = SessionKey(request.owner, parse_session_id(request.session_id))
        known = self._store.recall_session(key)
        is_another = known is not None and request.user_id not in (None, known.user_id)
        return None if is_another else known

    async def _accept_again(self, request: RegenerateRequest, binding: Binding | None) -> Flight:
        session = await self._admission.get(SessionKey(request.owner, request.session_id), request.user_id)
        return await self._accept(session, request, binding, message=None, parent=None)

    async def _accept(
        self,
        session: Session,
        request: ChatRequest | RegenerateRequest,
        binding: Binding | None,
        *,
        message: str | None,
        parent: str | None,
        seek: Callable[[], Awaitable[Session]] | None = None,
    ) -> Flight:
        choices = request.choices
        self._admission.require_open(session)
        self._admission.check(
            session, agent_id=request.agent_id, provider=request.provider, model=request.model
        )
        session = await self._admission.leave_what_is_gone(session, choices)
        spent = await self._turns.quota.learn(user_of(session))
        flight = self._turns.accept(
            self._new_id(),
            session,
            ends_unwatched=request.on_disconnect is OnDisconnect.CANCEL,
            spent=spent,
        )
        flight.join()
        departure = Departure(
            message=message,
            choices=choices,
            parent=parent,
            user=session.user_id,
            may_wait=request.on_busy is not OnBusy.REJECT,
            interrupts=INTERRUPTS.get(request.on_busy),
            expected_head=request.expected_head,
            binding=binding,
            seek=seek,
        )
        self._conductor.depart(flight, departure)
        return flight

    async def _find_or_create(self, request: ChatRequest) -> Session:
        key = None
        if request.session_id is not None:
            key = SessionKey(request.owner, parse_session_id(request.session_id))
        is_draining = self._pool.stats().draining  # a turn will be refused: leave no empty session behind
        if self._auto_create and request.parent in (None, ROOT) and not is_draining:
            try:
                return await self._admission.ensure(_new_session(request), request.user_id)
            except (AgentNotFound, UnknownModel, InvalidInput):
                pass  # the session may be there all the same, and of another agent
        if key is not None:
            session = await self._admission.find(key, request.user_id)
            if session is not None:
                return session
            if not self._auto_create:
                raise SessionNotFound(session_id=request.session_id)
        if request.parent not in (None, ROOT):
            raise TurnNotFound(session_id=request.session_id)
        if is_draining:
            raise Draining(session_id=request.session_id, retry_after_s=1)
        return await self._admission.create(_new_session(request))


def _new_session(request: ChatRequest) -> NewSession:
    return NewSession(
        owner=request.owner,
        session_id=request.session_id,
        user_id=request.user_id,
        window_id=request.window_id,
        agent_id=request.agent_id,
        app_name=request.app_name,
        title=request.message[:TITLE_FROM_MESSAGE_CHARS],
        metadata=request.metadata,
        provider=request.provider,
        model=request.model,
        params=request.params or {},
    )
