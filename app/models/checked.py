"""What the lean and the stock client have in common: when to try again, what fails how.

Streams fail with ``ModelUnavailable``, ``ModelRateLimited`` or ``ModelError`` only, never
with a library's exception: those carry the provider's text. Failures are raised outside
the ``except`` that caught them, so that not even ``__context__`` has it.
"""

import logging
import uuid
from abc import abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

from autogen_core import CancellationToken
from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage
from autogen_core.tools import Tool, ToolSchema
from pydantic import BaseModel

from app.domain.errors import AgentPoolError
from app.models.call import ModelCall
from app.models.failure import Failure
from app.models.limits import CallLimits
from app.models.providers import Provider
from app.models.reading import Hear

_log = logging.getLogger(__name__)

ToolChoice = Tool | Literal["auto", "required", "none"]


def make_args(provider: Provider, model: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every request says beside its messages and tools."""
    named = {(provider.max_tokens_name if k == "max_tokens" else k): v for k, v in params.items()}
    return {"model": model, **named, "stream_options": {"include_usage": True}}


class CheckedClient(ChatCompletionClient):
    """A view on a provider's shared connections for one model and one set of parameters.

    Always streams; ``create`` is a stream read to its end, since ``stream_options`` in a
    request that does not stream is refused by providers.
    """

    def __init__(self, provider: Provider, model: str, limits: CallLimits) -> None:
        self._limits = limits
        self._label = f"{provider.name}/{model}"

    @abstractmethod
    async def _attempt(self, asked: dict[str, Any], call: ModelCall, hear: Hear) -> CreateResult:
        """Make the request once; ``asked`` is what ``tell`` was given."""

    @abstractmethod
    def _failure_of(self, error: Exception, call: ModelCall) -> Failure | None:
        """Translate an exception of the transport; ``None``: it is none of the provider's doing."""

    async def tell(
        self,
        hear: Hear,
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = (),
        tool_choice: ToolChoice = "auto",
        json_output: bool | type[BaseModel] | None = None,
        extra_create_args: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
    ) -> CreateResult:
        """Have ``hear`` called with text as it comes, and return the result.

        Text of several tokens that arrive together is heard together. A generator would wake
        the asking task for each, through every layer between.

        Raises:
            ModelUnavailable, ModelRateLimited, ModelError: as DESIGN §10 says.
        """
        asked = {
            "messages": messages,
            "tools": tools,
            "tool_choice": tool_choice,
            "json_output": json_output,
            "extra_create_args": extra_create_args or {},
        }
        call = ModelCall(self._limits, cancellation_token)
        while True:
            failure: Failure | None = None
            try:
                return _mended(await self._attempt(asked, call, hear))
            except AgentPoolError as error:
                failure = Failure(error)
            except Exception as error:
                failure = self._failure_of(error, call)
                if failure is None:
                    raise
            pause_s = call.pick_pause(failure)
            if pause_s is None:
                _log.warning("%s: %s", self._label, failure.error.detail)
                raise failure.error
            await call.pause(pause_s)

    async def create_stream(
        self,
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = (),
        tool_choice: ToolChoice = "auto",
        json_output: bool | type[BaseModel] | None = None,
        extra_create_args: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
        max_consecutive_empty_chunk_tolerance: int = 0,
        include_usage: bool | None = None,
    ) -> AsyncGenerator[str | CreateResult, None]:
        """Yield the pieces of the text and the result, when all have come; ``tell`` tells as they come.

        Fails as ``tell`` does.
        """
        pieces: list[str] = []
        result = await self.tell(
            pieces.append,
            messages,
            tools=tools,
            tool_choice=tool_choice,
            json_output=json_output,
            extra_create_args=extra_create_args,
            cancellation_token=cancellation_token,
        )
        for piece in pieces:
            yield piece
        yield result

    async def create(
        self,
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = (),
        tool_choice: ToolChoice = "auto",
        json_output: bool | type[BaseModel] | None = None,
        extra_create_args: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
    ) -> CreateResult:
        """Return the result; fails as ``tell`` does."""
        return await self.tell(
            lambda piece: None,
            messages,
            tools=tools,
            tool_choice=tool_choice,
            json_output=json_output,
            extra_create_args=extra_create_args,
            cancellation_token=cancellation_token,
        )

    async def close(self) -> None:
        """Do nothing: the connections are the pool's."""


def _mended(result: CreateResult) -> CreateResult:
    """Return ``result`` with what AutoGen and providers stumble over put right.

    Calls without an id or with two that are the same cannot be told apart later, and no
    arguments at all (``""``) are not JSON, but ``{}`` is. A reason that nobody knows is a
    reason: that there was one has been checked.
    """
    if isinstance(result.content, list):
        seen: set[str] = set()
        for call in result.content:
            if not call.id or call.id in seen:
                call.id = f"call_{uuid.uuid4().hex[:24]}"
            seen.add(call.id)
            call.arguments = call.arguments.strip() or "{}"
    if result.finish_reason == "unknown":
        result.finish_reason = "stop"
    return result
