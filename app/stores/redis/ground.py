"""What a server must be before anything is stored on it: a primary that keeps what it acknowledged."""

import asyncio
import logging

from redis.exceptions import NoPermissionError

from app.domain.errors import StoreUnavailable
from app.stores.redis.wire import Wire, end_tasks

_OLDEST = (6, 2)
_WAITAOF_SINCE = (7, 2)

_log = logging.getLogger(__name__)

_POLICY = "Redis may evict sessions: maxmemory is set and maxmemory-policy is not noeviction."
_VOLATILE = "Redis does not keep what it acknowledged: appendonly is not on."


async def check_ground(wire: Wire, *, accept_volatile: bool, fsync_wait_ms: int) -> None:
    """Refuse a server on which what was acknowledged could get lost.

    Asks ``INFO`` alone, which managed services allow; what it does not say is warned of.

    Raises:
        ValueError: it is one, or no single primary, or too old.
        StoreUnavailable: it does not answer.
    """
    info = await _ask(wire)
    version = _version(info.get("redis_version", ""))
    if info and version < _OLDEST:
        raise ValueError("Redis must be 6.2 or later.")
    if info.get("cluster_enabled") == "1":
        raise ValueError("Redis Cluster is not supported: the store needs one primary.")
    if info.get("role") not in (None, "master"):
        raise ValueError("This Redis is a replica: the store needs the primary.")
    if fsync_wait_ms and version < _WAITAOF_SINCE:
        raise ValueError("Waiting for the append-only file needs Redis 7.2 or later.")
    has_limit = info.get("maxmemory", "0") != "0"
    _judge(_POLICY, info.get("maxmemory_policy"), has_limit and info.get("maxmemory_policy") != "noeviction",
           accept_volatile=accept_volatile)  # fmt: skip
    appends = info.get("aof_enabled")
    _judge(_VOLATILE, appends, appends != "1", accept_volatile=accept_volatile)


async def _ask(wire: Wire) -> dict[str, str]:
    """Return what the server says of itself, nothing if this user may not ask."""
    try:
        raw = await wire.call("INFO")
    except StoreUnavailable as error:
        if isinstance(error.__cause__, NoPermissionError):
            return {}
        raise
    lines = (line.partition(":") for line in raw.decode("utf-8", "replace").splitlines())
    return {name: value.strip() for name, separator, value in lines if separator}


def _judge(complaint: str, said: str | None, is_bad: bool, *, accept_volatile: bool) -> None:
    if said is None:
        _log.warning("Redis does not say whether this is so: %s", complaint)
    elif is_bad and not accept_volatile:
        raise ValueError(complaint)
    elif is_bad:
        _log.warning("ACKNOWLEDGED TURNS MAY GET LOST. %s", complaint)


class Fence:
    """Waits until what was written is on disk, with as few questions as there are answers.

    ``WAITAOF`` speaks of what its own connection wrote, and blocks that. So a connection of its own
    writes a mark behind what is to be waited for, and waits for that: a round. Who comes meanwhile shares
    the next, and whoever shares a round shares what becomes of it.
    """

    def __init__(self, wire: Wire, prefix: str, wait_ms: int) -> None:
        self._wire = wire
        self._mark = f"{prefix}:fence"
        self._wait_ms = wait_ms
        # A store may not know TaskOwner: rounds are the fence's, which ends them.
        self._running: asyncio.Task[bool] | None = None
        self._next: asyncio.Task[bool] | None = None

    async def wait(self) -> None:
        """Return when what was acknowledged before is in the append-only file.

        Cancelled, it leaves the round to the others.

        Raises:
            StoreUnavailable: not in ``wait_ms``; it is written, but may get lost.
        """
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(
                self._round(self._running), name="redis:fence"
            )
        mine = self._next
        # One limit for what is left of the round before and for this one; neither ends with who waits.
        await asyncio.wait([mine], timeout=self._wait_ms / 1000)
        if not mine.done() or mine.cancelled() or not mine.result():
            raise StoreUnavailable("Redis did not get the write to disk in time.", outcome_unknown=True)

    async def close(self) -> None:
        """End the rounds; who waits for one is told that it failed."""
        await end_tasks([task for task in (self._next, self._running) if task is not None])

    async def _round(self, before: "asyncio.Task[bool] | None") -> bool:
        try:
            if before is not None:
                await asyncio.wait([before])
            # Who asks from now on has written behind the mark.
            self._running, self._next = self._next, None
            # In one breath: on another connection than the mark's, WAITAOF would wait for nothing.
            _, written = await asyncio.gather(
                self._wire.call("SET", self._mark, 1, writes=True),
                self._wire.call("WAITAOF", 1, 0, self._wait_ms, repeats=False, writes=True),
            )
        except StoreUnavailable as error:
            _log.debug("no answer whether what was written is on disk: %s", error)
            return False
        return bool(written[0] >= 1)


def _version(text: str) -> tuple[int, int]:
    major, _, rest = text.partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)
