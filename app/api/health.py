"""Liveness and readiness, for load balancers and process managers, who have no credential."""

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from app.api.docs import problems
from app.api.errors import problem_response
from app.api.exchange import exchange_of
from app.api.options import ApiOptions
from app.domain.errors import Draining, StoreUnavailable
from app.services.admin import AdminService

router = APIRouter(tags=["health"])  # not strict about queries: probes add what they like


class Alive(BaseModel):
    """The process serves."""

    status: Literal["healthy"] = Field(description="Always this.", examples=["healthy"])
    agent_initialized: bool = Field(description="Always true.", examples=[True])
    session_count: int | None = Field(
        description="Stored sessions; `null` while it is not known, and where credentials are asked for.",
        examples=[5],
    )
    live_agents: int = Field(description="Agents in the pool.", examples=[3])
    version: str = Field(description="The server's version.", examples=["0.1.0"])


class Ready(BaseModel):
    """New turns are welcome."""

    status: Literal["ready"] = Field(description="Always this.", examples=["ready"])


@router.head("/health", include_in_schema=False)  # as some probes ask
@router.get("/health", summary="Is the process alive?", responses=problems())
async def get_health(request: Request) -> Alive:
    """200 as soon as the process serves, whatever its store does."""
    admin = _admin_of(request)
    options: ApiOptions = request.app.state.api_options
    return Alive(
        status="healthy",
        agent_initialized=True,
        # How much a server is used is not a stranger's to know; admins have it from /sessions/stats.
        session_count=admin.session_count() if options.auth_mode == "none" else None,
        live_agents=admin.live_count(),
        version=options.version,
    )


@router.head("/ready", include_in_schema=False, response_model=Ready)
@router.get(
    "/ready",
    summary="Does it take new turns?",
    response_model=Ready,
    responses=problems("DRAINING", "STORE_UNAVAILABLE"),
)
async def get_ready(request: Request) -> Response | Ready:
    """503 while it shuts down and while the store does not answer."""
    code = await _admin_of(request).ready()
    if code is None:
        return Ready(status="ready")
    return problem_response(
        Draining() if code == Draining.code else StoreUnavailable(), exchange_of(request.scope)
    )


def _admin_of(request: Request) -> AdminService:
    # Not by a Call, which is made in somebody's name.
    admin: AdminService = request.app.state.services.admin
    return admin
