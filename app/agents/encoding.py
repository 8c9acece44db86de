"""A conversation in the form in which most models are sent it: JSON, a message at a time.

What lives with an agent between its turns is this: a message costs its bytes, a fraction
of what the object costs, and is encoded once, not in every call that sends it again.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, overload

import orjson
from autogen_core import FunctionCall
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    LLMMessage,
    SystemMessage,
    UserMessage,
)

from app.agents.translate import AGENT_NAME, USER_SOURCE

_USER = b'{"role":"user",'


def encode(message: LLMMessage) -> bytes:
    """Return ``message`` as chat completions have it: a JSON object, or several after commas.

    The same as AutoGen's plain transformers make of it, some 10 µs sooner. Text only.
    """
    # A copy: what orjson returns stands in a buffer of 1 KiB, or twice its size, for as long as it lives.
    return bytes(memoryview(b",".join(map(_dumps, _to_wire(message)))))


def is_user(encoded: bytes) -> bool:
    return encoded.startswith(_USER)


class Conversation(Sequence[LLMMessage]):
    """What a model is sent. Who can take it as it is takes ``encoded``; for others it is decoded.

    Of a tool's results the wire does not carry whether they were errors: decoded, none is.
    """

    def __init__(self, system: Sequence[LLMMessage], messages: Sequence[bytes]) -> None:
        self._system = system
        self._messages = messages
        self._decoded: list[LLMMessage] | None = None

    @property
    def encoded(self) -> bytes:
        """The messages as JSON objects, commas between them."""
        return b",".join([*map(encode, self._system), *self._messages])

    def __len__(self) -> int:
        return len(self._system) + len(self._messages)

    @overload
    def __getitem__(self, index: int) -> LLMMessage: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LLMMessage]: ...
    def __getitem__(self, index: int | slice) -> LLMMessage | Sequence[LLMMessage]:
        return self._decode()[index]

    def __iter__(self) -> Iterator[LLMMessage]:
        return iter(self._decode())

    def _decode(self) -> list[LLMMessage]:
        if self._decoded is None:
            names: dict[str, str] = {}  # the wire says which call a result is of, not of which tool
            self._decoded = [*self._system, *(_from_wire(_loads(m), names) for m in self._messages)]
        return self._decoded


def _to_wire(message: LLMMessage) -> list[dict[str, Any]]:
    if isinstance(message, AssistantMessage):
        if isinstance(message.content, str):
            return [{"role": "assistant", "content": message.content}]
        calls = [
            {"id": c.id, "function": {"arguments": c.arguments, "name": c.name}, "type": "function"}
            for c in message.content
        ]
        return [{"role": "assistant", "tool_calls": calls, "content": message.thought}]
    if isinstance(message, FunctionExecutionResultMessage):
        return [{"role": "tool", "content": r.content, "tool_call_id": r.call_id} for r in message.content]
    assert isinstance(message.content, str), "images are not part of a conversation here"
    role = "user" if isinstance(message, UserMessage) else "system"
    return [{"role": role, "content": message.content}]


def _from_wire(parts: list[dict[str, Any]], names: dict[str, str]) -> LLMMessage:
    first = parts[0]
    if first["role"] == "tool":
        results = [
            FunctionExecutionResult(
                content=p["content"],
                name=names.get(p["tool_call_id"], ""),
                call_id=p["tool_call_id"],
                is_error=False,
            )
            for p in parts
        ]
        return FunctionExecutionResultMessage(content=results)
    if "tool_calls" in first:
        calls = [FunctionCall(id=c["id"], **c["function"]) for c in first["tool_calls"]]
        names.update((call.id, call.name) for call in calls)
        return AssistantMessage(content=calls, thought=first["content"], source=AGENT_NAME)
    if first["role"] == "assistant":
        return AssistantMessage(content=first["content"], source=AGENT_NAME)
    if first["role"] == "user":
        return UserMessage(content=first["content"], source=USER_SOURCE)
    return SystemMessage(content=first["content"])


def _dumps(value: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:  # a lone surrogate, in a tool's output for one
        return json.dumps(value, separators=(",", ":")).encode()


def _loads(encoded: bytes) -> list[dict[str, Any]]:
    text = b"[%b]" % encoded
    try:
        return list(orjson.loads(text))
    except orjson.JSONDecodeError:
        return list(json.loads(text))
