"""A real server that is asked for five times what it carries: nobody is left without an answer."""

import argparse
import asyncio
import statistics
from pathlib import Path

import load_process
from load_overload import Crowd, Stage, Watch, open_watch
from load_session import SessionMaker

from tests.serverprocess import ServerProcess

TIMES, LEAST_PER_S = 5, 5000
PEAK_S, OVERLOAD_S = 1.5, 6.0
SESSIONS, CLIENTS = 2000, 64
LEFT_S = 30.0
MORE_MIB = 256


def options_of(server: ServerProcess) -> argparse.Namespace:
    return argparse.Namespace(
        url=server.url,
        prefix="",
        header=[],
        seed=1,
        sessions=SESSIONS,
        turns=10**6,  # no session is given up: what it was answered can be compared with its history
        stream_share=0.7,
        expect_echo=False,
        pid=server.pid,
    )


async def overload(server: ServerProcess) -> tuple[Crowd, Watch, list[Stage]]:
    """Measure the peak, send ``TIMES`` as much, then little; return what came of it."""
    options = options_of(server)
    crowd = Crowd(options, SessionMaker("overload"))
    async with open_watch() as http:
        watch = Watch(options, http)
        peak = await crowd.run_closed(CLIENTS, PEAK_S)
        watching = asyncio.create_task(watch.look_for_ever())
        async with asyncio.timeout(OVERLOAD_S + LEFT_S):
            # The machine may have been busy meanwhile, and be quick now: too much in any case.
            over = await crowd.run_open(max(TIMES * peak.per_s, LEAST_PER_S), OVERLOAD_S)
        watching.cancel()
        calm = await crowd.run_closed(8, 1.0)
    crowd.close()
    return crowd, watch, [peak, over, calm]


def stored_turns(server: ServerProcess) -> dict[str, int]:
    """Return how many turns each session has, as the server tells."""
    found: dict[str, int] = {}
    path: str | None = "/sessions?limit=200"
    while path:
        page = server.request("GET", path).body
        found |= {each["session_id"]: each["turn_count"] for each in page["sessions"]}
        path = page["next_cursor"] and f"/sessions?limit=200&cursor={page['next_cursor']}"
    return found


def test_five_times_what_it_carries(tmp_path: Path) -> None:
    """Every request is answered or refused as promised, health and admin get through, nothing is lost."""
    # On a slow machine, too, the gate is to refuse, and not the pool: after five seconds, or the thousandth.
    settings = {"AGENT_CAPACITY_WAIT_S": "60", "AGENT_CAPACITY_QUEUE": "100000"}
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo", **settings) as server:
        before_mib = load_process.read_rss_mib(server.pid)
        crowd, watch, (peak, over, calm) = asyncio.run(overload(server))

        assert peak.errors + over.errors + calm.errors == {}
        assert peak.wrong + over.wrong + calm.wrong == []
        assert peak.refused == [] == calm.refused
        assert over.refused
        assert over.finished
        assert len(crowd.sessions) == SESSIONS

        assert watch.errors == {}
        assert len(watch.answers) >= 4
        assert watch.most_mib - before_mib < MORE_MIB

        answered = {each.session_id: each.turns for each in crowd.sessions if each.turns}
        assert sum(answered.values()) == sum(len(stage.finished) for stage in (peak, over, calm))
        stored = stored_turns(server)
        assert {name: stored[name] for name in answered} == answered
        assert not any(stored[name] for name in stored.keys() - answered.keys())

        rejections = server.request("GET", "/agent-stats").body["rejections"]
        assert rejections == {"OVERLOADED": len(over.refused)}
        assert statistics.median(calm.finished) < statistics.median(over.finished)


def test_without_a_gate_nothing_is_refused_for_it(tmp_path: Path) -> None:
    """``OVERLOAD_LAG_MS=0``: more at once than the gate would let in come in, as they did before."""

    async def ask_at_once() -> Stage:
        crowd = Crowd(options_of(server), SessionMaker("many"))
        stage = await crowd.run_closed(700, 2.0)
        crowd.close()
        return stage

    settings = {"OVERLOAD_LAG_MS": "0", "AGENT_CAPACITY_WAIT_S": "60"}
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo", **settings) as server:
        stage = asyncio.run(ask_at_once())
        assert (len(stage.refused), stage.errors, stage.wrong) == (0, {}, [])
        assert len(stage.finished) >= 700
