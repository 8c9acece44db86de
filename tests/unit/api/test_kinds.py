"""The kinds of events: every one has a name, and says all that it holds."""

from typing import get_args

import pytest

from app.api.native.kinds import CLASS_OF_TYPE, EVENT_TYPES, describe
from app.domain.branch import HeadCause
from app.domain.events import TurnEvent, TurnFailed
from app.domain.journal import Compacted, Fact, HeadChanged, StateChanged
from app.domain.turn import TurnError


def test_every_kind_has_one_name() -> None:
    """No event of a turn and no fact is without a type, and no type stands for two."""
    assert set(CLASS_OF_TYPE.values()) == {*get_args(TurnEvent), *get_args(Fact)}
    assert set(EVENT_TYPES) == {name for name, kind in CLASS_OF_TYPE.items() if kind in get_args(TurnEvent)}


@pytest.mark.parametrize(
    ("event", "kind", "members"),
    [
        (StateChanged({"a": None}), "state.changed", {"state": {"a": None}}),
        (
            HeadChanged(HeadCause.REWIND, "t2", None),
            "head.moved",
            {"cause": "rewind", "previous": "t2", "head": None},
        ),
        (
            HeadChanged(HeadCause.RESTORE, None, "t1", "c1"),
            "head.moved",
            {"cause": "restore", "previous": None, "head": "t1", "checkpoint_id": "c1"},
        ),
        (Compacted("n1", "t1"), "session.compacted", {"note_id": "n1", "through": "t1"}),
        (
            TurnFailed(TurnError("POOL_EXHAUSTED", "Busy.", 2.1)),
            "turn.failed",
            {
                "problem_type": "/problems/pool-exhausted",
                "title": "Every agent is busy",
                "status": 503,
                "detail": "Busy.",
                "code": "POOL_EXHAUSTED",
                "retry_after_s": 3,
            },
        ),
    ],
)
def test_what_is_told(event: TurnEvent | Fact, kind: str, members: dict) -> None:
    """Facts, and a failure without anything of a request."""
    assert describe(event) == (kind, members)
