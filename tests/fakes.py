"""Stand-ins that obey the ports, for tests that want to say what the outside does.

Nothing here sleeps for real. What is to wait waits at a ``Gate`` until the test opens it.
"""

import asyncio
import inspect
import uuid
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from app.domain.catalog import AgentProfile, ModelOffer
from app.domain.compaction import summary_messages
from app.domain.errors import AgentNotFound, InvalidInput, UnknownModel
from app.domain.events import TextDelta
from app.domain.ids import SessionKey
from app.domain.quota import Quota, UserKey
from app.domain.session import LifeSpan, Path, Session, Stamp
from app.domain.state import Surroundings
from app.domain.turn import Answer, AssistantText, ContextMessage, Summary, Usage, UserText
from app.ports import Clock
from app.services.quota import TurnQuota
from app.stores.memory.store import MemoryStore

EPOCH_MS = 1_800_000_000_000


class FakeClock:
    """Both clocks; they stand still until ``advance``."""

    def __init__(self, monotonic_s: float = 1000.0) -> None:
        self._monotonic_s = monotonic_s
        self._now_ms = EPOCH_MS

    def now_ms(self) -> int:
        return self._now_ms

    def monotonic(self) -> float:
        return self._monotonic_s

    def advance(self, seconds: float) -> None:
        self._monotonic_s += seconds
        self._now_ms += round(seconds * 1000)


class LoopClock:
    """Both clocks as the running event loop has them: virtual in ``tests.simulation.loop``."""

    def now_ms(self) -> int:
        return EPOCH_MS + round(self.monotonic() * 1000)

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


def new_ids(first: int = 1) -> Callable[[], str]:
    """Return a ``NewId`` that counts: the ids look like UUIDv7 and sort as they were made."""
    count = first - 1

    def make() -> str:
        nonlocal count
        count += 1
        return str(uuid.UUID(int=((EPOCH_MS + count) << 80) | (7 << 76) | (2 << 62) | count))

    return make


class Gate:
    """A point that nobody passes until the test opens it."""

    def __init__(self, *, is_open: bool = False) -> None:
        self._event = asyncio.Event()
        self.waiting = 0
        if is_open:
            self.open()

    @property
    def is_open(self) -> bool:
        return self._event.is_set()

    def open(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        self.waiting += 1
        try:
            await self._event.wait()
        finally:
            self.waiting -= 1


@dataclass(frozen=True)
class Script:
    """What a ``FakeAgent`` does with one message.

    It waits at ``gate``, emits ``deltas`` (after each it lets others run for ``pause_s``),
    then raises ``error`` or answers with the deltas joined. With ``holdout`` it ignores
    every cancellation until that gate is open, as a thread does.
    """

    deltas: tuple[str, ...] | None = None  # None: an echo in two pieces
    gate: Gate | None = None
    pause_s: float = 0.0
    error: Exception | None = None
    holdout: Gate | None = None
    usage: Usage = field(default_factory=lambda: Usage(3, 2))


TOKENS_PER_MESSAGE = 10

ScriptFor = Callable[["FakeAgent", str], Script]


class FakeAgent:
    """Remembers its conversation as a real agent does: also the input of a turn that went wrong.

    The echo counts the inputs that it remembers, so that a wrong context can be seen.
    """

    def __init__(
        self,
        stamp: Stamp,
        session_id: str = "",
        messages: tuple[ContextMessage, ...] = (),
        script_for: ScriptFor | None = None,
        estimated_bytes: int | None = None,
    ) -> None:
        self.stamp = stamp
        self.session_id = session_id
        self.messages = list(messages)
        self.shared: Surroundings | None = None
        self.is_running = False
        self.cancels = 0
        self._script_for = script_for
        self._fixed_bytes = estimated_bytes

    @property
    def estimated_bytes(self) -> int:
        return 100 * (1 + len(self.messages)) if self._fixed_bytes is None else self._fixed_bytes

    @property
    def estimated_tokens(self) -> int:
        return TOKENS_PER_MESSAGE * len(self.messages)

    def cancel(self) -> None:
        self.cancels += 1

    async def run(self, message: str, emit: Callable[[TextDelta], None]) -> Answer:
        assert not self.is_running, f"two turns run in the agent of {self.session_id}"
        self.is_running = True
        script = self._script_for(self, message) if self._script_for else Script()
        self.messages.append(UserText(message))
        try:
            return await self._follow(script, message, emit)
        except asyncio.CancelledError:
            await _hold_out(script.holdout)
            raise
        finally:
            self.is_running = False

    async def _follow(self, script: Script, message: str, emit: Callable[[TextDelta], None]) -> Answer:
        if script.gate is not None:
            await script.gate.wait()
        inputs = sum(isinstance(m, UserText) for m in self.messages)
        deltas = (f"{inputs}: ", message) if script.deltas is None else script.deltas
        for text in deltas:
            emit(TextDelta(text))
            await asyncio.sleep(script.pause_s)
        if script.error is not None:
            raise script.error
        reply = AssistantText("".join(deltas))
        self.messages.append(reply)
        return Answer((UserText(message), reply), script.usage, "stop")


async def _hold_out(holdout: Gate | None) -> None:
    while holdout is not None and not holdout.is_open:
        try:
            await holdout.wait()
        except asyncio.CancelledError:
            continue


class FakeFactory:
    """Builds ``FakeAgent``s; ``build_error`` is raised instead, when set.

    ``revision`` is the profile's: raise it to make every stamp stale. ``models`` is what is offered.
    ``has_shared_prompt``: prompts name shared state, which agents then carry in ``shared``.
    ``summary`` is what every path is summed up as, or the error that is raised, once
    ``summary_gate`` is open; ``summarised`` are the paths.
    """

    def __init__(self, script_for: ScriptFor | None = None) -> None:
        self.script_for = script_for
        self.revision = 1
        self.models = {("fake", "echo")}
        self.build_error: Exception | None = None
        self.built: list[FakeAgent] = []
        self.refits = 0
        self.has_shared_prompt = False
        self.summary: str | Exception = "What was said."
        self.summary_gate = Gate(is_open=True)
        self.summarised: list[Path] = []

    def profiles(self) -> tuple[AgentProfile, ...]:
        return (AgentProfile("assistant", "Assistant", "Answers.", "Be kind.", revision=self.revision),)

    def offers(self) -> tuple[ModelOffer, ...]:
        return (ModelOffer("fake", "echo", True),)

    def check(self, session: Session) -> None:
        if session.agent_id != "assistant":
            raise AgentNotFound
        if self.model_of(session) not in self.models:
            raise UnknownModel
        if (session.template or {}).get("capabilities"):
            raise InvalidInput("template.capabilities", "must name nothing: there are no tools")

    def names_shared(self, session: Session) -> bool:
        return self.has_shared_prompt

    def model_of(self, session: Session) -> tuple[str, str]:
        return session.provider or "fake", session.model or "echo"

    def stamp_of(self, session: Session, shared: Surroundings | None = None) -> Stamp:
        revs = None if shared is None else shared.revs
        return Stamp(
            session.head, session.note, session.rev, self.revision, session.state_rev, revs, session.uid
        )

    def build(self, session: Session, path: Path, shared: Surroundings | None = None) -> FakeAgent:
        if self.build_error is not None:
            raise self.build_error
        stamp = replace(self.stamp_of(session, shared), head=path.head, note=path.note)
        summary = () if path.summary is None else summary_messages(path.summary)
        messages = (*summary, *path.messages)
        agent = FakeAgent(stamp, session.key.session_id, messages, self.script_for)
        agent.shared = shared
        self.built.append(agent)
        return agent

    def refit(self, agent: FakeAgent, session: Session, shared: Surroundings | None = None) -> None:
        self.refits += 1
        agent.stamp = self.stamp_of(session, shared)
        agent.shared = shared

    async def summarise(self, session: Session, path: Path) -> Summary:
        self.summarised.append(path)
        await self.summary_gate.wait()
        if isinstance(self.summary, Exception):
            raise self.summary
        tokens = TOKENS_PER_MESSAGE * (len(path.messages) + 2 * (path.summary is not None))
        return Summary(self.summary, tokens, 2 * TOKENS_PER_MESSAGE, Usage(7, 4))


@dataclass(frozen=True)
class Fault:
    """What happens to one call of the store, in this order.

    Wait at ``gate`` and for ``delay_s``, raise ``error``; carry the call out; then wait at
    ``late_gate`` and for ``late_delay_s``, raise ``late_error``: a reply that is lost.
    """

    gate: Gate | None = None
    delay_s: float = 0.0
    error: BaseException | None = None
    late_gate: Gate | None = None
    late_delay_s: float = 0.0
    late_error: BaseException | None = None


@dataclass
class FakeStore:
    """A real ``MemoryStore`` behind a wire that the test can block and cut.

    ``plan`` says what happens to the next calls of one operation; ``fault_for`` decides
    where nothing is planned. Calls that pass are counted in ``calls``.
    """

    inner: MemoryStore = field(default_factory=lambda: MemoryStore(LifeSpan()))
    fault_for: Callable[[str], Fault] | None = None
    calls: Counter[str] = field(default_factory=Counter)
    _plans: dict[str, deque[Fault]] = field(default_factory=dict)

    def plan(self, operation: str, *faults: Fault) -> None:
        assert callable(getattr(self.inner, operation)), operation
        self._plans.setdefault(operation, deque()).extend(faults)

    def __getattr__(self, operation):
        method = getattr(self.inner, operation)
        if not inspect.iscoroutinefunction(method):
            return method

        async def call(*args, **kwargs):
            fault = self._next_fault(operation)
            await _meet(fault.gate, fault.delay_s, fault.error)
            result = await method(*args, **kwargs)
            self.calls[operation] += 1
            await _meet(fault.late_gate, fault.late_delay_s, fault.late_error)
            return result

        return call

    def _next_fault(self, operation: str) -> Fault:
        if plan := self._plans.get(operation):
            return plan.popleft()
        return self.fault_for(operation) if self.fault_for else Fault()


async def _meet(gate: Gate | None, delay_s: float, error: BaseException | None) -> None:
    if gate is not None:
        await gate.wait()
    if delay_s:
        await asyncio.sleep(delay_s)
    if error is not None:
        raise error


def make_session(session_id: str = "s1", owner: str = "", **values) -> Session:
    """Return the record of a fresh session."""
    made = {
        "key": SessionKey(owner, session_id),
        "uid": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{owner}/{session_id}")),
        "app_name": "agentpool",
        "agent_id": "assistant",
        "created_at": EPOCH_MS,
        "updated_at": EPOCH_MS,
        "last_accessed": EPOCH_MS,
        "expires_at": None,
    }
    return Session(**{**made, **values})


async def fill(store: FakeStore | MemoryStore, *session_ids: str) -> None:
    """Open the store and create these sessions."""
    inner = store.inner if isinstance(store, FakeStore) else store
    await inner.open("boot-1")
    for session_id in session_ids:
        await inner.create_session(make_session(session_id))


class CountAll(TurnQuota):
    """Counts every turn for one user, and refuses none."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, concurrent=10**6)

    def admit(self, user: UserKey | None, spent: int) -> tuple[Quota, ...]:
        return super().admit(("", "everybody"), spent)

    def release(self, user: UserKey | None, tokens: int = 0) -> None:
        super().release(("", "everybody"), tokens)

    @property
    def under_way(self) -> int:
        return self._turns.total()
