"""The HTTP application: FastAPI over a runtime."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app import __version__
from app.api.install import install
from app.api.options import ApiOptions
from app.config import Settings
from app.identity.audit import open_audit
from app.runtime import Runtime, SystemClock

_DESCRIPTION = """Every conversation has its own live agent; the server keeps, evicts and restores them.

Send a message with `POST /chat`, or watch the answer come with `POST /chat/stream`.
Errors are `application/problem+json` with a stable `code`."""


def create_app(
    settings: Settings | None = None, *, runtime: Runtime | None = None, node_port: int | None = None
) -> FastAPI:
    """Return the application.

    Alone, it opens a ``Runtime`` of its own when it starts. With ``runtime`` it uses that
    one and leaves opening and closing to the caller: the way to mount it into another
    application, since a mounted one is not told of start and stop. ``node_port``: a port on which
    it is served to other nodes only.

    Raises:
        pydantic.ValidationError: a setting is wrong.
        ValueError: ``STORE_URL`` names no store; or a file of credentials, or that of the audit log,
            cannot be used.
    """
    owned = runtime is None
    running = runtime if runtime is not None else Runtime(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not owned:
            yield
            return
        async with running:
            yield

    app = FastAPI(
        title="AgentPool",
        version=__version__,
        summary="An agent session server.",
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # Merely to look whether somebody wants it would take 5 us of each request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.services = running.services
    config, clock = running.settings, SystemClock()
    install(
        app,
        api_options(config),
        open_audit(config.audit_file, clock),
        config.authenticator(clock),
        gate=running.gate,
        quota=running.request_quota,
        link=running.link,
        node_port=node_port,
    )
    return app


def api_options(settings: Settings) -> ApiOptions:
    """Return what the HTTP face is told by ``settings``."""
    return ApiOptions(
        alias_prefixes=settings.alias_prefixes,
        max_body_bytes=settings.max_body_bytes,
        max_message_chars=settings.max_message_chars,
        redact_keys=settings.redact_keys,
        app_name=settings.app_name,
        heartbeat_s=settings.stream_heartbeat_s,
        allowed_hosts=settings.allowed_hosts,
        cors_origins=settings.cors_origins,
        version=__version__,
        auth_mode=settings.auth_mode,
    )
