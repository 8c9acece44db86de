"""The whole HTTP face in one call."""

from typing import Protocol

from fastapi import APIRouter, FastAPI
from starlette.types import Scope

from app.api import health
from app.api.docs import install_docs
from app.api.errors import install_errors
from app.api.guard import Guard
from app.api.native import (
    admin,
    branches,
    chat,
    checkpoints,
    choices,
    events,
    sessions,
    state,
    stats,
    turns,
    users,
)
from app.api.node.forward import Forwarder, install_forwarding
from app.api.node.gate import Link, NodeGate
from app.api.node.router import router as node
from app.api.options import ApiOptions
from app.ports.identity import AuditLog, Authenticator
from app.services.overload import Gate
from app.services.quota import RequestQuota


class NodeLink(Forwarder, Link, Protocol):
    """The way to other nodes, and what they know each other by."""


ROUTERS: tuple[APIRouter, ...] = (
    chat.router,
    stats.router,  # before the routes that take "stats" for a session's id
    sessions.router,
    choices.router,
    users.router,
    turns.router,
    events.router,
    checkpoints.router,
    branches.router,
    state.router,
    admin.router,
    health.router,
)


def install(
    app: FastAPI,
    options: ApiOptions,
    audit: AuditLog,
    authenticator: Authenticator | None = None,
    *,
    gate: Gate | None = None,
    quota: RequestQuota | None = None,
    link: NodeLink | None = None,
    node_port: int | None = None,
) -> None:
    """Give ``app`` the routes, the error answers, the documentation and the guard.

    The services are read from ``app.state.services`` when a request comes. ``app`` may be
    mounted into another one: nothing outside of it is touched. Without an ``authenticator`` nobody
    is asked for a credential; ``audit`` is told what admins change. ``gate`` decides who is let in
    while the process is overloaded, ``quota`` how many requests each user may make. ``link`` is the way
    to other nodes of the same store, which alone are served on ``node_port``.
    """
    app.state.api_options = options
    app.state.audit = audit
    app.state.gate = gate
    app.state.allowed_methods = allowed_methods
    app.router.redirect_slashes = False
    install_errors(app)
    # Not include_router: it would analyse every route once more, and match each request twice.
    app.router.routes.extend(route for router in ROUTERS for route in router.routes)
    install_docs(app, options.auth_mode)
    app.add_middleware(
        Guard, options=options, audit=audit, authenticator=authenticator, gate=gate, quota=quota
    )
    if link is not None:
        install_forwarding(app, link)
        app.router.routes.extend(node.routes)
        app.add_middleware(NodeGate, link=link, private_port=node_port)


def allowed_methods(scope: Scope) -> str:
    """Return the value of ``Allow`` for the path of ``scope``."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    methods: set[str] = set()
    for route in scope["app"].router.routes:
        if (pattern := getattr(route, "path_regex", None)) and pattern.match(path):
            methods |= getattr(route, "methods", None) or {"GET", "HEAD"}
    return ", ".join(sorted(methods))
