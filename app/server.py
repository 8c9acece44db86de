"""One server process: bind, open, say where, serve; on a signal drain, then close."""

import asyncio
import socket

import uvicorn

from app.config import Settings
from app.main import create_app
from app.runtime import Runtime

BACKLOG = 2048
LEFTOVER_CONNECTIONS_S = 3  # for responses that are being written when all turns have ended
_POLL_S = 0.05


class PoolServer(uvicorn.Server):
    """A uvicorn server that lets turns end before it closes its listeners.

    Stock uvicorn closes them first, which fails requests that a load balancer has
    already sent, and never stops while a stream is open.
    """

    def __init__(self, config: uvicorn.Config, runtime: Runtime) -> None:
        super().__init__(config)
        self._runtime = runtime

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new turns, let running ones end for ``DRAIN_TIMEOUT_S``, cancel the rest, then close."""
        self._runtime.begin_drain()
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._runtime.settings.drain_timeout_s
        # Polling, as uvicorn does: a second Ctrl-C only sets ``force_exit``.
        while (  # noqa: ASYNC110
            self._runtime.turns_in_flight and loop.time() < give_up_at and not self.force_exit
        ):
            await asyncio.sleep(_POLL_S)
        await self._runtime.cancel_turns()
        await super().shutdown(sockets)
        # Before the signal is raised again, which ends the process at once.
        await self._runtime.close()


async def serve(settings: Settings, listener: socket.socket, *, wait_for_store: bool = False) -> None:
    """Serve on ``listener`` until a signal comes.

    Raises:
        StoreLocked, StoreUnavailable, ValueError: the store cannot be opened.
    """
    async with Runtime(settings, wait_for_store=wait_for_store) as runtime:
        app = create_app(runtime=runtime)
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=LEFTOVER_CONNECTIONS_S,
        )
        server = PoolServer(config, runtime)
        announce(settings, listener)
        await server.serve(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    Raises:
        OSError: the address is in use, not this machine's, or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setblocking(False)
    return listener


def announce(settings: Settings, listener: socket.socket) -> None:
    """Print where to find what, and with which limits, on standard output."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    limits = settings.pool_limits()
    provider = next(p for p in settings.providers() if p.name == settings.default_provider)
    lines = [
        f"AgentPool listens on {url}",
        f"  docs    {url}/docs",
        f"  store   {settings.store_url.partition('?')[0]}",
        f"  model   {provider.name}/{provider.default_model}",
        f"  pool    at most {limits.max_instances} live agents, idle ones for {limits.idle_ttl_s:g} s",
    ]
    print("\n".join(lines), flush=True)  # noqa: T201
