"""``agentpool migrate-store``: opens two stores, has everything copied, and tells how far it is.

No line that is printed has a store's URL in it, which may hold a password.
"""

import os
import sys
from contextlib import AsyncExitStack
from typing import Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from app.config import Settings
from app.domain.errors import AgentPoolError, SnapshotUnreadable, StoreLocked
from app.domain.ids import SessionKey
from app.ports import Clock, MovableStore
from app.runtime import SystemClock, new_uuid7
from app.services.moving import Moved, Mover, MoveRefused
from app.stores.opening import Sharing, find_file, open_store

LINE_EVERY_S = 3.0
"""How often a line tells how far it is, where there is no terminal to draw a bar on."""


class WrongUsage(Exception):
    """What was asked for can never be done."""


class Failed(Exception):
    """It cannot be done now, or has gone wrong; the message is one line."""


class View(Protocol):
    """Shows how far a copy is."""

    def show(self, moved: Moved) -> None: ...


async def migrate(settings: Settings, source: str, target: str, *, force: bool, skip_broken: bool) -> bool:
    """Copy the store that the URL ``source`` names to ``target``; say whether that was good.

    ``force``: also if a server announces itself in either. ``skip_broken``: sessions that
    cannot be read make it no failure. What is wrong, and what was done, is printed.

    Raises:
        WrongUsage: a URL names no store, or not one that can be meant.
    """
    clock = SystemClock()
    stores = _named(settings, source, target)
    began = clock.monotonic()
    try:
        async with AsyncExitStack() as stack:
            for name, store in stores.items():
                await open_unused(stack, name, store, force=force)
            moved = await _move(stack, stores["FROM"], stores["TO"], clock)
    except Failed as failure:
        typer.echo(f"agentpool: {failure}", err=True)
        return False
    return _report(moved, clock.monotonic() - began, skip_broken=skip_broken)


def _named(settings: Settings, source: str, target: str) -> dict[str, MovableStore]:
    stores, sharing = {}, Sharing(settings.lease_s, settings.accept_volatile)
    for name, url in (("FROM", source), ("TO", target)):
        if url.startswith("memory:"):
            raise WrongUsage(f"{name}: memory:// keeps nothing, so there is nothing to move")
        try:
            stores[name] = open_store(url, settings.life_span(), sharing=sharing, keys=settings.key_ring())
        except ValueError as error:
            raise WrongUsage(f"{name}: {error}") from error
    path, other = find_file(source), find_file(target)
    if path is not None and not os.path.exists(path):
        raise WrongUsage("FROM: there is no such file")
    if source == target or (path and other and os.path.realpath(path) == os.path.realpath(other)):
        raise WrongUsage("FROM and TO are the same store")
    return stores


async def open_unused(stack: AsyncExitStack, name: str, store: MovableStore, *, force: bool) -> None:
    """Open ``store``, which the messages call ``name``; ``stack`` closes it.

    Raises:
        Failed: it cannot be opened, or a server announces itself in it and ``force`` is not given.
    """
    try:
        await store.open(new_uuid7())
        stack.push_async_callback(store.close)
        nodes = await store.leases.nodes() if store.leases is not None else ()
    except (StoreLocked, AgentPoolError, ValueError) as error:
        raise Failed(f"{name}: {error}") from error
    if nodes and not force:
        raise Failed(
            f"{name}: {len(nodes)} server(s) use it, or did half a minute ago; stop them, or --force"
        )


async def _move(stack: AsyncExitStack, source: MovableStore, target: MovableStore, clock: Clock) -> Moved:
    view = make_view(stack, source.session_count_nowait(), clock, "copied")
    mover = Mover(source, target, view.show)
    try:
        await mover.check()
        return await mover.copy()
    except MoveRefused as refusal:
        raise Failed(f"TO: {refusal}; use an empty store") from refusal
    except SnapshotUnreadable as error:
        raise Failed(
            "FROM: the state of users and applications is broken; the sessions are copied"
        ) from error
    except AgentPoolError as error:
        raise Failed(f"{error} What is copied stays; repeat it.") from error


def _report(moved: Moved, took_s: float, *, skip_broken: bool) -> bool:
    tell_counts(moved, took_s)
    for key in moved.unreadable:
        typer.echo(f"agentpool: {shown(key)} cannot be read and is not copied", err=True)
    for key in moved.differing:
        typer.echo(f"agentpool: {shown(key)} differs in TO", err=True)
    if not moved.is_verified:
        typer.echo("agentpool: NOT verified: TO has not what FROM has; repeat it", err=True)
        return False
    typer.echo(f"verified; unreadable: {len(moved.unreadable)}" if moved.unreadable else "verified")
    return skip_broken or not moved.unreadable


def tell_counts(moved: Moved, took_s: float) -> None:
    usage = f", {moved.users:,} users' usage" if moved.users else ""
    rates = f"{moved.sessions / took_s:,.0f} sessions/s, {moved.turns / took_s:,.0f} turns/s"
    typer.echo(
        f"{moved.sessions:,} sessions, {moved.turns:,} turns, {moved.checkpoints:,} checkpoints,"
        f" {moved.notes:,} notes, {moved.events:,} events, {moved.states:,} states of users and applications"
        f"{usage}; {moved.json_bytes:,} bytes of JSON in {took_s:.1f} s ({rates})"
    )


def shown(key: SessionKey) -> str:
    return f"session {key.session_id!r}" + (f" of {key.owner!r}" if key.owner else "")


def make_view(stack: AsyncExitStack, total: int | None, clock: Clock, done: str) -> View:
    """Return what shows how many of ``total`` sessions are ``done``; ``stack`` closes it."""
    console = Console(file=sys.stderr)
    return _Bar(stack, console, total) if console.is_terminal else Lines(total, clock, done)


class _Bar:
    """A bar, for a terminal."""

    def __init__(self, stack: AsyncExitStack, console: Console, total: int | None) -> None:
        columns = TextColumn("sessions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = stack.enter_context(Progress(*columns, console=console))
        self._task = self._progress.add_task("sessions", total=total)

    def show(self, moved: Moved) -> None:
        self._progress.update(self._task, completed=moved.sessions + len(moved.unreadable))


class Lines:
    """A line now and then, for a log."""

    def __init__(self, total: int | None, clock: Clock, done: str) -> None:
        self._clock = clock
        self._done = done
        self._total = "" if total is None else f" of {total:,}"
        self._due = clock.monotonic() + LINE_EVERY_S

    def show(self, moved: Moved) -> None:
        if self._clock.monotonic() >= self._due:
            self._due = self._clock.monotonic() + LINE_EVERY_S
            typer.echo(f"{moved.sessions:,}{self._total} sessions {self._done}", err=True)
