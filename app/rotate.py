"""``agentpool rotate-keys``: has everything in the store encrypted with the first key.

The store moves into itself: each session is read, with whatever key it has, and stored again in its
own place in one step. So a process that is killed leaves every session readable by the ring that it
had, and whoever repeats it begins anew.
"""

import os
from contextlib import AsyncExitStack

import typer

from app.config import Settings
from app.domain.errors import AgentPoolError, SnapshotUnreadable
from app.migrate import Failed, WrongUsage, make_view, open_unused, shown, tell_counts
from app.ports import MovableStore
from app.runtime import SystemClock
from app.services.moving import Moved, Mover
from app.stores.opening import Sharing, find_file, open_store


async def rotate(settings: Settings, *, force: bool, skip_broken: bool) -> bool:
    """Encrypt all that is in the store with the first of the keys; say whether that was good.

    ``force``: also if a server announces itself there. ``skip_broken``: sessions that cannot be
    read, and so are left as they are, make it no failure. What is wrong, and what was done, is printed.

    Raises:
        WrongUsage: there is no key, or no store that keeps anything.
    """
    clock, store = SystemClock(), _open(settings)
    began = clock.monotonic()
    try:
        async with AsyncExitStack() as stack:
            await open_unused(stack, "STORE_URL", store, force=force)
            view = make_view(stack, store.session_count_nowait(), clock, "encrypted")
            moved = await _encrypt(store, Mover(store, store, view.show))
    except Failed as failure:
        typer.echo(f"agentpool: {failure}", err=True)
        return False
    return _report(moved, clock.monotonic() - began, skip_broken=skip_broken)


def _open(settings: Settings) -> MovableStore:
    url, keys = settings.store_url, settings.key_ring()
    if keys is None:
        raise WrongUsage("ENCRYPTION_KEYS is not set: there is no key to encrypt with")
    if url.startswith("memory:"):
        raise WrongUsage("STORE_URL: memory:// keeps nothing, so there is nothing to encrypt")
    path = find_file(url)
    if path is not None and not os.path.exists(path):
        raise WrongUsage("STORE_URL: there is no such file")
    sharing = Sharing(settings.lease_s, settings.accept_volatile)
    try:
        return open_store(url, settings.life_span(), sharing=sharing, keys=keys)
    except ValueError as error:
        raise WrongUsage(f"STORE_URL: {error}") from error


async def _encrypt(store: MovableStore, mover: Mover) -> Moved:
    try:
        moved = await mover.copy()
    except SnapshotUnreadable as error:
        raise Failed(
            "the state of users and applications cannot be read and is left as it is;"
            " the sessions are encrypted"
        ) from error
    except AgentPoolError as error:
        raise Failed(f"{error} Nothing is lost; repeat it with the same keys.") from error
    try:
        await store.scrub()
    except AgentPoolError as error:
        raise Failed(
            f"{error} All is encrypted, but the database may still hold what it was before; repeat it."
        ) from error
    return moved


def _report(moved: Moved, took_s: float, *, skip_broken: bool) -> bool:
    tell_counts(moved, took_s)
    for key in moved.unreadable:
        typer.echo(f"agentpool: {shown(key)} cannot be read and is left as it is", err=True)
    for key in moved.differing:
        typer.echo(f"agentpool: {shown(key)} reads differently now", err=True)
    if not moved.is_verified:
        typer.echo("agentpool: NOT verified: something has changed meanwhile; repeat it", err=True)
        return False
    typer.echo("encrypted with the first key" + (", but for what cannot be read" * bool(moved.unreadable)))
    return skip_broken or not moved.unreadable
