"""A turn's events as frames of the native face."""

from app.api.errors import problem_members
from app.api.exchange import Exchange
from app.api.native.kinds import as_event, describe, to_json
from app.domain.events import TurnEvent, TurnFailed


class NativeEncoder:
    """Encodes for one response: a ``turn.failed`` names the request that it answers."""

    face = "native"

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def encode(self, turn_id: str, seq: int, event: TurnEvent) -> bytes:
        kind, members = describe(event)
        if isinstance(event, TurnFailed):
            members = as_event(problem_members(event.error, self._exchange))
        data = to_json({"type": kind, "seq": seq, "turn_id": turn_id, **members})
        return b"id: %s:%d\nevent: %s\ndata: %s\n\n" % (turn_id.encode(), seq, kind.encode(), data)
