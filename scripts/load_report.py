"""What people see of a run and of a comparison: tables on a terminal, plain lines elsewhere."""

import json
from collections.abc import Sequence
from typing import Any

from load_figures import FIGURES, HIGHER, NEITHER, Spread
from rich.console import Console
from rich.table import Table

BETTER, WORSE, SAME = "better", "WORSE", ""
BUSY_CLIENT = 0.9

Rows = Sequence[tuple[str, ...]]


def show(report: dict[str, Any], console: Console) -> None:
    """Show a run: its figures with their spread, then what went wrong."""
    rounds = report["rounds"]
    title = f"{report['scenario']}: {report['turns']} turns in {len(rounds)} round(s)"
    rows = [
        (name, shown(each["median"]), f"{shown(each['low'])} … {shown(each['high'])}")
        for name, each in report["figures"].items()
    ]
    show_rows(console, title, ("", "median", "of the rounds"), rows)
    if report["pool"]:
        say(console, f"pool: {json.dumps(report['pool'])}")
    if report["figures"]["client_cpu"]["median"] > BUSY_CLIENT:
        say(console, "the load test itself was busy all the time: the server may be faster than this says")
    say(console, f"errors: {json.dumps(report['errors'])}")
    say(console, f"wrong answers: {report['wrong_answers']}")
    for sentence in (*report["wrong_shown"], *report["over"]):
        say(console, f"  {sentence}")


def compare(a: dict[str, Any], b: dict[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the ratios b / a of the figures that both runs have, and which changed beyond the spread.

    That is when the rounds of one are all better than those of the other. A ratio to nothing is
    infinite, of nothing to nothing 1.
    """
    both = [name for name in FIGURES if name in a["figures"] and name in b["figures"]]
    ratios, verdicts = {}, {}
    for name in both:
        before, after = Spread(**a["figures"][name]), Spread(**b["figures"][name])
        ratios[name] = ratio_of(after.median, before.median)
        verdicts[name] = judge(name, before, after)
    return ratios, verdicts


def ratio_of(after: float, before: float) -> float:
    if before == 0:
        return 1.0 if after == 0 else float("inf")
    return after / before


def judge(name: str, before: Spread, after: Spread) -> str:
    if FIGURES[name] == NEITHER or (after.low <= before.high and before.low <= after.high):
        return SAME
    is_better = (after.low > before.high) == (FIGURES[name] == HIGHER)
    return BETTER if is_better else WORSE


def show_comparison(
    a: dict[str, Any], b: dict[str, Any], ratios: dict[str, float], verdicts: dict[str, str], console: Console
) -> None:
    rows = [
        (
            name,
            *(shown_spread(run["figures"][name]) for run in (a, b)),
            f"{ratio:.3f}",
            verdicts[name],
        )
        for name, ratio in ratios.items()
    ]
    show_rows(console, f"{a['scenario']} against {b['scenario']}", ("", "A", "B", "B / A", ""), rows)
    for name in sorted({*a["options"], *b["options"]}):
        old, new = a["options"].get(name), b["options"].get(name)
        if old != new:
            say(console, f"not alike: {name} was {old} in A, {new} in B")
    if min(len(a["rounds"]), len(b["rounds"])) == 1:
        say(console, "one round has no spread: what is marked may be chance")


def show_rows(console: Console, title: str, headings: tuple[str, ...], rows: Rows) -> None:
    if not console.is_terminal:
        widths = [max(len(row[n]) for row in (headings, *rows)) for n in range(len(headings))]
        say(console, title)
        for row in (headings, *rows):
            cells = [
                cell.rjust(width) if n else cell.ljust(width)
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            say(console, "  ".join(cells).rstrip())
        return
    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def shown_spread(each: dict[str, float]) -> str:
    return f"{shown(each['median'])} ({shown(each['low'])} … {shown(each['high'])})"


def shown(value: float) -> str:
    """Return four significant digits, all digits of greater numbers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
