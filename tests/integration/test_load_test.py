"""The load test: it passes servers that are right, finds planted faults, and its figures are true."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import load_process
import load_report
import load_test
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from load_client import Timed
from load_figures import Spread, Threshold
from load_scenario import OVERLOAD, SCENARIOS, Load
from load_session import ANY_NAME, Answer, SessionMaker, make_name

from tests.modelserver import ModelServer
from tests.serverprocess import ServerProcess

SCRIPT = Path(__file__).parents[2] / "scripts" / "load_test.py"
SMALL = ("--sessions", "8", "--turns", "4", "--concurrency", "4", "--warm-up", "1", "--rounds", "2")
FAULT_EVERY = 5


class Pretender:
    """A server of this API that keeps nothing but names and counts, and has one fault of choice.

    The fault shows in every fifth answer; ``gate`` holds all answers back until so many are asked for.
    """

    def __init__(self, fault: str = "", gate: int = 0) -> None:
        self._fault = fault
        self._names: dict[str, str] = {}
        self._turns: dict[str, int] = defaultdict(int)
        self._asked = 0
        self._gate = gate
        self._gate_open = asyncio.Event()

    def routes(self, prefix: str) -> web.Application:
        application = web.Application()
        application.router.add_post(f"{prefix}/chat", self._chat)
        application.router.add_post(f"{prefix}/chat/stream", self._stream)
        return application

    async def _answer(self, request: web.Request) -> tuple[dict[str, Any], bool]:
        body = await request.json()
        self._asked += 1
        if self._asked >= self._gate:
            self._gate_open.set()
        await self._gate_open.wait()
        is_faulty = self._asked % FAULT_EVERY == 0
        session = body["session_id"]
        if named := ANY_NAME.findall(body["message"]):
            self._names[session] = named[0]
        self._turns[session] += 1
        if is_faulty and self._fault == "lost history":
            self._turns[session] = 1
        name = self._names[session]
        if is_faulty and self._fault == "mixed up":
            name = next((other for other in self._names.values() if other != name), name)
        if is_faulty and self._fault == "forgotten":
            name = "nobody"
        return {
            "reply": f"Your name is {name}.",
            "provider": "demo",
            "activation": "new" if self._turns[session] == 1 else "warm",
            "turn_count": self._turns[session],
            "message_count": 2 * self._turns[session] - (is_faulty and self._fault == "one message lost"),
        }, is_faulty and self._fault in ("refused", "broken", "torn", "cut", "no count", "failed")

    async def _chat(self, request: web.Request) -> web.Response:
        answer, is_broken = await self._answer(request)
        if is_broken and self._fault == "refused":
            return web.json_response({"code": "POOL_EXHAUSTED"}, status=503)
        if is_broken and self._fault == "broken":
            return web.Response(text="<h1>Bad gateway</h1>", status=502)
        if is_broken:
            del answer["turn_count"]
        return web.json_response(answer)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        answer, is_broken = await self._answer(request)
        reply = answer.pop("reply")
        frames: list[dict[str, Any]] = [{"type": "turn.started", **answer}]
        frames += [{"type": "text.delta", "text": word} for word in reply.partition(" ")]
        if is_broken and self._fault == "failed":
            frames.append({"type": "turn.failed", "code": "MODEL_UNAVAILABLE"})
        elif not is_broken or self._fault == "torn":
            end = reply + "!" if is_broken else reply
            frames.append({"type": "turn.finished", "reply": end})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for frame in frames:
            await response.write(f"event: {frame['type']}\ndata: {json.dumps(frame)}\n\n".encode())
        return response


async def attack(pretender: Pretender, *arguments: str, prefix: str = "") -> tuple[dict[str, Any], int]:
    """Return the report of a load test of ``pretender``, and its exit code."""
    async with TestServer(pretender.routes(prefix)) as server:
        url = str(server.make_url("/"))
        options = load_test.parse_arguments([*SMALL, "--url", url, "--prefix", prefix, *arguments])
        report = await load_test.drive(options)
        return report, load_test.exit_code(report, options)


@pytest.mark.parametrize("share", ["0", "1"])
async def test_right_server_passes(share: str) -> None:
    """A server without a fault passes: every turn is counted, in closed and in open loop, with a prefix."""
    closed = await attack(Pretender(), "--stream-share", share, prefix="/api")
    opened = await attack(Pretender(), "--stream-share", share, "--rate", "2000")
    for report, code in (closed, opened):
        assert (code, report["turns"], report["errors"], report["wrong_answers"]) == (0, 2 * 8 * 4, {}, 0)
        assert len(report["rounds"]) == 2
        assert ("first_token_p50_ms" in report["figures"]) == (share == "1")


@pytest.mark.parametrize("share", ["0", "1"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("mixed up", "was told"),
        ("forgotten", "was not recognised"),
        ("lost history", "turn_count and message_count 1, 2 instead of"),
        ("one message lost", "instead of"),
    ],
)
async def test_wrong_answers_are_found(fault: str, says: str, share: str) -> None:
    """Mixed-up sessions and lost history make the exit code 1, and the first of them are shown."""
    report, code = await attack(Pretender(fault), "--stream-share", share)
    assert code == 1
    assert report["wrong_answers"] > 0
    assert any(says in sentence for sentence in report["wrong_shown"])


@pytest.mark.parametrize(
    ("fault", "share", "error"),
    [
        ("refused", "0", "POOL_EXHAUSTED"),
        ("broken", "0", "client: status 502 without a problem document"),
        ("no count", "0", "client: the answer has no 'turn_count'"),
        ("failed", "1", "MODEL_UNAVAILABLE"),
        ("torn", "1", "client: the deltas are not the reply"),
        ("cut", "1", "client: the stream ended early"),
    ],
)
async def test_errors_are_found(fault: str, share: str, error: str) -> None:
    """What a server refuses or breaks is counted by its code, and makes the exit code 1."""
    report, code = await attack(Pretender(fault), "--stream-share", share)
    assert code == 1
    assert set(report["errors"]) == {error}


async def test_errors_keep_the_open_loop_running() -> None:
    """In the open loop a fresh session takes the place of one that an error ended: no turn is left out."""
    report, code = await attack(
        Pretender("refused"), "--stream-share", "0", "--rate", "2000", "--warm-up", "0"
    )
    assert code == 1
    assert report["turns"] + report["errors"]["POOL_EXHAUSTED"] == 2 * 8 * 4


async def test_errors_within_a_bound_are_allowed() -> None:
    """A bound on errors takes the place of none at all; a wrong answer is never allowed."""
    _, allowed = await attack(Pretender("refused"), "--fail-over", "errors=1000", "--stream-share", "0")
    _, beyond = await attack(Pretender("refused"), "--fail-over", "errors=1", "--stream-share", "0")
    _, wrong = await attack(Pretender("mixed up"), "--fail-over", "errors=1000", "--fail-over", "wrong=1000")
    assert (allowed, beyond, wrong) == (0, 3, 1)


@pytest.mark.parametrize(
    ("bounds", "code", "says"),
    [
        (["--fail-over", "p99_ms=1e9", "--fail-under", "turns_per_s=0.001"], 0, []),
        (["--fail-over", "p99_ms=0"], 3, ["p99_ms is"]),
        (["--fail-under", "turns_per_s=1e9"], 3, ["turns_per_s is"]),
        (["--fail-over", "cpu_ms_per_turn=1e9"], 3, ["cpu_ms_per_turn was not measured"]),
    ],
)
async def test_bounds_decide_the_exit_code(bounds: list[str], code: int, says: list[str]) -> None:
    """A figure beyond its bound, or one that was not measured, makes the exit code 3 and is named."""
    report, found = await attack(Pretender(), *bounds)
    assert found == code
    assert [fault[: len(start)] for fault, start in zip(report["over"], says, strict=True)] == says


def test_bound_is_kept_exactly_at_it() -> None:
    """A figure that equals its bound keeps it, from either side."""
    for is_upper in (True, False):
        assert Threshold.parse("p99_ms=250", is_upper=is_upper).find_fault({"p99_ms": 250.0}) is None
    assert Threshold.parse("p99_ms=250", is_upper=True).find_fault({"p99_ms": 250.1}) is not None


async def test_open_loop_does_not_wait_for_answers() -> None:
    """Turns begin at their own times: ten are asked for before the first is answered."""
    report, code = await attack(
        Pretender(gate=10), "--rate", "500", "--sessions", "10", "--concurrency", "1", "--warm-up", "0"
    )
    assert (code, report["turns"]) == (0, 2 * 10 * 4)


async def test_latency_counts_from_when_a_turn_was_due() -> None:
    """A turn that found every session busy began, for the figures, when it was due."""
    began: list[float] = []
    released: list[float] = []

    class Stub:
        async def ask(self, body: dict[str, Any], is_streamed: bool, due: float) -> Timed:
            began.append(due)
            while "arrival 2" not in {task.get_name() for task in asyncio.all_tasks()}:  # noqa: ASYNC110
                await asyncio.sleep(0)
            released.append(time.perf_counter())
            number = len(began)
            return Timed(Answer(body["message"], "x", "warm", number, 2 * number), 0.0)

    options = load_test.parse_arguments(["long", "--url", "http://unused"])
    load = Load(options, Stub(), SessionMaker("x"), 1, 3, lambda: None)  # type: ignore[arg-type]
    await load.run_open(1000)
    assert len(began) == 3
    assert max(began) < min(released)


async def test_nodes_are_asked_by_turns() -> None:
    """Of several addresses each gets every other turn, whatever session it is of."""
    pretender, asked = Pretender(), Counter[str]()

    def node(name: str) -> TestServer:
        @web.middleware
        async def count(request: web.Request, handler: Any) -> web.StreamResponse:
            asked[name] += request.method == "POST"
            return await handler(request)

        app = pretender.routes("")
        app.middlewares.append(count)
        return TestServer(app)

    async with node("a") as a, node("b") as b:
        urls = f"{a.make_url('/')},{b.make_url('/')}"
        options = load_test.parse_arguments([*SMALL, "--url", urls])
        report = await load_test.drive(options)
    assert (report["errors"], report["wrong_answers"]) == ({}, 0)
    assert asked["a"] == asked["b"] > 0


async def test_long_session_compares_its_ends() -> None:
    """The figures of a long session hold its first turns, its last, and their ratio."""
    async with TestServer(Pretender().routes("")) as server:
        options = load_test.parse_arguments(["long", "--turns", "12", "--url", str(server.make_url("/"))])
        report = await load_test.drive(options)
    figures = report["rounds"][0]
    assert figures["growth"] == pytest.approx(figures["last_turns_ms"] / figures["first_turns_ms"])


def spread(low: float, high: float) -> dict[str, float]:
    return Spread((low + high) / 2, low, high).to_json()


def test_comparison_marks_what_is_beyond_the_spread() -> None:
    """Rounds that overlap mark nothing; those that do not are better or worse, each figure its own way."""
    a = {"figures": {name: spread(10, 12) for name in ("p50_ms", "p99_ms", "turns_per_s", "client_cpu")}}
    b = {"figures": {"p50_ms": spread(13, 14), "p99_ms": spread(12, 15), "turns_per_s": spread(13, 14)}}
    b["figures"]["client_cpu"] = spread(20, 30)
    ratios, verdicts = load_report.compare(a, b)
    assert ratios["p50_ms"] == pytest.approx(13.5 / 11)
    assert verdicts == {"p50_ms": "WORSE", "p99_ms": "", "turns_per_s": "better", "client_cpu": ""}


def test_names_are_all_different() -> None:
    """No two sessions have the same name, and every name is one that the check finds, whole."""
    sessions = SessionMaker("x").make(2000)
    assert len({session.name for session in sessions}) == 2000
    assert all(ANY_NAME.findall(f"a {session.name}, b") == [session.name] for session in sessions)
    assert ANY_NAME.fullmatch(make_name(0, True))


def test_wrong_arguments_are_refused() -> None:
    """Unknown figures, numbers out of range and processes that are not there: exit code 2."""
    for arguments in (
        ["--fail-over", "p98_ms=1"],
        ["--fail-over", "p99_ms"],
        ["--sessions", "0"],
        ["--sessions", "100001"],
        ["--rate", "0"],
        ["--header", "none"],
        ["--pid", "999999999"],
        ["--stream-share", "1.1"],
        ["nothing"],
    ):
        with pytest.raises(SystemExit) as ended:
            load_test.parse_arguments(arguments)
        assert ended.value.code == 2


# With the real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    with ServerProcess(folder, MODEL_PROVIDER="demo", AGENT_MAX_INSTANCES="4") as server:
        yield server


def load(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=90, check=False
    )


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != OVERLOAD])
def test_every_scenario_passes(server: ServerProcess, scenario: str) -> None:
    """The real server with the demo model answers every scenario without an error or a wrong answer."""
    options = ("--url", server.url, "--json", "-", *SMALL)
    ended = load(scenario, *options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert (report["errors"], report["wrong_answers"], report["turns"]) == ({}, 0, 2 * 8 * 4)
    if scenario == "churn":  # four places for eight sessions that take turns: every agent had gone
        assert report["figures"]["restored_share"]["median"] == pytest.approx(3 / 4)
    if scenario == "streams":
        figures = {name: each["median"] for name, each in report["figures"].items()}
        assert figures["chars_per_s"] >= figures["deltas_per_s"] > 0


def test_overload_is_measured_against_its_bounds(server: ServerProcess) -> None:
    """A server that is asked for less than it can passes; bounds that it cannot keep give exit code 3."""
    options = ("overload", "--url", server.url, "--pid", str(server.pid), "--concurrency", "4", "--json", "-")
    short = ("--sessions", "50", "--seconds", "1", "--peak-seconds", "1", "--warm-up", "0", "--times", "0.1")
    kept = (
        "--fail-under",
        "offered_per_s=1",
        "--fail-over",
        "recovery_s=5",
        "--fail-over",
        "watch_p99_ms=5000",
    )
    ended = load(*options, *short, *kept)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert (report["errors"], report["wrong_answers"]) == ({}, 0)
    assert 0 < report["figures"]["goodput"]["median"] < 0.5
    ended = load(*options, *short)
    assert ended.returncode == 3
    over = json.loads(ended.stdout)["over"]
    assert any(fault.startswith("goodput is") for fault in over)
    assert "refused_p99_ms was not measured" in over


def test_reports_are_written_and_compared(server: ServerProcess, tmp_path: Path) -> None:
    """A report in a file holds CPU and memory of the pid, and compares with itself as alike."""
    file = str(tmp_path / "a.json")
    ended = load("turns", "--url", server.url, "--pid", str(server.pid), "--json", file, *SMALL)
    assert ended.returncode == 0
    figures = json.loads(Path(file).read_text())["figures"]
    assert figures["cpu_ms_per_turn"]["high"] > 0
    assert 20 < figures["rss_before_mib"]["median"] < 1000
    assert "p99_ms" in ended.stdout
    alike = load("--compare", file, file, "--fail-over", "p99_ms=1", "--fail-under", "p99_ms=1")
    assert (alike.returncode, alike.stdout.count("WORSE"), alike.stdout.count("better")) == (0, 0, 0)
    assert load("--compare", file, file, "--fail-over", "p99_ms=0.9").returncode == 3
    assert load("--compare", file, str(tmp_path / "none.json")).returncode == 2


def test_echoing_model_must_repeat(tmp_path: Path) -> None:
    """With ``--expect-echo`` a model that says what it was sent passes, and one that does not is found."""
    with ModelServer() as model:
        settings = {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "x", "MODEL_PROVIDER": "openai"}
        with ServerProcess(tmp_path, OPENAI_MODEL="m", **settings) as server:
            options = ("--url", server.url, "--expect-echo", *SMALL)
            assert load("mixed", *options).returncode == 0
            model.script({"mode": "text", "text": "something else"})
            ended = load("turns", *options)
    assert ended.returncode == 1
    assert "wrong answers: 1\n" in ended.stdout


def test_no_server_is_one_line(tmp_path: Path) -> None:
    """Where no server answers, one line says so and the exit code is 1."""
    ended = load("--url", "http://127.0.0.1:1")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1)


def test_cpu_of_a_process_grows_with_its_work() -> None:
    """What is read of a process are its own CPU seconds and memory: this one's grow as it works."""
    before, own = load_process.read_cpu_s(os.getpid()), time.process_time()
    while time.process_time() - own < 0.2:
        pass
    assert 0.15 < load_process.read_cpu_s(os.getpid()) - before < 2
    assert load_process.read_rss_mib(os.getpid()) > 10
