"""The object graph and the timers, without HTTP: what an embedder holds.

``async with Runtime(settings) as runtime`` opens the store, starts the timers and
gives ``runtime.chat``, ``runtime.sessions``, ``runtime.agents`` and ``runtime.admin``.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Self

from uuid_utils import uuid7

from app.background import TaskOwner
from app.config import Settings
from app.domain.catalog import parse_context_policy
from app.domain.lease import Node
from app.domain.session import LifeSpan
from app.domain.turn import CancelReason
from app.models.registry import ModelRegistry
from app.pool.manager import AgentManager
from app.ports import AgentFactory, Clock, SessionStore
from app.services import Services
from app.services.admin import AdminService
from app.services.admission import Admission
from app.services.chat import ChatService
from app.services.compaction import Compactor
from app.services.conductor import Conductor
from app.services.landing import CheckpointPlan
from app.services.overload import Gate, LagProbe
from app.services.ownership import Ownership
from app.services.quota import RequestQuota, TurnQuota
from app.services.sessions import SessionManager
from app.services.turns import CANCEL_GRACE_S, Turns
from app.stores.counting import MemoryCounter, open_counter
from app.stores.opening import Sharing, open_store
from app.telemetry.logs import PoolLog
from app.telemetry.memory import read_memory

if TYPE_CHECKING:
    from app.nodes.client import NodeClient

LAG_PROBE_S = 0.5
CLOSE_STEP_S = 10.0  # for each step of closing; writes to a healthy disk take milliseconds

_log = logging.getLogger(__name__)


class SystemClock:
    """The machine's clocks."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()  # noqa: TID251


def new_uuid7() -> str:
    """Make a fresh UUIDv7 (RFC 9562) in text."""
    return str(uuid7())


class Runtime:
    """One pool with everything that it needs. Belongs to the event loop that enters it.

    ``settings`` default to the environment. ``store`` replaces the one that
    ``STORE_URL`` names; it must not be open yet. ``tools`` are plain functions, async ones
    best, that the agents may call: name, docstring and annotations tell the model how.
    ``wait_for_store``: wait while another process has the store. ``node_url`` is where the other
    processes of a shared store reach this one; ``NODE_URL`` goes before it.

    Raises:
        ValueError: ``STORE_URL`` names no store, ``RATE_LIMIT_URL`` nothing that counts, or something
            in ``AGENTS_FILE`` is wrong.
        StoreLocked, on entering: another process has the store.
        StoreUnavailable, on entering: it cannot be opened.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        store: SessionStore | None = None,
        tools: Sequence[Callable[..., Any]] = (),
        wait_for_store: bool = False,
        node_url: str | None = None,
    ) -> None:
        self.settings = config = settings if settings is not None else Settings()
        life = config.life_span()
        if store is None:
            store = open_store(
                config.store_url,
                life,
                wait_for_lock=wait_for_store,
                sharing=Sharing(config.lease_s, config.accept_volatile, config.store_fsync_wait_ms),
                keys=config.key_ring(),
            )
        self._store = store
        self._wait_for_store = wait_for_store
        self._models = _open_models(config)
        self._clock = clock = SystemClock()
        self._boot_id = new_uuid7()
        self._node = Node(self._boot_id, config.node_url or node_url)
        self._link = _make_link(store, self._node)
        self._ownership = Ownership(
            store.leases,
            self._link,
            here=self._node,
            new_id=new_uuid7,
            queue_wait_s=config.session_queue_wait_s,
        )
        self._timers = TaskOwner("timers")
        self._lag_probe: LagProbe | None = None
        self.request_quota = _make_request_quota(config, clock)
        self._turns = _make_turns(config, store, clock)
        self._build(_make_factory(config, self._models, tools), life)

    def _build(self, factory: AgentFactory, life: LifeSpan) -> None:
        config, store, clock, turns = self.settings, self._store, self._clock, self._turns
        self.agents = AgentManager(store, factory, config.pool_limits(), clock, PoolLog())
        self._gate = Gate(config.overload_lag_ms / 1000, self.agents.note_rejection)
        admission = self._make_admission(factory, life)
        self._compactor = Compactor(
            store,
            factory,
            clock,
            new_uuid7,
            after_tokens=config.compact_after_tokens,
            timeout_s=config.turn_timeout_s,
        )
        self._conductor = self._make_conductor(factory, admission)
        self.chat = ChatService(
            store,
            factory,
            admission,
            self.agents,
            turns,
            self._conductor,
            self._compactor,
            new_uuid7,
            self._ownership,
            auto_create=config.session_auto_create,
        )
        self.sessions = SessionManager(store, factory, self.agents, turns, admission, self._ownership)
        self.admin = AdminService(
            store,
            self.agents,
            turns,
            clock,
            self.sessions.cleanup,
            read_memory,
            ownership=self._ownership,
        )

    def _make_conductor(self, factory: AgentFactory, admission: Admission) -> Conductor:
        return Conductor(
            self._store,
            factory,
            self.agents,
            self._turns,
            admission,
            self._compactor,
            self._clock,
            self._ownership,
            boot_id=self._boot_id,
            turn_timeout_s=self.settings.turn_timeout_s,
            checkpoints=_plan_checkpoints(self.settings),
            note_commit=self.gate.note_commit if self.gate is not None else None,
        )

    def _make_admission(self, factory: AgentFactory, life: LifeSpan) -> Admission:
        config = self.settings
        return Admission(
            self._store,
            factory,
            self._clock,
            new_uuid7,
            life,
            config.app_name,
            max_per_user=config.session_max_per_user,
            evicts_oldest=config.session_limit_policy == "evict_oldest",
            pool=self.agents,
            turns=self._turns,
            ownership=self._ownership,
        )

    @property
    def link(self) -> "NodeClient | None":
        """The way to the other processes of the store; ``None`` if there can be none."""
        return self._link

    @property
    def gate(self) -> Gate | None:
        """Who decides which requests are let in while the process is overloaded; ``None``: all are."""
        return self._gate if self.settings.overload_lag_ms else None

    @property
    def services(self) -> Services:
        """The bundle that faces work with."""
        return Services(self.chat, self.sessions, self.admin)

    @property
    def turns_in_flight(self) -> int:
        return len(self._turns)

    @property
    def is_busy(self) -> bool:
        """Whether turns are in flight here, or answers of other nodes on their way through this one."""
        return len(self._turns) > 0 or (self._link is not None and self._link.under_way > 0)

    async def __aenter__(self) -> Self:
        # Imports: better now than in the first turn, or between another process and this one.
        self._models.preload()
        if self._wait_for_store:
            _log.info("ready to serve as soon as no other process has the store")
        await self._store.open(self._boot_id, self._node.url)
        if self._link is not None and self._store.leases is not None:
            self._link.open(await self._store.leases.secret())
            self._timers.spawn(self._ownership.keep_for_ever(), "leases")
        self._timers.spawn(self._sweep_for_ever(), "sweep")
        self._timers.spawn(self._probe_lag_for_ever(), "lag")
        if self.gate is not None:
            self._lag_probe = LagProbe(self._clock, self.gate)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def begin_drain(self) -> None:
        """Refuse new turns; those that run go on."""
        self.agents.begin_drain()
        self._conductor.begin_drain()

    async def cancel_turns(self) -> None:
        """Cancel what still runs and keep what it has said so far; no turn starts after this.

        Returns when all have ended, or after some seconds without those that ignore it.
        """
        flights = self._turns.all()
        for flight in flights:
            flight.cancel(CancelReason.DRAIN, keep_partial=True)
        tasks = {flight.task for flight in flights if flight.task is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_GRACE_S * 2)
        await self._conductor.close()
        await self._compactor.close()

    async def close(self) -> None:
        """End the turns, drop the agents, close the models and last the store. May be called twice.

        Each step is taken, and given up after ``CLOSE_STEP_S``, whatever happens in the others.

        Raises:
            TimeoutError, …: a step failed.
        """
        self.begin_drain()
        if self._lag_probe is not None:
            self._lag_probe.stop()
        async with AsyncExitStack() as last_first:
            for step in (
                self._store.close,
                *((self._link.close,) if self._link is not None else ()),
                *((self.request_quota.close,) if self.request_quota is not None else ()),
                self._models.close,
                self.agents.close,
                self.cancel_turns,
                self._timers.close,
            ):
                last_first.push_async_callback(_take, step)

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.agent_cleanup_interval)
            try:
                await self.admin.sweep()
            except Exception:
                _log.exception("the sweep failed; the next one is in its turn")

    async def _probe_lag_for_ever(self) -> None:
        while True:
            due = self._clock.monotonic() + LAG_PROBE_S
            await asyncio.sleep(LAG_PROBE_S)
            self.admin.loop_lag_s = max(0.0, self._clock.monotonic() - due)


async def _take(step: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.timeout(CLOSE_STEP_S):
        await step()


def _make_turns(settings: Settings, store: SessionStore, clock: Clock) -> Turns:
    quota = TurnQuota(
        clock,
        store.get_usage,
        concurrent=settings.user_concurrent_turns,
        tokens_per_day=settings.user_tokens_per_day,
    )
    return Turns(
        clock, replay_s=settings.stream_replay_s, replay_bytes=settings.stream_replay_bytes, quota=quota
    )


def _make_request_quota(settings: Settings, clock: Clock) -> RequestQuota | None:
    if not settings.user_requests_per_minute:
        return None
    try:
        counter = open_counter(settings.counter_url, clock)
    except ValueError as error:
        raise ValueError(f"RATE_LIMIT_URL: {error}") from None
    return RequestQuota(counter, MemoryCounter(clock), clock, settings.user_requests_per_minute)


def _plan_checkpoints(settings: Settings) -> CheckpointPlan | None:
    if not settings.auto_checkpoint_every:
        return None
    return CheckpointPlan(settings.auto_checkpoint_every, settings.checkpoint_keep, new_uuid7)


def _make_link(store: SessionStore, here: Node) -> "NodeClient | None":
    if store.leases is None:
        return None
    from app.nodes.client import NodeClient  # with an HTTP client: not for those who are alone

    return NodeClient(here)


def _make_factory(
    settings: Settings, models: ModelRegistry, tools: Sequence[Callable[..., Any]]
) -> AgentFactory:
    # AutoGen is a third of all that there is to import: not for those who only import.
    from app.agents.factory import AutogenFactory
    from app.agents.profile_file import load_profiles

    found = load_profiles(settings.agents_file, models, tools)
    return AutogenFactory(
        models,
        found.profiles,
        tools=found.tools,
        context_policy=parse_context_policy(settings.context_policy),
        tool_timeout_s=settings.tool_timeout_s,
    )


def _open_models(settings: Settings) -> ModelRegistry:
    return ModelRegistry(
        settings.providers(),
        settings.default_provider,
        client_kind=settings.model_client,
        first_event_timeout_s=settings.model_first_event_timeout_s,
        idle_timeout_s=settings.model_idle_timeout_s,
        max_bytes=settings.model_max_bytes,
    )
