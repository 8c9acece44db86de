"""Nodes are paused, killed and cut off from their store under load: nothing is lost, doubled or mixed.

Two nodes, fifty sessions, sixty clients, and no request is sent to a node for any reason. All
the while something happens to a node: it stops for longer than its leases last, it dies and
comes back, or its way to the store becomes slow, deaf, one-way or closed; and now and then the
store itself stands still, or dies and comes back. That goes on for ten seconds; ``--cluster-s 30``
is the whole proof, and ``--cluster-seed`` another course of it.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.acceptance.cluster_load import Talker, open_http
from tests.acceptance.history import Fault, Log, Op, check, messages_of
from tests.cluster import LEASE_S, Cluster, until
from tests.faultproxy import BLACK_HOLE, HOLD, PASS, REFUSE, RESET, SWALLOW_REPLIES, FaultProxy, latency
from tests.modelserver import ModelServer
from tests.storeserver import StoreServer, url_through

NODES, SESSIONS, TALKERS = 2, 50, 60
FAULTS = (latency(0.2), RESET, BLACK_HOLE, HOLD, SWALLOW_REPLIES, REFUSE)
SETTLE_S = 30.0

_log = logging.getLogger(__name__)


class Trouble:
    """What happens to the nodes, one after another or to both at once, as ``chance`` has it."""

    def __init__(
        self, store: StoreServer, cluster: Cluster, proxies: list[FaultProxy], chance: Random
    ) -> None:
        self._store = store
        self._is_store_up = asyncio.Lock()  # a node that starts needs it
        self._cluster = cluster
        self._proxies = proxies
        self._chance = chance
        self.done: Counter[str] = Counter()
        self.starts_s: list[float] = []

    async def make(self, until_s: float) -> None:
        """Let things happen to each node and to the store until ``until_s``, and end with all well."""
        nodes = (self._make(number, until_s) for number in range(NODES))
        await asyncio.gather(self._shake_store(until_s), *nodes)

    async def _make(self, number: int, until_s: float) -> None:
        while (left_s := until_s - time.monotonic()) > 0:
            await self._lasts(min(left_s, self._chance.uniform(0.3, 1.5)))
            kind = self._chance.choice((self._pause, self._kill, self._cut_off, self._cut_off))
            await kind(number)

    async def _pause(self, number: int) -> None:
        self._cluster.pause(number)
        await self._lasts(self._chance.uniform(0.5, 1.7) * LEASE_S)
        self._cluster.resume(number)
        self.done["pause"] += 1

    async def _kill(self, number: int) -> None:
        await asyncio.to_thread(self._cluster.kill, number)
        async with self._is_store_up:
            began = time.monotonic()
            await asyncio.to_thread(self._cluster.nodes[number].start)
        self.starts_s.append(round(time.monotonic() - began, 1))
        self.done["kill"] += 1

    async def _cut_off(self, number: int) -> None:
        proxy, fault = self._proxies[number], self._chance.choice(FAULTS)
        await asyncio.to_thread(proxy.inflict, fault)
        await self._lasts(self._chance.uniform(0.1, 1.5) * LEASE_S)
        await asyncio.to_thread(proxy.inflict, PASS)
        self.done[str(fault)] += 1

    async def _shake_store(self, until_s: float) -> None:
        while (left_s := until_s - time.monotonic()) > 0:
            await self._lasts(min(left_s, self._chance.uniform(2, 6)))
            kills = self._chance.random() < 0.5
            async with self._is_store_up:
                await asyncio.to_thread(self._store.kill if kills else self._store.freeze)
                await self._lasts(self._chance.uniform(0.1, 1.2) * LEASE_S)
                await asyncio.to_thread(self._store.start if kills else self._store.thaw)
            self.done["store killed" if kills else "store frozen"] += 1

    async def _lasts(self, seconds: float) -> None:
        never = asyncio.get_running_loop().create_future()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await never


class World:
    """A cluster, each node behind a fault proxy of its own, and its clients."""

    def __init__(self, cluster: Cluster, trouble: Trouble, model: ModelServer, folder: Path) -> None:
        self.cluster = cluster
        self.trouble = trouble
        self.model = model
        self.log = Log(folder / "ops.jsonl")
        self.sessions = [f"s{number}" for number in range(SESSIONS)]
        self.talkers = [
            Talker(number, self.sessions[number % SESSIONS], lambda: cluster.urls, self.log)
            for number in range(TALKERS)
        ]

    async def live(self, seconds: float) -> None:
        """Talk and make trouble for so long; then have what is in doubt settled."""
        async with open_http() as http:
            end = time.monotonic() + seconds
            await asyncio.gather(self.trouble.make(end), *(each.talk(http, end) for each in self.talkers))
            end = time.monotonic() + SETTLE_S
            await asyncio.gather(*(each.settle(http, end) for each in self.talkers))

    def of_all(self, ask: Callable[[str, int], Any], node: int) -> dict[str, Any]:
        with ThreadPoolExecutor(4) as threads:
            return dict(zip(self.sessions, threads.map(lambda s: ask(s, node), self.sessions), strict=True))

    def running(self) -> list[str]:
        """Return the turns that the record says are running."""
        turns = self.of_all(self.cluster.turns, 0)
        return [turn["turn_id"] for each in turns.values() for turn in each if turn["status"] == "running"]

    def all_of(self, fault: Fault, ops: list[Op]) -> list[Any]:
        """Return what there is to be known of a fault."""
        turns = [turn for turn in self.cluster.turns(fault.session) if turn["input"] == fault.what]
        return [*(op for op in ops if op.text == fault.what), *turns]

    def find_unrecorded_calls(self, ops: list[Op]) -> list[str]:
        """Return what the model was asked more often than turns are on record that asked it.

        At most one of these was committed, says the checker; each other must have ended otherwise.
        A turn without a key whose node and store die together may leave no record that it began.
        """
        keyed = {op.text for op in ops if op.key is not None}
        may_be_lost = self.trouble.done["store killed"] > 0
        turns = self.of_all(self.cluster.turns, 0)
        recorded = Counter(turn["input"] for each in turns.values() for turn in each)
        finished = Counter(
            turn["input"] for each in turns.values() for turn in each if turn["status"] == "finished"
        )
        calls = self.model.calls()
        return [
            f"{text[:12]}: {count} calls, {recorded[text]} turns, {finished[text]} of them finished"
            for text, count in calls.items()
            if (count > recorded[text] and (text in keyed or not may_be_lost)) or finished[text] > 1
        ]


@pytest.fixture
def world(store_server: StoreServer, tmp_path: Path, cluster_seed: int) -> Iterator[World]:
    with ExitStack() as stack:
        model = stack.enter_context(ModelServer())
        proxies = [stack.enter_context(FaultProxy(store_server.port)) for _ in range(NODES)]
        urls = [url_through(store_server, proxy.port) for proxy in proxies]
        settings = {"SESSION_QUEUE_WAIT_S": "6", "DRAIN_TIMEOUT_S": "2"}
        cluster = stack.enter_context(Cluster(tmp_path, urls, model, **settings))
        trouble = Trouble(store_server, cluster, proxies, Random(cluster_seed))
        yield World(cluster, trouble, model, tmp_path)


@pytest.mark.timeout(600)
def test_trouble_loses_doubles_and_mixes_nothing(world: World, cluster_s: float) -> None:
    """What was answered is there once and in order, on both nodes; no call of the model is off the record."""
    asyncio.run(world.live(cluster_s))
    assert [each.doubt for each in world.talkers if each.doubt is not None] == []
    until(lambda: not world.running(), 3 * LEASE_S)
    ops = world.log.read()
    outcomes, codes = Counter(op.outcome for op in ops), sum((t.codes for t in world.talkers), Counter[str]())
    trouble = world.trouble
    _log.info("%s, %s, %s", dict(outcomes), dict(trouble.done), dict(codes))
    _log.info("nodes were back after %s s", trouble.starts_s)
    for node in range(NODES):
        shown = world.of_all(world.cluster.history, node)
        faults = check(ops, {session: messages_of(shown[session]) for session in world.sessions})
        assert [(fault, world.all_of(fault, ops)) for fault in faults] == []
    assert world.find_unrecorded_calls(ops) == []
    assert codes["INTERNAL_ERROR"] == 0
    assert "Traceback" not in world.cluster.logs()
    # That it was a load, and that there was trouble.
    assert outcomes["ok"] > 4 * cluster_s
    assert outcomes["unknown"] > 0
    assert sum(trouble.done.values()) >= cluster_s / 4
