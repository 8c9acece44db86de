"""What nodes ask each other about turns in flight; not in the schema, and not there for anybody else."""

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Request
from pydantic import BaseModel, ConfigDict

from app.api.errors import NotFound
from app.api.exchange import HOPS_KEY
from app.api.route import StrictRoute
from app.domain.erasure import ErasureNotice
from app.domain.ids import SessionKey
from app.domain.quota import Spent
from app.domain.turn import CancelOrder, CancelReason
from app.services import Services


async def _require_node(request: Request) -> Services:
    if HOPS_KEY not in request.scope:
        raise NotFound()
    services: Services = request.app.state.services
    return services


NodeDep = Annotated[Services, Depends(_require_node)]

router = APIRouter(route_class=StrictRoute, include_in_schema=False)


class SessionQuestion(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    owner: str
    session_id: str

    def key(self) -> SessionKey:
        return SessionKey(self.owner, self.session_id)


class SpentTokens(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    day: int
    tokens: int
    stored: int


class Notice(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    owner: str
    user_id: str
    lasts_s: float
    spent: SpentTokens | None

    def notice(self) -> ErasureNotice:
        spent = None if self.spent is None else Spent(**self.spent.model_dump())
        return ErasureNotice(owner=self.owner, user_id=self.user_id, lasts_s=self.lasts_s, spent=spent)


class ForgetQuestion(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    sessions: list[SessionQuestion]
    notice: Notice


class CancelQuestion(SessionQuestion):
    reason: str
    keep_partial: bool
    turn_id: str | None
    all: bool

    def order(self) -> CancelOrder:
        return CancelOrder(CancelReason(self.reason), self.keep_partial, self.turn_id, self.all)


@router.post("/node/turns")
async def turns(services: NodeDep, question: Annotated[SessionQuestion, Body()]) -> dict[str, list[str]]:
    """The session's turns that are in flight here, the running one first."""
    return {"turns": list(services.chat.turns_here(question.key()))}


@router.post("/node/cancel")
async def cancel(services: NodeDep, question: Annotated[CancelQuestion, Body()]) -> dict[str, list[str]]:
    """End turns that are in flight here; returns which."""
    return {"turns": list(services.chat.cancel_here(question.key(), question.order()))}


@router.post("/node/live")
async def live(services: NodeDep, question: Annotated[SessionQuestion, Body()]) -> dict[str, bool]:
    """Whether the session has a live agent here."""
    return {"live": services.admin.is_live(question.key())}


@router.post("/node/forget")
async def forget(services: NodeDep, question: Annotated[ForgetQuestion, Body()]) -> dict[str, bool]:
    """Hear of an erasure, and drop what is here of its sessions that are gone; turns in flight end."""
    await services.sessions.forget_here([one.key() for one in question.sessions], question.notice.notice())
    return {"forgotten": True}
