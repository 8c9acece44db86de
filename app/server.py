"""One server process: listen, open, say where, serve; on a signal drain, then close.

The end has an order, which ``PoolServer.shutdown`` is:

1. turns that come and turns that wait are refused, or, where the store is shared, passed on to
   another node; every answer says ``Connection: close``;
2. running turns end, and answers that come from other nodes, for ``DRAIN_TIMEOUT_S`` at most or
   until a second signal;
3. the others are cancelled, and what they have said is kept;
4. answers that are being written are finished, and the connections closed;
5. pool, models and last the store are closed: from then on another process may have it.
"""

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from types import FrameType
from typing import Any

import uvicorn

from app.api.protocol import PushingProtocol, limit_send_buffer
from app.config import Settings
from app.main import create_app
from app.nodes.address import address_towards, url_of, without_secrets
from app.ports import Clock
from app.runtime import Runtime, SystemClock

BACKLOG = 2048
EARS = 16
"""Descriptors of the listening socket: uvloop accepts one connection for each in a round of its loop.

With one, who comes while the rounds are long waits for seconds in the backlog, to be refused then. Each
further one costs a new connection 3 us (measured with uvloop 0.23).
"""
SAME_SIGNAL_S = 1.0  # a terminal and a supervisor may both pass on the signal that is meant
LAST_CALL_S = 0.5  # for requests that are on their way on connections which are about to be closed
LAST_WORDS_S = 3.0  # for answers that are being written when all turns have ended
_POLL_S = 0.05
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
GC_THRESHOLDS = (10_000, 5, 400)
"""New objects until the young ones are looked at; such passes until the middle, and those until all."""

_log = logging.getLogger(__name__)


class PoolServer(uvicorn.Server):
    """A uvicorn server that lets turns end before it closes its connections.

    Stock uvicorn closes its listeners first, which fails requests that are on their way,
    and never stops while a stream is open.

    ``shares_socket``: whoever else holds the listening socket takes the connections
    that come from the first signal on. Otherwise they are accepted here, to be told.
    ``is_wait_over``: a later signal has said that running turns need not be waited for.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        shares_socket: bool = False,
        node_port: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        config = uvicorn.Config(
            create_app(runtime=runtime, node_port=node_port),
            http=PushingProtocol,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=1,  # never needed: shutdown leaves no connection to it
        )
        config.load()
        super().__init__(config)
        self._runtime = runtime
        self._shares_socket = shares_socket
        self._node_port = node_port
        self._clock = clock or SystemClock()
        self.is_wait_over = False
        self._last_signal = (0, float("-inf"))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal: the first ends the server, a later one the wait for its turns."""
        now, (last, at) = self._clock.monotonic(), self._last_signal
        if sig == last and now - at < SAME_SIGNAL_S:
            return
        self._last_signal = (sig, now)
        self.is_wait_over = self.should_exit
        super().handle_exit(sig, frame)

    def look_at_stdin(self) -> None:
        """End, as by SIGTERM, if whoever holds the other end of standard input has gone."""
        if not os.read(0, 1):
            asyncio.get_running_loop().remove_reader(0)
            self.handle_exit(signal.SIGTERM, None)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End in the order of this module's first lines; no wait in it is without a bound."""
        runtime = self._runtime
        runtime.begin_drain()
        # In place: requests under way share this list. Those older than its last renewal do not.
        self.server_state.default_headers.append((b"connection", b"close"))
        self._wind_down()
        last_call = asyncio.get_running_loop().call_later(LAST_CALL_S, partial(self._wind_down, idle=True))
        if self._shares_socket:
            self._stop_accepting(but_on=self._node_port)  # other nodes watch what still runs here
        await self._wait(lambda: self.is_wait_over or not runtime.is_busy, runtime.settings.drain_timeout_s)
        await runtime.cancel_turns()
        self._stop_accepting()
        await self._wait(self._is_alone, LAST_CALL_S)
        last_call.cancel()
        self._wind_down(idle=True, fresh=True)
        await self._wait(self._is_alone, LAST_WORDS_S)
        self._hang_up()
        await super().shutdown(sockets)
        # Here, since uvicorn then raises the signal again, which ends the process at once.
        try:
            await runtime.close()
        except Exception:
            _log.exception("closing failed; every turn that was acknowledged is stored")

    def _is_alone(self) -> bool:
        return not self.server_state.connections

    async def _wait(self, condition: Callable[[], bool], limit_s: float) -> None:
        # Polling, as uvicorn does: its connections and a signal's handler can wake nobody.
        give_up_at = self._clock.monotonic() + limit_s
        while not condition() and self._clock.monotonic() < give_up_at:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)

    def _stop_accepting(self, *, but_on: int | None = None) -> None:
        for server in self.servers:
            if but_on is None or all(each.getsockname()[1] != but_on for each in server.sockets):
                server.close()

    def _wind_down(self, *, idle: bool = False, fresh: bool = False) -> None:
        """Close connections that are answering after that; ``idle`` ones, and ``fresh`` ones, now.

        On a fresh one, which has had no request yet, no client expects to be hung up on.
        """
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            cycle = connection.cycle
            if fresh if cycle is None else (idle or not cycle.response_complete):
                connection.shutdown()

    def _hang_up(self) -> None:
        """Close what is left at once: clients that do not read, or do not end their request."""
        for connection in list(self.server_state.connections):
            _log.warning("a connection did not end in time and is closed")
            connection.transport.abort()


async def serve(
    settings: Settings,
    listener: socket.socket,
    *,
    wait_for_store: bool = False,
    shares_socket: bool = False,
    ends_with_stdin: bool = False,
) -> None:
    """Serve on ``listener`` until a signal comes, or with ``ends_with_stdin`` that is closed.

    Everything is made ready before the store is opened, so that a process that waits for
    it serves as soon as it has it. Connections wait in the listener's backlog meanwhile.

    Raises:
        StoreLocked, StoreUnavailable, ValueError: the store cannot be opened.
        ValueError: also, there is no listening for other nodes; names the setting.
    """
    settings = with_local_names(settings, listener)
    sockets = [listener]
    node_url = node_port = None
    if settings.is_store_shared:
        sockets.append(listen_to_nodes(settings, not_on=listener.getsockname()[1]))
        node_url = url_of(sockets[1], towards=settings.store_url)
        node_port = sockets[1].getsockname()[1]
    for each in sockets:
        limit_send_buffer(each)
    runtime = Runtime(settings, wait_for_store=wait_for_store, node_url=node_url)
    server = PoolServer(runtime, shares_socket=shares_socket, node_port=node_port)
    async with runtime:
        calm_collector()
        announce(settings, listener, node_url)
        if ends_with_stdin:
            asyncio.get_running_loop().add_reader(0, server.look_at_stdin)
        await server.serve(sockets=[*sockets, *(listener.dup() for _ in range(EARS - 1))])


def with_local_names(settings: Settings, listener: socket.socket) -> Settings:
    """Return ``settings`` with ``allowed_hosts``, if nobody but this machine's users is meant to come.

    A page of any site could otherwise have its name point to this machine, and then read everything
    here as its own (DNS rebinding); where nobody is asked for a credential, nothing else is in its way.
    """
    address = listener.getsockname()[0]
    if settings.auth_mode != "none" or settings.allowed_hosts or not ip_address(address).is_loopback:
        return settings
    return settings.model_copy(update={"allowed_hosts": (*LOCAL_NAMES, address)})


def calm_collector() -> None:
    """Make passes of the garbage collector over everything rare, and short.

    With some hundred live agents Python's defaults stopped the event loop for 120 to 420 ms
    every few seconds, to find some ten objects: nearly all go by their reference count. What the
    start has made stays for good, and is not looked at any more. A pass over 200,000 young objects
    takes 180 to 260 ms where memory is cold, so a middle one comes before there are so many.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    Raises:
        OSError: the address is in use, not this machine's, or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setblocking(False)
    return listener


def listen_to_nodes(settings: Settings, *, not_on: int) -> socket.socket:
    """Return the socket that other processes of the store reach this one by.

    ``not_on`` is the port for clients, which counts on every address: by nothing but the port that
    it came to is a request known to be a client's.

    Raises:
        ValueError: it cannot be had; names the setting.
    """
    host, _, port = (settings.node_listen or f"{address_towards(settings.store_url)}:0").rpartition(":")
    try:
        listener = bind(host.strip("[]"), int(port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"NODE_LISTEN: cannot listen on {host}:{port}: {error}") from None
    if listener.getsockname()[1] == not_on:
        listener.close()
        raise ValueError(f"NODE_LISTEN: {host}:{not_on} has the port that clients use (PORT); take another")
    return listener


def take_over(descriptor: int) -> socket.socket:
    """Return the listening socket that this process was started with as ``descriptor``.

    Raises:
        OSError: it is closed, or something else.
    """
    listener = socket.socket(fileno=descriptor)
    is_tcp = listener.family in (socket.AF_INET, socket.AF_INET6) and listener.type == socket.SOCK_STREAM
    if not is_tcp or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()
        raise OSError(errno.EINVAL, "it is not a listening TCP socket")
    os.set_inheritable(descriptor, False)
    listener.setblocking(False)
    return listener


def announce(
    settings: Settings, listener: socket.socket, node_url: str | None = None, *, workers: int = 1
) -> None:
    """Print where to find what, and with which limits, on standard output."""
    url = url_of(listener)
    limits = settings.pool_limits()
    provider = next(p for p in settings.providers() if p.name == settings.default_provider)
    lines = [
        f"AgentPool listens on {url}",
        f"  docs    {url}/docs",
        f"  store   {without_secrets(settings.store_url)}",
        f"  model   {provider.name}/{provider.default_model}",
        f"  pool    at most {limits.max_instances} live agents, idle ones for {limits.idle_ttl_s:g} s",
    ]
    if settings.auth_mode != "none":
        lines.append(f"  auth    {settings.auth_mode}")
    if workers > 1:
        lines.insert(1, f"  workers {workers}")
    if node_url is not None:
        lines.insert(3, f"  node    {settings.node_url or node_url}")
    print("\n".join(lines), flush=True)  # noqa: T201
