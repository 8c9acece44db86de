"""An answer while it streams in: from events to text, tool calls, reasoning and usage.

Gives the same as AutoGen's own client makes of the same events; reasoning comes out as
text between ``<think>`` and ``</think>``, an opening tag always at the beginning of a piece.
"""

from collections.abc import Sequence
from typing import Any

import orjson
from autogen_core import FunctionCall
from autogen_core.models import CreateResult, RequestUsage
from autogen_ext.models._utils.normalize_stop_reason import normalize_stop_reason

from app.models.call import ModelCall
from app.models.failure import malformed, reported


class StreamedAnswer:
    """Takes events as they come; ``pieces`` gives what they added to the text."""

    def __init__(self, call: ModelCall) -> None:
        self._call = call
        self._pieces: list[str] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._is_reasoning = False
        self._tool_calls: dict[int, FunctionCall] = {}
        self._finish: str | None = None
        self._usage: tuple[int, int] = (0, 0)
        self.is_complete = False  # ``[DONE]`` has come

    def take(self, events: Sequence[bytes]) -> None:
        """Take the data of events that came together.

        Raises:
            ModelError: it is not what the protocol allows, reports an error, or is too much.
        """
        size = 0
        told = said = finish = garbled = False
        for data in events:
            if data.startswith(b"[DONE]"):
                self.is_complete = True
                continue
            try:
                one_told, one_said, one_finish = self._read(orjson.loads(data))
            except (ValueError, TypeError, KeyError, AttributeError):
                garbled = True
                break
            size += len(data)
            told, said, finish = told or one_told, said or one_said, finish or one_finish
        if garbled:
            raise malformed()
        if size:
            self._call.heard(size, told=told, said=said, finish=finish)

    def pieces(self) -> list[str]:
        """Return the text that came since the last time; mostly one piece."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def result(self) -> CreateResult:
        """Return the answer as AutoGen's client would."""
        text = "".join(self._content)
        thought = "".join(self._reasoning)
        calls = list(self._tool_calls.values())
        prompt, completion = self._usage
        return CreateResult(
            finish_reason=normalize_stop_reason(self._finish),
            content=calls or text,
            usage=RequestUsage(prompt_tokens=prompt, completion_tokens=completion),
            cached=False,
            thought=(text if calls else thought) or None,
        )

    def _read(self, event: dict[str, Any]) -> tuple[bool, bool, bool]:
        """Read one event; return whether it told anything, said anything, and was the end."""
        if event.get("error"):
            raise reported()
        if isinstance(usage := event.get("usage"), dict):
            self._usage = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        choices = event.get("choices")
        if not choices:
            return False, False, False
        choice = choices[0]
        finish = choice.get("finish_reason")
        if not isinstance(finish, str | None):
            raise TypeError
        if finish is not None and self._finish is None:
            self._finish = finish
        delta = choice.get("delta") or {}
        # Most deltas have no reasoning, and of a burst of tokens every call counts.
        may_reason = self._is_reasoning or "reasoning_content" in delta or "reasoning" in delta
        reasoned = may_reason and self._reason(delta)
        said = self._say(delta)
        return reasoned or said, said, finish is not None

    def _reason(self, delta: dict[str, Any]) -> bool:
        reasoning = delta.get("reasoning_content")
        if reasoning is None:
            reasoning = delta.get("reasoning")
        if isinstance(reasoning, str) and reasoning:
            if not self._is_reasoning:
                self._is_reasoning = True
                self._pieces.append("<think>")
            self._reasoning.append(reasoning)
            self._add(reasoning)
            return True
        if reasoning is None and self._is_reasoning:
            self._is_reasoning = False
            self._add("</think>")
        return False

    def _say(self, delta: dict[str, Any]) -> bool:
        content = delta.get("content")
        if isinstance(content, str) and content:
            self._content.append(content)
            self._add(content)
            return True
        parts = delta.get("tool_calls") or ()
        for part in parts:
            self._call_tool(part)
        return bool(parts)

    def _call_tool(self, part: dict[str, Any]) -> None:
        index = part.get("index")
        if index is None:  # some servers send whole calls and do not number them
            index = len(self._tool_calls) - (0 if part.get("id") or not self._tool_calls else 1)
        call = self._tool_calls.get(index)
        if call is None:
            call = self._tool_calls[index] = FunctionCall(id="", arguments="", name="")
        function = part.get("function") or {}
        # Some servers repeat id and name in every part, others send them in pieces.
        if (call_id := part.get("id") or "") != call.id:
            call.id += call_id
        if (name := function.get("name") or "") != call.name:
            call.name += name
        call.arguments += function.get("arguments") or ""

    def _add(self, text: str) -> None:
        if self._pieces:
            self._pieces[-1] += text
        else:
            self._pieces.append(text)


def _count(usage: dict[str, Any], name: str) -> int:
    number = usage.get(name)
    return number if isinstance(number, int) else 0
