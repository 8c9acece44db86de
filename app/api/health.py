"""Liveness and readiness, for load balancers and process managers."""

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from app.api.deps import CallDep
from app.api.docs import problems
from app.api.errors import problem_response
from app.domain.errors import Draining, StoreUnavailable

router = APIRouter(tags=["health"])  # not strict about queries: probes add what they like


class Alive(BaseModel):
    """The process serves."""

    status: Literal["healthy"] = Field(description="Always this.", examples=["healthy"])
    agent_initialized: bool = Field(description="Always true.", examples=[True])
    session_count: int | None = Field(
        description="Stored sessions; `null` while it is not known.", examples=[5]
    )
    live_agents: int = Field(description="Agents in the pool.", examples=[3])
    version: str = Field(description="The server's version.", examples=["0.1.0"])


class Ready(BaseModel):
    """New turns are welcome."""

    status: Literal["ready"] = Field(description="Always this.", examples=["ready"])


@router.get("/health", summary="Is the process alive?", responses=problems())
async def get_health(call: CallDep) -> Alive:
    """200 as soon as the process serves, whatever its store does."""
    return Alive(
        status="healthy",
        agent_initialized=True,
        session_count=call.services.admin.session_count(),
        live_agents=call.services.admin.live_count(),
        version=call.options.version,
    )


@router.get(
    "/ready",
    summary="Does it take new turns?",
    response_model=Ready,
    responses=problems("DRAINING", "STORE_UNAVAILABLE"),
)
async def get_ready(call: CallDep) -> Response | Ready:
    """503 while it shuts down and while the store does not answer."""
    code = await call.services.admin.ready()
    if code is None:
        return Ready(status="ready")
    return problem_response(Draining() if code == Draining.code else StoreUnavailable(), call.exchange)
