"""Figures of a round and of a run: names, percentiles, medians with their spread, thresholds.

A figure that was not measured is absent. ``FIGURES`` names all of them in the order in which
they are shown, and says which way is better.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from load_scenario import Tally

PERCENTILES = (50, 95, 99)
EDGE = 5  # turns at either end of a long session; one alone says little on a busy machine

LOWER, HIGHER, NEITHER = "lower", "higher", "neither"
FIGURES = {
    "turns_per_s": HIGHER,
    "peak_per_s": HIGHER,
    "offered_per_s": NEITHER,
    "goodput": HIGHER,
    "recovery_s": LOWER,
    **{f"p{p}_ms": LOWER for p in PERCENTILES},
    "max_ms": LOWER,
    **{f"refused_p{p}_ms": LOWER for p in PERCENTILES},
    **{f"watch_p{p}_ms": LOWER for p in PERCENTILES},
    **{f"first_token_p{p}_ms": LOWER for p in PERCENTILES},
    **{f"gap_p{p}_ms": LOWER for p in PERCENTILES},
    "deltas_per_s": NEITHER,
    "chars_per_s": HIGHER,
    **{f"{came}_p{p}_ms": LOWER for came in ("new", "warm", "restored") for p in PERCENTILES},
    "restored_share": NEITHER,
    "first_turns_ms": LOWER,
    "last_turns_ms": LOWER,
    "growth": LOWER,
    "cpu_ms_per_turn": LOWER,
    "cpu_us_per_char": LOWER,
    "rss_before_mib": LOWER,
    "rss_after_mib": LOWER,
    "rss_grown_mib": LOWER,
    "client_cpu": NEITHER,
    "errors": LOWER,
    "wrong": LOWER,
}

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Used:
    """What a round used: CPU seconds of the client, and of the server when its pid is known."""

    client_cpu_s: float
    server_cpu_s: float | None = None
    rss_before_mib: float | None = None
    rss_after_mib: float | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure of several rounds."""

    median: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Threshold:
    """A bound that a figure must keep; ``is_upper``: it must not be over it."""

    name: str
    bound: float
    is_upper: bool

    @classmethod
    def parse(cls, text: str, *, is_upper: bool) -> "Threshold":
        """Read ``NAME=NUMBER``.

        Raises:
            ValueError: it is not of that form, or there is no such figure.
        """
        name, _, bound = text.partition("=")
        if name not in FIGURES:
            raise ValueError(f"there is no figure {name!r}; there are {', '.join(FIGURES)}")
        return cls(name, float(bound), is_upper)

    def find_fault(self, values: Mapping[str, float]) -> str | None:
        """Return a sentence if ``values`` do not keep the bound; what was not measured does not."""
        value = values.get(self.name)
        if value is None:
            return f"{self.name} was not measured"
        if math.isnan(value) or (value > self.bound if self.is_upper else value < self.bound):
            return f"{self.name} is {value:g}, {'over' if self.is_upper else 'under'} {self.bound:g}"
        return None


def figures_of(tally: Tally, used: Used, turns: int | None = None) -> Figures:
    """Return what a round measured; with ``turns``, the length of its sessions, also how they grew."""
    everything = [each for latencies in tally.latencies.values() for each in latencies]
    duration_s = tally.duration_s or math.inf
    figures = {"turns_per_s": len(everything) / duration_s}
    figures |= percentiles("", (latency for _, latency in everything))
    if everything:
        figures["max_ms"] = 1000 * max(latency for _, latency in everything)
        figures["restored_share"] = len(tally.latencies.get("restored", ())) / len(everything)
    figures |= percentiles("first_token_", tally.first_tokens) | percentiles("gap_", tally.gaps)
    if tally.deltas:
        figures["deltas_per_s"] = tally.deltas / duration_s
        figures["chars_per_s"] = tally.characters / duration_s
    for came in ("new", "warm", "restored"):
        figures |= percentiles(f"{came}_", (latency for _, latency in tally.latencies.get(came, ())))
    if turns is not None:
        figures |= growth_of(everything, turns)
    figures |= costs_of(tally, used)
    figures |= {"client_cpu": used.client_cpu_s / duration_s}
    return figures | {"errors": tally.errors.total(), "wrong": len(tally.wrong)}


def percentiles(prefix: str, times_s: Iterable[float]) -> Figures:
    """Return the nearest-rank percentiles in milliseconds."""
    ordered = sorted(times_s)
    if not ordered:
        return {}
    return {f"{prefix}p{p}_ms": 1000 * ordered[-(-len(ordered) * p // 100) - 1] for p in PERCENTILES}


def growth_of(latencies: Iterable[tuple[int, float]], turns: int) -> Figures:
    """Return the medians of the first turns and of the last of ``turns``, and their ratio."""
    timed = list(latencies)
    first = [latency for turn, latency in timed if turn <= EDGE]
    last = [latency for turn, latency in timed if turn > turns - EDGE]
    if not first or not last:
        return {}
    early, late = statistics.median(first), statistics.median(last)
    return {"first_turns_ms": 1000 * early, "last_turns_ms": 1000 * late, "growth": late / early}


def costs_of(tally: Tally, used: Used) -> Figures:
    figures: Figures = {}
    if used.server_cpu_s is not None and tally.turns:
        figures["cpu_ms_per_turn"] = 1000 * used.server_cpu_s / tally.turns
        if tally.characters and len(tally.first_tokens) == tally.turns:  # else not all of it was streamed
            figures["cpu_us_per_char"] = 1e6 * used.server_cpu_s / tally.characters
    if used.rss_before_mib is not None and used.rss_after_mib is not None:
        figures |= {"rss_before_mib": used.rss_before_mib, "rss_after_mib": used.rss_after_mib}
    return figures


def spreads_of(rounds: list[Figures]) -> dict[str, Spread]:
    """Return each figure's median, least and greatest, in the order of ``FIGURES``."""
    found = {name: [each[name] for each in rounds if name in each] for name in FIGURES}
    return {
        name: Spread(statistics.median(values), min(values), max(values))
        for name, values in found.items()
        if values
    }
