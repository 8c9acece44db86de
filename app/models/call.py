"""One call to a model: its deadlines, its token, and what makes an answer a good one.

The rules that the SDK and AutoGen do not have, once for every client. An answer is
good when it said why it ended, and has text or asks for tools.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from autogen_core import CancellationToken

from app.domain.errors import ModelError, ModelUnavailable
from app.models.failure import Failure, malformed
from app.models.limits import CallLimits

T = TypeVar("T")

_AFTER_FINISH_S: Final = 5.0  # how long the usage may take to follow the end of the text
_LONGEST_PAUSE_S: Final = 5.0  # who asks for a longer one gets no second attempt
_dice = random.SystemRandom()


class ModelCall(CancellationToken):
    """What is going on between us and the provider, from the request to the end of the answer.

    It is a token itself because AutoGen's client passes its token through, and nothing
    else, to the method that talks to the provider.
    """

    def __init__(self, limits: CallLimits, token: CancellationToken | None) -> None:
        super().__init__()
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + limits.first_event_s
        self._waiting: asyncio.Timeout | None = None
        self._end: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._alarm = 0.0  # when it goes off
        self._attempt = 0
        self._stopped = False
        self.close_response: Callable[[], Awaitable[None]] | None = None  # for those who cannot reach it
        self.begin_attempt()
        if token is not None:
            token.add_callback(self.stop)

    def begin_attempt(self) -> None:
        """Forget what was heard: the request is made again."""
        self._attempt += 1
        self._bytes = 0
        self._said = False
        self.begun = False  # something of the answer has come: there is no way back
        self.finished = False  # the answer has said why it ended

    def stop(self) -> None:
        """End the call where it stands: who waits, or would wait next, gets ``CancelledError``."""
        self._stopped = True
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(self._loop.time())
        if self._end is not None:
            self._end.cancel()

    async def wait(self, make: Callable[[], Awaitable[T]]) -> T:
        """Await what ``make`` returns until the deadline.

        Raises:
            CancelledError: the token was cancelled.
            ModelUnavailable: the deadline has passed.
        """
        self.check_stopped()
        try:
            async with asyncio.timeout_at(self._deadline) as self._waiting:
                return await make()
        except TimeoutError:
            self.check_stopped()
            if self._waiting is None or not self._waiting.expired():
                raise
        except Exception:
            self.check_stopped()
            raise
        finally:
            self._waiting = None
        raise self._too_late()

    async def wait_end(self, end: asyncio.Future[None]) -> None:
        """Await ``end``; the deadline moves with what is heard meanwhile.

        Raises:
            CancelledError: the token was cancelled.
            ModelUnavailable: the deadline has passed.
        """
        self.check_stopped()
        self._end = end
        self._watch()
        try:
            await end
        finally:
            self._end = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _watch(self) -> None:
        """End ``wait_end`` if it is time; else look again when it may be."""
        if self._end is None or self._end.done():
            return
        if self._loop.time() >= self._deadline:
            self._end.set_exception(self._too_late())
        else:
            self._alarm = self._deadline
            self._timer = self._loop.call_at(self._alarm, self._watch)

    def check_stopped(self) -> None:
        """Raise ``CancelledError`` once the token is cancelled."""
        if self._stopped:
            raise asyncio.CancelledError

    def _too_late(self) -> ModelUnavailable:
        if self.begun:
            return ModelUnavailable(f"The model stopped in its answer for {self._limits.idle_s:g} s.")
        return ModelUnavailable(f"The model did not begin to answer within {self._limits.first_event_s:g} s.")

    @property
    def has_heard(self) -> bool:
        """Whether this attempt has got any event at all."""
        return self._bytes > 0

    def heard(self, size: int, *, told: bool, said: bool, finish: bool) -> None:
        """Note an event of the answer.

        ``told``: it has anything in it (an empty first chunk may come long before the
        first word); ``said``: that is text or a tool call; ``finish``: it says why the answer ends.

        Raises:
            ModelError: the answer has become too long.
        """
        self._bytes += size
        if self._bytes > self._limits.max_bytes:
            raise ModelError("The model's answer was too long.")
        self._said = self._said or said
        if self.finished:
            return  # whatever goes on after the end, its time is not extended
        self.finished = finish
        self.begun = self.begun or told or finish
        if self.begun:
            patience = min(self._limits.idle_s, _AFTER_FINISH_S) if self.finished else self._limits.idle_s
            self._deadline = self._loop.time() + patience
            # A later deadline leaves the timer alone, which would cost as much as the event:
            # when it goes off, it sees for itself.
            if self._timer is not None and self._deadline < self._alarm:
                self._timer.cancel()
                self._watch()

    def check_end(self) -> None:
        """Judge the answer, now that the stream has ended.

        Raises:
            ModelError: it was cut off, or is empty.
        """
        if not self.has_heard:
            raise malformed()
        if not self.finished:
            raise ModelError("The model's answer was cut off.")
        if not self._said:
            raise ModelError("The model's answer was empty.")

    def pick_pause(self, failure: Failure) -> float | None:
        """Return how long to wait before another attempt: longer each time, never two callers in step.

        ``None``: none makes sense. The answer has begun, the provider asks for more patience
        than there is, or the deadline would pass meanwhile and hide what went wrong.
        """
        asked = failure.error.retry_after_s or 0.0
        if not failure.passing or self.begun or self._attempt >= self._limits.attempts:
            return None
        backoff = self._limits.retry_base_s * 2.0 ** (self._attempt - 1)
        seconds = max(asked, backoff) * _dice.uniform(1.0, 1.5)
        if asked > _LONGEST_PAUSE_S or self._loop.time() + seconds >= self._deadline:
            return None
        return seconds

    async def pause(self, seconds: float) -> None:
        """Wait, and make the next attempt."""
        await self.wait(lambda: asyncio.sleep(seconds))
        self.begin_attempt()
