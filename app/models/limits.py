"""How long and how much: the bounds of one call to a model."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    """Seconds and bytes.

    ``first_event_s`` runs from the call to the first event and covers every attempt;
    ``idle_s`` from one event to the next. A comment is not an event. ``max_bytes``
    bounds one answer, and any single line of it. ``attempts`` counts the first one.
    """

    first_event_s: float = 180.0
    idle_s: float = 60.0
    connect_s: float = 10.0
    max_bytes: int = 4 * 1024 * 1024
    attempts: int = 3
    retry_base_s: float = 0.5
