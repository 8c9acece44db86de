"""What clients asked for and were told in a simulated world, and what must follow from it."""

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from app.domain.chat import ChatReply, ChatRequest, OnBusy, PastTurn, RegenerateRequest
from app.domain.errors import AgentPoolError, HeadMoved, SessionNotFound
from app.domain.events import (
    MessageCompleted,
    TerminalEvent,
    TextDelta,
    TurnCancelled,
    TurnFailed,
    TurnFinished,
    TurnStarted,
)
from app.domain.ids import SessionKey
from app.domain.turn import CancelReason, Turn, TurnStatus
from app.pool.slot import TicketKind
from app.services.turns import Flight, FlightState
from app.stores.memory.store import MemoryStore
from tests.simulation.checked import Entry

INTERRUPTS = {OnBusy.INTERRUPT: CancelReason.INTERRUPT, OnBusy.ROLLBACK: CancelReason.ROLLBACK}
DROPPED = {CancelReason.ROLLBACK, CancelReason.DELETED, CancelReason.ADMIN}


@dataclass
class Outcome:
    """One turn, the request that made it, and what its clients were told."""

    flight: Flight
    request: ChatRequest | RegenerateRequest
    terminal: TerminalEvent | None = None
    refusal: AgentPoolError | None = None
    has_run: bool = False
    reply: ChatReply | None = None

    @property
    def is_kept(self) -> bool | None:
        """Whether the turn must be in the tree, ``None`` if the client was told that this is unknown."""
        if isinstance(self.terminal, TurnFailed) and self.terminal.error.outcome_unknown:
            return None
        if isinstance(self.terminal, TurnCancelled):
            return self.terminal.partial_kept
        return isinstance(self.terminal, TurnFinished)


@dataclass
class Book:
    """``deleted`` are the incarnations of sessions that are gone; ``by_key`` the turns of one key.

    ``copied`` are the turns with which a fork began, by its incarnation.
    """

    store: MemoryStore
    deleted: set[str]
    copied: dict[str, set[str]]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    by_key: dict[str, list[Outcome]] = field(default_factory=lambda: defaultdict(list))
    interrupted: dict[str, set[CancelReason]] = field(default_factory=lambda: defaultdict(set))
    holds: dict[SessionKey, set[CancelReason]] = field(default_factory=lambda: defaultdict(set))

    # -- while the world goes on

    def may_interrupt(self, key: SessionKey, on_busy: OnBusy) -> None:
        """Note that somebody wants the session for himself and may cancel its turn for that."""
        if on_busy in INTERRUPTS:
            self.holds[key].add(INTERRUPTS[on_busy])

    def began(self, flight: Flight, request: ChatRequest | RegenerateRequest) -> Outcome | None:
        """Note the turn that a request got; return it if it is a new one."""
        if (known := self.outcomes.get(flight.turn_id)) is not None:
            assert request.idempotency_key is not None, "one turn for two requests"
            assert known.request.idempotency_key == request.idempotency_key
            assert known.request.binding == request.binding, "another request's turn"
            return None
        outcome = self.outcomes[flight.turn_id] = Outcome(flight, request)
        if request.idempotency_key is not None:
            self.by_key[request.idempotency_key].append(outcome)
        return outcome

    def was_past(self, past: PastTurn, request: ChatRequest | RegenerateRequest) -> None:
        known = self.outcomes[past.turn.turn_id]
        assert known.request.idempotency_key == request.idempotency_key
        assert past.turn.is_committed, "a turn without trace was answered again"
        assert past.turn.input == known.flight.turn.input
        assert past.session_id == known.flight.key.session_id

    def mismatched(self, request: ChatRequest) -> None:
        others = self.by_key[request.idempotency_key or ""]
        assert any(other.request.message != request.message for other in others), "the same request"

    def answered(self, reply: ChatReply) -> None:
        """Every answer of one turn is the same."""
        outcome = self.outcomes[reply.turn_id]
        assert outcome.reply in (None, reply)
        outcome.reply = reply

    def entered(self, entry: Entry) -> None:
        """An interrupter is next, and whose turn runs has been told, or is being stored."""
        outcome = self.outcomes.get(entry.ticket.turn_id or "")
        reason = INTERRUPTS.get(outcome.request.on_busy) if outcome is not None else None
        if reason is None:
            return
        assert entry.is_front != entry.is_hold_next, "an interrupter at the back, or before a delete"
        if entry.owner is None or entry.owner.kind is TicketKind.HOLD:
            return
        other = self.outcomes[entry.owner.turn_id or ""].flight
        has_won = other.state in (FlightState.COMMITTING, FlightState.ENDED)
        assert has_won or other.cancel_reason is not None, f"{other.turn_id} was not interrupted"
        self.interrupted[other.turn_id].add(reason)

    def body_begins(self, flight: Flight) -> None:
        """The model is asked once per turn, and again for a key only if what was before left no trace."""
        outcome = self.outcomes[flight.turn_id]
        assert not outcome.has_run, "one turn ran twice"
        outcome.has_run = True
        key = outcome.request.idempotency_key
        for other in self.by_key[key] if key is not None else ():
            if other is not outcome:
                assert other.flight.state is FlightState.ENDED, "two turns of one key at once"
                assert not self._is_committed(other), "a committed turn was run again"

    # -- when a turn has ended

    def check_end(self, outcome: Outcome) -> None:
        """In the moment in which the end is told, the store is as it says."""
        flight = outcome.flight
        _check_log(outcome)
        self._check_reason(outcome)
        turn = self.find(flight)
        must = outcome.is_kept
        if must is not None and flight.uid not in self.deleted:
            is_committed = turn is not None and turn.is_committed
            assert is_committed == must, f"told {outcome.terminal or outcome.refusal}, stored {turn}"

    def _check_reason(self, outcome: Outcome) -> None:
        flight, terminal = outcome.flight, outcome.terminal
        reason = flight.cancel_reason
        if reason in INTERRUPTS.values():
            reasons = self.interrupted[flight.turn_id] | self.holds[flight.key]
            assert reason in reasons, "interrupted by nobody"
        if isinstance(terminal, TurnFailed):
            assert terminal.error.code != HeadMoved.code, "its head was moved while it had the session"
        if reason is CancelReason.DISCONNECT and terminal is not None:
            assert flight.ends_unwatched, "its client left, and it was to go on"
        if isinstance(terminal, TurnCancelled):
            assert terminal.reason is reason
            assert not (terminal.partial_kept and reason in DROPPED), f"{reason} kept something"
        if reason is CancelReason.DELETED and outcome.refusal is not None:
            assert isinstance(outcome.refusal, SessionNotFound)

    # -- when all is over

    def check_history(self) -> None:
        for record in self.store._records.values():
            self._check_tree(record)
        present = {record.session.uid for record in self.store._records.values()}
        for outcome in self.outcomes.values():
            assert outcome.flight._watchers == 0, f"{outcome.flight.turn_id} has lost count of its watchers"
            if outcome.is_kept:
                assert outcome.flight.uid in present | self.deleted, "a session is lost"
        for key, outcomes in self.by_key.items():
            committed = [o.flight.turn_id for o in outcomes if self._is_committed(o)]
            assert len(committed) <= 1, f"{committed} were committed with {key}"

    def _check_tree(self, record: Any) -> None:
        uid, path = record.session.uid, path_of(record, record.session.head)
        assert record.session.depth == len(path)
        finished = [turn.finished_at for turn in path]
        assert finished == sorted(finished)
        copied = self.copied.get(uid, set())
        committed = {turn.turn_id for turn in record.turns.values() if turn.is_committed}
        assert copied <= committed, "a fork has lost what it began with"
        for turn_id in committed - copied:
            outcome = self.outcomes[turn_id]
            assert outcome.flight.uid == uid, "in another session"
            assert outcome.is_kept in (True, None), f"{turn_id} was not acknowledged"
        for turn_id, outcome in self.outcomes.items():
            if outcome.is_kept and outcome.flight.uid == uid:
                assert turn_id in committed, f"{turn_id} was acknowledged and is lost"

    def check_nothing_runs(self) -> None:
        turns = [turn for record in self.store._records.values() for turn in record.turns.values()]
        running = [turn.turn_id for turn in turns if turn.status is TurnStatus.RUNNING]
        assert not running, f"recorded as running for ever: {running}"

    def find(self, flight: Flight) -> Turn | None:
        record = self.store._records.get(flight.key)
        if record is None or record.session.uid != flight.uid:
            return None
        return record.turns.get(flight.turn_id)

    def _is_committed(self, outcome: Outcome) -> bool:
        turn = self.find(outcome.flight)
        return turn is not None and turn.is_committed


async def follow(outcome: Outcome, bound_s: float) -> None:
    """Wait for the end of a turn, which comes in time."""
    asked_at = asyncio.get_running_loop().time()
    try:
        outcome.terminal = await outcome.flight.wait_ended()
    except AgentPoolError as error:
        outcome.refusal = error
    took = asyncio.get_running_loop().time() - asked_at
    assert took <= bound_s, f"{outcome.flight.turn_id} took {took} s of {bound_s}"


def _check_log(outcome: Outcome) -> None:
    events = outcome.flight.log.events
    if outcome.refusal is not None:
        assert events == []
        return
    assert isinstance(events[0], TurnStarted), events
    assert isinstance(events[-1], TerminalEvent)
    assert not any(isinstance(event, TurnStarted | TerminalEvent) for event in events[1:-1])
    if isinstance(events[-1], TurnFinished):
        text = "".join(event.text for event in events if isinstance(event, TextDelta))
        assert [e.text for e in events if isinstance(e, MessageCompleted)] == [text]
        assert events[-1].reply == text


def path_of(record: Any, turn_id: str | None) -> list[Turn]:
    """Return the turns from the root to ``turn_id``."""
    path: list[Turn] = []
    while turn_id is not None:
        path.append(record.turns[turn_id])
        turn_id = path[-1].parent
    return path[::-1]
