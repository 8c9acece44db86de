"""When a call to a model is given up, and when it is tried again."""

import asyncio
from typing import Any

import pytest

from app.domain.errors import ModelError, ModelRateLimited, ModelUnavailable
from app.models.call import ModelCall
from app.models.failure import Failure
from app.models.limits import CallLimits

PASSING = Failure(ModelUnavailable(), passing=True)


def make_call(**limits: Any) -> ModelCall:
    return ModelCall(CallLimits(**limits), None)


async def test_pauses_grow_and_end() -> None:
    """Half a second and up to half as much again, then twice that, then no more."""
    call = make_call()
    first = [call.pick_pause(PASSING) for _ in range(200)]
    assert all(0.5 <= pause <= 0.75 for pause in first)
    assert len(set(first)) > 100  # never two callers in step
    call.begin_attempt()
    assert all(1.0 <= call.pick_pause(PASSING) <= 1.5 for _ in range(200))
    call.begin_attempt()
    assert call.pick_pause(PASSING) is None


@pytest.mark.parametrize(
    ("asked", "least"), [(0.1, 0.5), (2.0, 2.0), (5.0, 5.0), (5.1, None), (3600.0, None)]
)
async def test_the_providers_wish_counts(asked: float, least: float | None) -> None:
    """A longer pause is granted, but not one that is too long."""
    pause = make_call().pick_pause(Failure(ModelRateLimited(retry_after_s=asked), passing=True))
    assert pause is None if least is None else least <= pause <= least * 1.5


async def test_no_pause_beyond_the_deadline() -> None:
    """What went wrong is told, rather than that the time was up."""
    assert make_call(first_event_s=0.5).pick_pause(PASSING) is None
    assert make_call(first_event_s=0.8).pick_pause(PASSING) is not None


async def test_what_does_not_pass_is_final() -> None:
    """So is whatever happens to an answer that has begun."""
    call = make_call()
    assert call.pick_pause(Failure(ModelError())) is None
    call.heard(1, told=True, said=True, finish=False)
    assert call.pick_pause(PASSING) is None


async def test_nothing_extends_an_answer_that_has_ended() -> None:
    """Chunks that go on after the reason do not keep the call alive."""
    call = make_call(idle_s=0.05)
    call.heard(1, told=True, said=True, finish=True)
    async with asyncio.timeout(5):
        with pytest.raises(ModelUnavailable):
            while True:
                await call.wait(lambda: asyncio.sleep(0))
                call.heard(1, told=False, said=False, finish=False)
    assert call.finished


async def test_chunks_without_content_do_not_begin_an_answer() -> None:
    """Before the first word only the first event's time counts, whatever else comes."""
    call = make_call(first_event_s=0.05, idle_s=60)
    async with asyncio.timeout(5):
        with pytest.raises(ModelUnavailable, match="did not begin"):
            while True:
                await call.wait(lambda: asyncio.sleep(0))
                call.heard(1, told=False, said=False, finish=False)
