"""The statistics of all sessions."""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from app.api.deps import AdminDep, CallDep
from app.api.docs import problems
from app.api.native.fields import NoQuery
from app.api.route import StrictRoute
from app.domain.stats import SessionStats

router = APIRouter(route_class=StrictRoute, tags=["sessions"])


class SessionStatsAnswer(BaseModel):
    """Counters of all sessions and turns. Statuses lag behind the clock by at most one sweep."""

    total_sessions: int = Field(description="Sessions that are stored.", examples=[128])
    active_sessions: int = Field(description="Those that are active.", examples=[20])
    idle_sessions: int = Field(description="Those that are idle.", examples=[90])
    archived_sessions: int = Field(description="Those that are archived.", examples=[8])
    expired_sessions: int = Field(description="Those that have expired and are not purged.", examples=[10])
    avg_session_duration_s: float = Field(
        description="Seconds from creation to last activity, of all sessions there ever were.",
        examples=[345.6],
    )
    avg_turns: float = Field(description="Turns for each session there ever was.", examples=[6.5])
    turns_total: int = Field(description="Turns that ended, failed ones too.", examples=[832])
    turns_failed: int = Field(description="Those that failed.", examples=[4])
    error_rate: float = Field(description="turns_failed / turns_total.", examples=[0.0048])
    avg_response_ms: float = Field(description="How long a finished turn took.", examples=[812.4])
    p95_response_ms: int = Field(
        description="What 95 of 100 finished turns did not exceed, exact to a tenth.", examples=[2100]
    )
    tokens_total: int = Field(description="Tokens that were read and written.", examples=[51200])

    @classmethod
    def of(cls, stats: SessionStats) -> "SessionStatsAnswer":
        return cls(
            total_sessions=stats.total,
            active_sessions=stats.active,
            idle_sessions=stats.idle,
            archived_sessions=stats.archived,
            expired_sessions=stats.expired,
            avg_session_duration_s=_ratio(stats.lifetime_ms / 1000, stats.created, digits=3),
            avg_turns=_ratio(stats.turns, stats.created, digits=2),
            turns_total=stats.turns,
            turns_failed=stats.turns_failed,
            error_rate=_ratio(stats.turns_failed, stats.turns, digits=4),
            avg_response_ms=_ratio(stats.response_ms, stats.turns_finished, digits=1),
            p95_response_ms=stats.p95_response_ms,
            tokens_total=stats.tokens,
        )


@router.get(
    "/sessions/stats",
    summary="Count the sessions",
    dependencies=[AdminDep],
    responses=problems("STORE_UNAVAILABLE"),
)
async def get_session_stats(call: CallDep, _query: Annotated[NoQuery, Query()]) -> SessionStatsAnswer:
    """Counters of sessions, turns and tokens; cheap however many there are."""
    return SessionStatsAnswer.of(await call.services.sessions.stats())


def _ratio(part: float, whole: int, *, digits: int) -> float:
    return round(part / whole, digits) if whole else 0.0
