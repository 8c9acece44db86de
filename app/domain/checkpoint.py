"""A checkpoint: a name for a turn and the state at that moment, with free data."""

from dataclasses import dataclass, field
from typing import Any

from app.domain.free_object import check_free_object
from app.domain.turn import JsonObject

DATA_MAX_BYTES = 256 * 1024
NAMED_MAX = 1_000
"""How many checkpoints a session may have that somebody asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """``turn_id`` is ``None`` for one from before the first turn; ``created_at`` is milliseconds."""

    checkpoint_id: str
    turn_id: str | None
    label: str | None = None
    data: JsonObject = field(default_factory=dict)
    created_at: int
    automatic: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointPage:
    checkpoints: tuple[Checkpoint, ...]
    total: int
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class AutoCheckpoint:
    """An automatic checkpoint that is made with a commit; of these the newest ``keep`` stay."""

    checkpoint_id: str
    keep: int


def check_data(value: dict[str, Any], field_name: str = "data") -> JsonObject:
    """Return ``value`` if it is small enough to be kept with a checkpoint.

    Raises:
        InvalidInput: over 256 KiB of JSON, nested deeper than 32, or more than 1,000 keys in all.
    """
    return check_free_object(value, field_name, max_bytes=DATA_MAX_BYTES)
