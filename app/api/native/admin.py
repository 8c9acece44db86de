"""The operator's routes: the pool of live agents."""

from typing import Annotated

from fastapi import APIRouter, Body, Query, Response

from app.api.audit import note_choices
from app.api.deps import AdminDep, CallDep, SessionKeyDep
from app.api.docs import WITH_BODY, problems
from app.api.native.cursor import open_cursor, seal_cursor
from app.api.native.fields import NoQuery
from app.api.native.pool import (
    CleanupAnswer,
    CleanupBody,
    EvictQuery,
    HealthAnswer,
    LiveList,
    LiveListQuery,
    NodeAnswer,
    NodeList,
    NodeQuery,
    StatsAnswer,
)
from app.api.native.responses import SessionMessage
from app.api.route import StrictRoute
from app.services.admin import CleanupMode, HealthStatus, LiveOrder

router = APIRouter(route_class=StrictRoute, tags=["pool"], dependencies=[AdminDep])

UNHEALTHY_RETRY_S = 5
_CLEANUP_EXAMPLES = {
    "expired": {"summary": "What is due anyway", "value": {"mode": "expired"}},
    "idle": {"summary": "Idle for ten minutes", "value": {"mode": "idle", "idle_s": 600}},
    "oldest": {"summary": "Would go first", "value": {"mode": "oldest", "count": 10, "dry_run": True}},
}


@router.get("/agent-stats", summary="Count the live agents", responses=problems("NODE_UNREACHABLE"))
async def get_stats(call: CallDep, query: Annotated[NodeQuery, Query()]) -> StatsAnswer:
    """The pool's counters; cheap however many agents live."""
    await call.services.admin.require_node(query.node)
    return StatsAnswer.of(call.services.admin.stats())


@router.get("/agent-nodes", summary="List the processes", responses=problems("STORE_UNAVAILABLE"))
async def list_nodes(call: CallDep, _query: Annotated[NoQuery, Query()]) -> NodeList:
    """The processes that share the store, each with its pool's counters; one that is alone lists itself."""
    admin = call.services.admin
    return NodeList(nodes=[NodeAnswer.of(told, admin.stats()) for told in await admin.nodes()])


@router.get("/agent-sessions", summary="List the live agents", responses=problems("NODE_UNREACHABLE"))
async def list_live(call: CallDep, query: Annotated[LiveListQuery, Query()]) -> LiveList:
    """The sessions whose agents are in this process's pool."""
    await call.services.admin.require_node(query.node)
    live, total, next_cursor = call.services.admin.live_sessions(
        limit=query.limit, cursor=open_cursor(query.cursor, "live", query.by), by=LiveOrder(query.by)
    )
    return LiveList.of(live, total, seal_cursor(next_cursor, "live", query.by))


@router.delete(
    "/agent-sessions/{session_id}",
    summary="Drop a live agent",
    responses=problems("SESSION_NOT_FOUND", "AGENT_NOT_FOUND", "SESSION_BUSY", "NODE_UNREACHABLE"),
)
async def evict(key: SessionKeyDep, call: CallDep, query: Annotated[EvictQuery, Query()]) -> SessionMessage:
    """Drop a session's live agent. The session stays; its next turn restores the agent."""
    note_choices(call.request, force=query.force)
    if query.user_id is not None:
        await call.services.sessions.get(key, query.user_id)
    await call.services.admin.evict(key, force=query.force)
    return SessionMessage(message="Live agent removed", session_id=key.session_id)


@router.post(
    "/agent-cleanup",
    summary="Drop idle agents",
    responses=problems(*WITH_BODY, "STORE_UNAVAILABLE", "NODE_UNREACHABLE"),
)
async def clean_up(
    call: CallDep,
    query: Annotated[NodeQuery, Query()],
    body: Annotated[CleanupBody | None, Body(openapi_examples=_CLEANUP_EXAMPLES)] = None,
) -> CleanupAnswer:
    """Drop idle live agents, and expire and purge sessions that are due. A busy agent is never removed."""
    await call.services.admin.require_node(query.node)
    asked = body or CleanupBody()
    note_choices(call.request, node=query.node, **asked.model_dump())
    cleanup = await call.services.admin.cleanup(
        CleanupMode(asked.mode or "expired"),
        idle_s=asked.idle_s,
        count=asked.count,
        dry_run=bool(asked.dry_run),
    )
    return CleanupAnswer.of(cleanup)


@router.get(
    "/agent-health",
    summary="How the parts are",
    responses={503: {"model": HealthAnswer, "description": "A part is unhealthy."}, **problems()},
)
async def get_health(response: Response, call: CallDep, _query: Annotated[NoQuery, Query()]) -> HealthAnswer:
    """Pool, store, model and event loop, and the worst of them; 503 when that is `unhealthy`."""
    health = await call.services.admin.health()
    if health.status is HealthStatus.UNHEALTHY:
        response.status_code = 503
        response.headers["Retry-After"] = str(UNHEALTHY_RETRY_S)
    return HealthAnswer.of(health)
