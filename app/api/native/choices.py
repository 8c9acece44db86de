"""What clients may choose from: agents and models."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from app.api.deps import CallDep
from app.api.docs import problems
from app.api.native.fields import NoQuery
from app.api.native.responses import NextCursor, Total
from app.api.route import StrictRoute
from app.domain.catalog import AgentProfile, ModelOffer

router = APIRouter(route_class=StrictRoute, tags=["choices"])


class AgentAnswer(BaseModel):
    """A kind of agent that a session may have."""

    agent_id: str = Field(description="Its id.", examples=["assistant"])
    name: str = Field(description="A name for people.", examples=["Assistant"])
    description: str = Field(description="What it is for.", examples=["Answers questions."])
    provider: str | None = Field(description="Its own provider, if it has one.", examples=[None])
    model: str | None = Field(description="Its own model, if it has one.", examples=[None])
    params: dict[str, Any] = Field(description="How its model is to answer.", examples=[{"temperature": 0.2}])
    tools: list[str] = Field(description="The tools that it may use.", examples=[[]])
    context_policy: str | None = Field(
        description="How much of the conversation its model is sent: `all`, `last:<n messages>` or "
        "`tokens:<n>`; `null`: as the server is set.",
        examples=["last:40"],
    )
    max_tool_iterations: int | None = Field(
        description="How often it may call tools in one turn; `null`: as the server is set.", examples=[8]
    )


class AgentList(BaseModel):
    """The configured agents."""

    agents: list[AgentAnswer] = Field(description="The agents.")
    total: Total
    next_cursor: NextCursor

    @classmethod
    def of(cls, profiles: tuple[AgentProfile, ...]) -> "AgentList":
        agents = [
            AgentAnswer(
                agent_id=profile.agent_id,
                name=profile.name,
                description=profile.description,
                provider=profile.provider,
                model=profile.model,
                params=profile.params,
                tools=list(profile.tools),
                context_policy=_policy_of(profile),
                max_tool_iterations=profile.max_tool_iterations,
            )
            for profile in profiles
        ]
        return cls(agents=agents, total=len(agents), next_cursor=None)


class ModelAnswer(BaseModel):
    """A model that a session may choose."""

    provider: str = Field(description="Its provider.", examples=["openai"])
    model: str = Field(description="Its name; `*` where the provider takes any.", examples=["gpt-5-mini"])
    is_default: bool = Field(description="Whether it answers when nothing is chosen.", examples=[True])


class ModelList(BaseModel):
    """What clients may choose."""

    models: list[ModelAnswer] = Field(description="The models.")
    total: Total
    next_cursor: NextCursor

    @classmethod
    def of(cls, offers: tuple[ModelOffer, ...]) -> "ModelList":
        models = [
            ModelAnswer(provider=offer.provider, model=offer.model, is_default=offer.is_default)
            for offer in offers
        ]
        return cls(models=models, total=len(models), next_cursor=None)


@router.get("/agents", summary="List the agents", responses=problems())
async def list_agents(call: CallDep, _query: Annotated[NoQuery, Query()]) -> AgentList:
    """What `agent_id` may name."""
    return AgentList.of(call.services.chat.agents())


@router.get("/models", summary="List the models", responses=problems())
async def list_models(call: CallDep, _query: Annotated[NoQuery, Query()]) -> ModelList:
    """What `provider` and `model` may name."""
    return ModelList.of(call.services.chat.models())


def _policy_of(profile: AgentProfile) -> str | None:
    policy = profile.context_policy
    if policy is None or policy.unit == "all":
        return None if policy is None else "all"
    return f"{policy.unit}:{policy.limit}"
