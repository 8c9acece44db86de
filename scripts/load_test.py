"""Drive a running server with many sessions at once and prove that none hears another.

    python3 scripts/dev.py load-test [turns|streams|long|churn|mixed] [--url URL] [--pid PID]
        [--rate 200] [--rounds 3] [--json FILE] [--fail-over p99_ms=250]
    python3 scripts/dev.py load-test overload [--pid PID] [--times 5] [--seconds 60] [--peak-seconds 10]
    python3 scripts/dev.py load-test --compare A.json B.json

Every answer is checked: its name and its counts must be the session's own (``load_session``).
What is measured is the median of several rounds, after a warm-up. Without ``--rate`` the loop
is closed: a turn begins when one before it has ended. With it turns begin at their own times,
and latencies count from those.

Exit codes: 0 all was well; 1 an answer was wrong, a turn failed (unless ``--fail-over errors=N``
allows as many) or no server answered; 2 the arguments are wrong; 3 a figure is beyond a bound.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import load_overload
import load_process
from load_client import Client, open_client
from load_figures import Figures, Threshold, Used, figures_of, spreads_of
from load_report import compare, show, show_comparison
from load_scenario import OVERLOAD, SCENARIOS, Load, Tally
from load_session import MAX_SESSIONS, SessionMaker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

WELL, WRONG, USAGE, BEYOND = 0, 1, 2, 3
WRONG_SHOWN = 5
# The options that make two runs comparable.
ASKED = (
    *("sessions", "turns", "concurrency", "rate", "rounds", "warm_up", "seed"),
    *("stream_share", "in_order", "is_mixed", "length_median", "length_sigma", "expect_echo"),
    *("times", "seconds"),
)


# The run


async def drive(options: argparse.Namespace) -> dict[str, Any]:
    """Carry out the run that ``parse_arguments`` describes; return its report.

    Raises:
        aiohttp.ClientError, TimeoutError: no server answers.
    """
    maker = SessionMaker(f"{int(time.time() * 1000):x}{random.randrange(16**3):03x}")
    total = options.sessions * options.turns * options.rounds + options.concurrency * options.warm_up
    if options.scenario == OVERLOAD:
        return await drive_overload(options, maker)
    async with open_client(options) as client:
        before = await client.find_stats()
        with make_progress(options) as progress:
            advance = partial(progress.advance, progress.add_task(options.scenario, total=total))
            tallies, rounds = await run_rounds(options, client, maker, advance)
        after = await client.find_stats()
    return make_report(options, tallies, rounds, pool_change(before, after) if before and after else None)


async def drive_overload(options: argparse.Namespace, maker: SessionMaker) -> dict[str, Any]:
    client_s = time.process_time()
    async with load_overload.open_watch() as http:
        stages, figures, errors = await load_overload.run(options, maker, http)
    measured_s = sum(stage.duration_s for stage in stages)
    figures |= {"client_cpu": (time.process_time() - client_s) / measured_s}
    tally = Tally(errors=errors, wrong=[sentence for stage in stages for sentence in stage.wrong])
    report = make_report(options, [tally], [figures], None)
    return report | {"turns": sum(len(stage.finished) for stage in stages)}


async def run_rounds(
    options: argparse.Namespace, client: Client, maker: SessionMaker, advance: Callable[[], None]
) -> tuple[list[Tally], list[Figures]]:
    """Warm up, then measure. The first tally is that of the warm-up: it is checked, not measured."""
    warm_up = Load(options, client, maker, options.concurrency, options.warm_up, advance)
    if options.warm_up:
        await warm_up.run_closed(options.concurrency)
    tallies, rounds = [warm_up.tally], []
    for _ in range(options.rounds):
        load = Load(options, client, maker, options.sessions, options.turns, advance)
        used = await measure(options, load)
        tallies.append(load.tally)
        turns = options.turns if options.scenario == "long" else None
        rounds.append(figures_of(load.tally, used, turns))
    return tallies, rounds


async def measure(options: argparse.Namespace, load: Load) -> Used:
    """Run one round; return what it used."""
    pid = options.pid
    client_s = time.process_time()
    rss_mib, cpu_s = (load_process.read_rss_mib(pid), load_process.read_cpu_s(pid)) if pid else (None, None)
    await (load.run_open(options.rate) if options.rate else load.run_closed(options.concurrency))
    client_s = time.process_time() - client_s
    if cpu_s is None:
        return Used(client_s)
    return Used(client_s, load_process.read_cpu_s(pid) - cpu_s, rss_mib, load_process.read_rss_mib(pid))


def make_progress(options: argparse.Namespace) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=options.quiet or not console.is_terminal,
    )


def make_report(
    options: argparse.Namespace, tallies: list[Tally], rounds: list[Figures], pool: dict[str, Any] | None
) -> dict[str, Any]:
    errors = sum((tally.errors for tally in tallies), Counter[str]())
    wrong = [sentence for tally in tallies for sentence in tally.wrong]
    spreads = spreads_of(rounds)
    values = {name: spread.median for name, spread in spreads.items()}
    values |= {"errors": errors.total(), "wrong": len(wrong)}
    return {
        "scenario": options.scenario,
        "options": {name: getattr(options, name) for name in ASKED},
        "turns": sum(tally.turns for tally in tallies[1:]),
        "figures": {name: spread.to_json() for name, spread in spreads.items()},
        "rounds": rounds,
        "errors": dict(errors.most_common()),
        "wrong_answers": len(wrong),
        "wrong_shown": wrong[:WRONG_SHOWN],
        "pool": pool,
        "over": [fault for each in options.thresholds if (fault := each.find_fault(values))],
    }


def pool_change(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what the pool counted meanwhile, and its size at the end."""
    grown = {name: after[name] - before[name] for name in ("hits", "misses", "restores") if name in before}
    evictions = {
        cause: count - before["evictions"].get(cause, 0) for cause, count in after["evictions"].items()
    }
    size = {name: after.get(name) for name in ("total_agents", "max_agents", "memory")}
    return grown | {"evictions": evictions} | size


def exit_code(report: dict[str, Any], options: argparse.Namespace) -> int:
    allows_errors = any(each.name == "errors" for each in options.thresholds)
    if report["wrong_answers"] or not report["turns"] or (report["errors"] and not allows_errors):
        return WRONG
    return BEYOND if report["over"] else WELL


# The command


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options, those of the scenario filled in."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        uppers = [Threshold.parse(text, is_upper=True) for text in options.fail_over]
        options.thresholds = uppers + [Threshold.parse(text, is_upper=False) for text in options.fail_under]
    except ValueError as error:
        parser.error(str(error))
    if options.scenario == OVERLOAD:
        options.thresholds = options.thresholds or list(load_overload.PROMISED)
    scenario = SCENARIOS[options.scenario]
    for name in ("sessions", "turns", "concurrency", "stream_share"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(scenario, name))
    options.in_order, options.is_mixed = scenario.in_order, scenario.is_mixed
    if refusal := find_refusal(options):
        parser.error(refusal)
    return options


def find_refusal(options: argparse.Namespace) -> str | None:
    if min(options.sessions, options.turns, options.concurrency, options.rounds) < 1 or options.warm_up < 0:
        return "sessions, turns, concurrency and rounds: at least 1; warm-up: at least 0"
    if options.sessions * options.rounds + options.concurrency > MAX_SESSIONS:
        return f"at most {MAX_SESSIONS} sessions in all rounds together: there are no more names"
    if options.rate is not None and options.rate <= 0:
        return "a rate is more than 0 turns per second"
    if not 0 <= options.stream_share <= 1 or options.length_median <= 0 or options.length_sigma < 0:
        return "stream-share: 0 to 1; length-median: more than 0; length-sigma: at least 0"
    if any(":" not in header for header in options.header):
        return "a header is NAME:VALUE"
    if options.pid is not None and not load_process.can_read(options.pid):
        return f"there is no process {options.pid}, or this system has no /proc"
    return None


def make_parser() -> argparse.ArgumentParser:
    scenarios = "\n".join(f"  {name:9} {each.summary}" for name, each in SCENARIOS.items())
    parser = argparse.ArgumentParser(
        prog="dev.py load-test",
        description=f"{(__doc__ or '').partition(chr(10))[0]}\n\nscenarios:\n{scenarios}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", nargs="?", choices=SCENARIOS, default="turns", help="%(default)s if none")
    add_server(parser)
    add_load(parser)
    add_results(parser)
    return parser


def add_server(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the server").add_argument
    add("--url", default="http://127.0.0.1:8000", help="its address (%(default)s), or its nodes': URL,URL")
    add("--prefix", default="", help="what the routes are mounted under, as /api")
    add("--header", action="append", default=[], metavar="NAME:VALUE", help="for every request")
    add("--timeout", type=float, default=120, help="seconds for one turn (%(default)s)")
    add("--pid", type=int, help="its process on this machine: CPU per turn and memory are measured")
    add("--expect-echo", action="store_true", help="replies must repeat what was said")


def add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the load; what is left out is the scenario's").add_argument
    add("--sessions", type=int, help="how many sessions a round has")
    add("--turns", type=int, help="turns of each session")
    add("--concurrency", type=int, help="turns at a time")
    add("--rate", type=float, help="turns that begin per second instead, however many run")
    add("--stream-share", type=float, help="share of streamed turns")
    add("--stream", dest="stream_share", action="store_const", const=1.0, help="stream every turn")
    add("--length-median", type=float, default=80, help="mixed: characters (%(default)s)")
    add("--length-sigma", type=float, default=1.2, help="mixed: of their logarithm (%(default)s)")
    add("--times", type=float, default=5, help="overload: so many times the peak (%(default)s)")
    add("--seconds", type=float, default=60, help="overload: for so long (%(default)s)")
    add("--peak-seconds", type=float, default=10, help="overload: the peak is measured for (%(default)s)")
    add("--rounds", type=int, default=3, help="each with fresh sessions (%(default)s)")
    add("--warm-up", type=int, default=3, help="unmeasured turns of each client at first (%(default)s)")
    add("--seed", type=int, default=1, help="of order, arrivals and lengths (%(default)s)")


def add_results(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the results").add_argument
    add("--json", metavar="FILE", help="write the report there; - prints it instead of the table")
    add("--fail-over", action="append", default=[], metavar="NAME=NUMBER", help="exit code 3 if it is over")
    add("--fail-under", action="append", default=[], metavar="NAME=NUMBER", help="exit code 3 if it is under")
    add("--compare", nargs=2, metavar=("A", "B"), help="compare two reports; bounds are then of B / A")
    add("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    try:
        with asyncio.Runner(loop_factory=find_loop_factory()) as runner:
            report = runner.run(drive(options))
    except (aiohttp.ClientError, TimeoutError) as error:
        return give_up(f"no server answers at {options.url} ({type(error).__name__})")
    except (FileNotFoundError, ProcessLookupError):
        return give_up(f"process {options.pid} has ended")
    if options.json not in (None, "-"):
        Path(options.json).write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    if options.json == "-":
        print(json.dumps(report, ensure_ascii=False))
    else:
        show(report, Console())
    return exit_code(report, options)


def run_comparison(options: argparse.Namespace) -> int:
    try:
        a, b = (json.loads(Path(name).read_text(encoding="utf-8")) for name in options.compare)
        ratios, verdicts = compare(a, b)
        show_comparison(a, b, ratios, verdicts, Console())
    except (OSError, ValueError, LookupError, TypeError) as error:
        give_up(f"these are not two reports ({type(error).__name__}: {error})")
        return USAGE
    faults = [fault for each in options.thresholds if (fault := each.find_fault(ratios))]
    for fault in faults:
        print(f"ratio: {fault}")
    return BEYOND if faults else WELL


def find_loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return the server's kind of event loop, which leaves it more of the machine; ``None`` without it."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def give_up(reason: str) -> int:
    print(f"load-test: {reason}", file=sys.stderr)
    return WRONG


def main() -> NoReturn:
    options = parse_arguments()
    try:
        sys.exit(run_comparison(options) if options.compare else run(options))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
