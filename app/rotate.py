"""``agentpool rotate-keys``: has everything in the store encrypted with the first key.

The store moves into itself: each session is read, with whatever key it has, and stored again in its
own place in one step. So a process that is killed leaves every session readable by the ring that it
had, and whoever repeats it begins anew. Where there are leases it leaves some sessions leased, for
``HOLD_S`` at most.
"""

import os
from contextlib import AsyncExitStack

import typer

from app.config import Settings
from app.domain.errors import AgentPoolError
from app.migrate import Failed, WrongUsage, make_view, open_unused, shown, tell_counts
from app.ports import MovableStore
from app.runtime import SystemClock, new_uuid7
from app.services.moving import Moved, Rewriter
from app.stores.opening import Sharing, find_file, open_store

HOLD_S = 60.0
"""How long a session is had without renewal: longer than it takes to write the largest one."""


async def rotate(settings: Settings, *, force: bool, skip_broken: bool) -> bool:
    """Encrypt all that is in the store with the first of the keys; say whether that was good.

    ``force``: also if a server announces itself there, before or meanwhile. ``skip_broken``: neither what
    cannot be read, and so is left as it is, nor a database that does not let its files be scrubbed makes it
    a failure. What is wrong, and what was done, is printed.

    Raises:
        WrongUsage: there is no key, or no store that keeps anything.
    """
    clock, store = SystemClock(), _open(settings)
    began = clock.monotonic()
    try:
        async with AsyncExitStack() as stack:
            await open_unused(stack, "STORE_URL", store, force=force)
            view = make_view(stack, store.session_count_nowait(), clock, "encrypted")
            moved = await _encrypt(Rewriter(store, view.show, new_uuid7()))
            is_scrubbed = await _scrub(store)
            came = () if force or store.leases is None else await store.leases.nodes()
    except (Failed, AgentPoolError) as failure:
        typer.echo(f"agentpool: {failure}", err=True)
        return False
    is_whole = _report(moved, clock.monotonic() - began, servers=len(came))
    is_clean = is_scrubbed and not moved.unreadable and not moved.broken_states
    return is_whole and (is_clean or skip_broken)


def _open(settings: Settings) -> MovableStore:
    url, keys = settings.store_url, settings.key_ring()
    if keys is None:
        raise WrongUsage("ENCRYPTION_KEYS is not set: there is no key to encrypt with")
    if url.startswith("memory:"):
        raise WrongUsage("STORE_URL: memory:// keeps nothing, so there is nothing to encrypt")
    path = find_file(url)
    if path is not None and not os.path.exists(path):
        raise WrongUsage("STORE_URL: there is no such file")
    sharing = Sharing(max(settings.lease_s, HOLD_S), settings.accept_volatile)
    try:
        return open_store(url, settings.life_span(), sharing=sharing, keys=keys)
    except ValueError as error:
        raise WrongUsage(f"STORE_URL: {error}") from error


async def _encrypt(rewriter: Rewriter) -> Moved:
    try:
        return await rewriter.copy()
    except AgentPoolError as error:
        raise Failed(f"{error} Nothing is lost; repeat it with the same keys.") from error


async def _scrub(store: MovableStore) -> bool:
    try:
        await store.scrub()
    except AgentPoolError as error:
        typer.echo(
            f"agentpool: warning: the database may still hold what it was before: {error} Repeat it, or have"
            " the database write its files anew (PostgreSQL: VACUUM FULL, Redis: BGREWRITEAOF and BGSAVE)",
            err=True,
        )
        return False
    return True


def _report(moved: Moved, took_s: float, *, servers: int) -> bool:
    """Say whether all that can be read is encrypted."""
    tell_counts(moved, took_s)
    for key in moved.unreadable:
        typer.echo(f"agentpool: {shown(key)} cannot be read and is left as it is", err=True)
    if moved.broken_states:
        typer.echo(
            f"agentpool: {moved.broken_states} states of users or applications cannot be read"
            " and are left as they are",
            err=True,
        )
    for key in moved.differing:
        typer.echo(f"agentpool: {shown(key)} reads differently now", err=True)
    for key in moved.busy:
        typer.echo(f"agentpool: {shown(key)} is in use and is left as it is", err=True)
    if servers:
        typer.echo(f"agentpool: {servers} server(s) have begun to use it; stop them", err=True)
    if servers or not moved.is_verified:
        typer.echo("agentpool: NOT verified: something has changed meanwhile; repeat it", err=True)
        return False
    is_all = not moved.unreadable and not moved.broken_states
    typer.echo("encrypted with the first key" + ("" if is_all else ", but for what cannot be read"))
    return True
