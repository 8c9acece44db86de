"""The stock client: the openai package's own path under AutoGen's, with our rules on top.

Only the method that reads chunks is replaced, by one that does the same and also closes
the response, keeps the deadlines and judges the answer.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, cast

import httpx2
import openai
from autogen_core import CancellationToken
from autogen_core.models import CreateResult
from autogen_ext.models.openai import BaseOpenAIChatCompletionClient
from openai import AsyncOpenAI, AsyncStream, DefaultAsyncHttpxClient
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam, ChatCompletionToolParam

from app.models.call import ModelCall
from app.models.failure import Failure, broken_off, malformed, refused, reported
from app.models.library import LibraryClient
from app.models.limits import CallLimits
from app.models.providers import Provider
from app.models.reading import Hear
from app.models.sse import EventSplitter

# The library checks nothing: a chunk of another shape breaks whatever touches it first.
_STUMBLES = (AttributeError, TypeError, LookupError)


class StockPool:
    """All connections to one provider: one ``AsyncOpenAI``."""

    def __init__(self, provider: Provider, limits: CallLimits) -> None:
        self._provider = provider
        self._limits = limits
        # Retries and deadlines are ours: the library's would multiply them.
        timeout = httpx2.Timeout(None, connect=limits.connect_s)
        self._library = AsyncOpenAI(
            api_key=provider.api_key or "none",
            base_url=provider.base_url,
            max_retries=0,
            timeout=timeout,
            http_client=DefaultAsyncHttpxClient(
                timeout=timeout,
                follow_redirects=False,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
                event_hooks={"response": [self._bound]},
            ),
        )

    async def _bound(self, response: httpx2.Response) -> None:
        # The library collects a line, an event or an error of any length before it shows it.
        response.stream = _Bounded(cast(httpx2.AsyncByteStream, response.stream), self._limits.max_bytes)

    def client(self, model: str, params: Mapping[str, Any]) -> "StockClient":
        return StockClient(self._library, self._provider, model, params, self._limits)

    async def close(self) -> None:
        await self._library.close()


class StockClient(LibraryClient):
    """AutoGen's OpenAI client, checked."""

    async def _attempt(self, asked: dict[str, Any], call: ModelCall, hear: Hear) -> CreateResult:
        stream = BaseOpenAIChatCompletionClient.create_stream(self, **asked, cancellation_token=call)
        try:
            async for piece in stream:
                if isinstance(piece, CreateResult):
                    return piece
                hear(piece)
        finally:
            await stream.aclose()
            if call.close_response is not None:
                # What AutoGen's generator broke on left the one below it open.
                await call.close_response()
        raise malformed()

    async def _create_stream_chunks(
        self,
        tool_params: list[ChatCompletionToolParam],
        oai_messages: list[ChatCompletionMessageParam],
        create_args: dict[str, Any],
        cancellation_token: CancellationToken | None,
    ) -> AsyncGenerator[ChatCompletionChunk, None]:
        """Yield the chunks of a good answer, in a form that the caller does not misread."""
        call = cast(ModelCall, cancellation_token)
        if tool_params:
            create_args = {**create_args, "tools": tool_params}
        create = self._client.chat.completions.create
        made = await call.wait(lambda: create(messages=oai_messages, stream=True, **create_args))
        stream = cast(AsyncStream[ChatCompletionChunk], made)
        call.close_response = stream.close
        try:
            while (chunk := await _next(stream, call)) is not None:
                _note(chunk, call)
                if not chunk.usage and not chunk.choices:
                    continue  # nothing in it; AutoGen warns of the tenth
                if len(chunk.choices or ()) > 1:  # a second opinion, not asked for; AutoGen warns of each
                    chunk = chunk.model_copy(update={"choices": chunk.choices[:1]})
                if chunk.usage and chunk.choices:
                    # AutoGen ignores the finish_reason of a chunk that carries usage, which
                    # is how DeepSeek ends: told one after the other it hears both.
                    yield chunk.model_copy(update={"usage": None})
                    chunk = chunk.model_copy(update={"choices": []})
                yield chunk
            call.check_end()
        finally:
            await stream.close()

    def _failure_of(self, error: Exception, call: ModelCall) -> Failure | None:
        if isinstance(error, openai.APIStatusError):
            headers = error.response.headers
            return refused(
                error.status_code,
                retry_after=headers.get("retry-after"),
                date=headers.get("date"),
                code=error.code,
            )
        if isinstance(error, openai.APIConnectionError | httpx2.TransportError):
            return broken_off(begun=call.begun)
        if isinstance(error, openai.APIError):
            return Failure(reported())
        if isinstance(error, ValueError) or (call.has_heard and isinstance(error, _STUMBLES)):
            return Failure(malformed())
        return None


class _Bounded(httpx2.AsyncByteStream):
    """A body that breaks off with ``ModelError`` where the lean client would refuse to read on."""

    def __init__(self, body: httpx2.AsyncByteStream, max_bytes: int) -> None:
        self._body = body
        self._splitter = EventSplitter(max_bytes)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._body:
            self._splitter.feed(part)
            yield part

    async def aclose(self) -> None:
        await self._body.aclose()


async def _next(stream: AsyncStream[ChatCompletionChunk], call: ModelCall) -> ChatCompletionChunk | None:
    try:
        return await call.wait(lambda: anext(stream))
    except StopAsyncIteration:
        return None
    except Exception:
        if call.finished:
            return None  # all is said; what broke is only the usage, or the good-bye
        raise


def _note(chunk: ChatCompletionChunk, call: ModelCall) -> None:
    try:
        size, told, said, finish = _weigh(chunk)
    except _STUMBLES:
        size = 0
    if not size:
        raise malformed()
    call.heard(size, told=told, said=said, finish=finish)


def _weigh(chunk: ChatCompletionChunk) -> tuple[int, bool, bool, bool]:
    """Return the size of a chunk, and whether it told anything, said anything, and was the end."""
    choice = chunk.choices[0] if chunk.choices else None
    delta = choice.delta if choice else None
    text = (delta.content if delta else None) or ""
    tools = (delta.tool_calls if delta else None) or ()
    reasoning = ((delta.model_extra or {}).get("reasoning_content") if delta else None) or ""
    arguments = sum(len(t.function.arguments or "") for t in tools if t.function)
    said = bool(text or tools)
    finish = choice is not None and choice.finish_reason is not None
    return 1 + len(text) + len(reasoning) + arguments, said or bool(reasoning), said, finish
