"""The events of a stored turn, numbered as they were when it was live."""

from collections.abc import Iterator

from app.domain.arguments import parse_arguments
from app.domain.errors import TurnInterrupted
from app.domain.events import (
    MessageCompleted,
    TextDelta,
    ToolCalled,
    ToolReturned,
    TurnCancelled,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnStarted,
)
from app.domain.turn import (
    MESSAGES_PER_TURN,
    CancelReason,
    ToolCalls,
    ToolResults,
    Turn,
    TurnError,
    TurnStatus,
    text_of,
)

Numbered = tuple[int, TurnEvent]

# Of the end of a turn that died with its process. How many events its watchers had seen
# died with it, too: this is behind them all, so that whoever resumes gets it, once.
INTERRUPTED_SEQ = 999_999_999


def replay(turn: Turn, session_id: str, after: int = 0) -> list[Numbered]:
    """Return the events of an ended ``turn`` behind the sequence number ``after``.

    With ``after`` 0 everything, the text as one delta. Otherwise deltas cannot be told
    apart any more, so only the whole message and the terminal event follow.
    """
    events = list(_numbered(turn, session_id))
    if after:
        whole = (MessageCompleted, TurnFinished, TurnFailed, TurnCancelled)
        events = [(seq, event) for seq, event in events if isinstance(event, whole)]
    return [(seq, event) for seq, event in events if seq > after]


def _numbered(turn: Turn, session_id: str) -> Iterator[Numbered]:
    yield (
        1,
        TurnStarted(
            session_id, turn.agent_id, turn.provider, turn.model, turn.activation, created_at=turn.started_at
        ),
    )
    is_interrupted = turn.error is not None and turn.error.code == TurnInterrupted.code
    last = INTERRUPTED_SEQ if is_interrupted else max(turn.last_seq, 2)
    is_finished = turn.status is TurnStatus.FINISHED
    text = text_of(turn.messages)
    middle: list[Numbered] = list(zip(turn.tool_seqs, _tool_events(turn), strict=False))
    if text:
        taken = {1, *turn.tool_seqs}
        seq = next((n for n in range(last - (2 if is_finished else 1), 1, -1) if n not in taken), None)
        if seq is not None:
            middle.append((seq, TextDelta(text)))
    yield from sorted(middle, key=lambda numbered: numbered[0])
    if is_finished and last > 2:
        yield last - 1, MessageCompleted(turn.reply or "")
    if turn.status is not TurnStatus.RUNNING:
        yield last, _terminal(turn)


def _tool_events(turn: Turn) -> Iterator[TurnEvent]:
    for message in turn.messages:
        if isinstance(message, ToolCalls):
            for call in message.calls:
                yield ToolCalled(call.call_id, call.name, parse_arguments(call.arguments))
        elif isinstance(message, ToolResults):
            for result in message.results:
                yield ToolReturned(result.call_id, result.name, result.content, result.is_error)


def _terminal(turn: Turn) -> TurnEvent:
    if turn.status is TurnStatus.FINISHED:
        return TurnFinished(
            reply=turn.reply or "",
            finish_reason=turn.finish_reason or "stop",
            usage=turn.usage,
            head=turn.turn_id,
            message_count=MESSAGES_PER_TURN * turn.depth,
            turn_count=turn.depth,
            queued_ms=turn.queued_ms,
            duration_ms=turn.duration_ms,
        )
    if turn.status is TurnStatus.CANCELLED:
        depth = turn.depth if turn.kept else turn.depth - 1
        return TurnCancelled(
            reason=turn.cancel_reason or CancelReason.USER,
            partial_kept=turn.kept,
            head=turn.turn_id if turn.kept else turn.parent,
            message_count=MESSAGES_PER_TURN * depth,
        )
    return TurnFailed(turn.error or TurnError("INTERNAL_ERROR", "The turn failed."))
