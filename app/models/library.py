"""AutoGen's OpenAI client, as far as ours are made of it. Importing it imports openai: a second, 20 MiB."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from autogen_core.models import LLMMessage, ModelInfo
from autogen_core.tools import Tool, ToolSchema
from autogen_ext.models.openai import BaseOpenAIChatCompletionClient
from openai import AsyncOpenAI
from pydantic import BaseModel

from app.models.checked import CheckedClient, ToolChoice, make_args
from app.models.limits import CallLimits
from app.models.providers import Provider


class _OpenAIClient(BaseOpenAIChatCompletionClient):
    def __init__(
        self, library: AsyncOpenAI | None, provider: Provider, model: str, params: Mapping[str, Any]
    ) -> None:
        super().__init__(
            cast(AsyncOpenAI, library),
            create_args=make_args(provider, model, params),
            model_info=cast(ModelInfo, provider.info_of(model)),
            # The name would be the same constant on every message, and some providers refuse it.
            include_name_in_message=False,
        )


class LibraryClient(CheckedClient, _OpenAIClient):
    """The library's client, checked."""

    def __init__(
        self,
        library: AsyncOpenAI,
        provider: Provider,
        model: str,
        params: Mapping[str, Any],
        limits: CallLimits,
    ) -> None:
        _OpenAIClient.__init__(self, library, provider, model, params)
        CheckedClient.__init__(self, provider, model, limits)


class LibraryRequests(_OpenAIClient):
    """Makes requests as the library's client would, and sends none."""

    def __init__(self, provider: Provider, model: str, params: Mapping[str, Any]) -> None:
        super().__init__(None, provider, model, params)

    def body(
        self,
        messages: Sequence[LLMMessage],
        tools: Sequence[Tool | ToolSchema],
        tool_choice: ToolChoice,
        json_output: bool | type[BaseModel] | None,
        extra_create_args: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return a request's body.

        Raises:
            ValueError: the library would not send it.
        """
        made = self._process_create_args(messages, tools, tool_choice, json_output, extra_create_args)
        more = {"tools": made.tools} if made.tools else {}
        return {"messages": made.messages, "stream": True, **made.create_args, **more}
