"""YAML that says no more than JSON could: objects, lists, texts, numbers, true, false and null.

Values are read by JSON's rules: what is not one of its numbers or words is text, so a date,
``yes``, ``010`` and ``0x10`` stay as they are written. Anchors, aliases, tags and merge keys
are refused: nothing is constructed but plain data, and of that no more than the file holds.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

_MAX_DEPTH: Final = 32
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", re.ASCII)
_WORDS: Final[Mapping[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
# The library quotes what it stumbles over: a character or two, but also the name of a tag.
_QUOTED_TEXT: Final = re.compile(r"'[^'<]{5,}'")


class YamlMistake(ValueError):
    """``reason`` says what is wrong, ``place`` where: a line, or the path of a key. Neither has a value."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")
        self.place = place
        self.reason = reason


@dataclass(frozen=True, slots=True)
class PlainYaml:
    """``lines`` tells where each key and each member of a list is: ``agents.a.tools.0`` → line."""

    content: Any
    lines: Mapping[str, int]


def read_plain_yaml(text: str) -> PlainYaml:
    """Return the one document that ``text`` holds; an empty one is ``None``.

    Raises:
        YamlMistake: it is not YAML, or more than plain data.
    """
    # Costs 0.1 s, so only those who have such a file pay.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError
    from ruamel.yaml.reader import ReaderError

    reader = _Reader(YAML(typ="safe", pure=True).parse(text))
    try:
        return PlainYaml(reader.document(), reader.lines)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1} column {mark.column + 1}" if mark else ""
        problem = _QUOTED_TEXT.sub("…", error.problem or "")
        raise YamlMistake(place, f"is not YAML: {problem}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlMistake(f"line {line}", "has a character that YAML does not allow") from None
    except (ValueError, OverflowError) as error:
        if isinstance(error, YamlMistake):
            raise
        # An escape beyond Unicode, or a number of thousands of digits; the message shows it.
        raise YamlMistake("", "has a character or a number that cannot be read") from None


class _Reader:
    """Makes plain data of the library's events, which stand for what is written, unresolved."""

    def __init__(self, events: Iterator[Any]) -> None:
        self._events = events
        self.lines: dict[str, int] = {}

    def document(self) -> Any:
        next(self._events)  # the stream's start
        if _kind(next(self._events)) == "StreamEnd":
            return None
        content = self._value(next(self._events), "", 0)
        next(self._events)  # the document's end
        after = next(self._events)
        if _kind(after) != "StreamEnd":
            raise YamlMistake(_line(after), "begins a second document")
        return content

    def _value(self, event: Any, path: str, depth: int) -> Any:
        _refuse_extras(event)
        if depth > _MAX_DEPTH:
            raise YamlMistake(_line(event), "is nested too deeply")
        if _kind(event) == "Scalar":
            return _to_value(event)
        return (self._list if _kind(event) == "SequenceStart" else self._object)(path, depth)

    def _list(self, path: str, depth: int) -> list[Any]:
        found: list[Any] = []
        while _kind(event := next(self._events)) != "SequenceEnd":
            found.append(self._member(event, event, f"{path}{len(found)}", depth))
        return found

    def _object(self, path: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while _kind(event := next(self._events)) != "MappingEnd":
            key = _to_key(event)
            if key in found:
                raise YamlMistake(f"{path}{key}", f"appears twice in the same object ({_line(event)})")
            found[key] = self._member(event, next(self._events), f"{path}{key}", depth)
        return found

    def _member(self, place: Any, event: Any, path: str, depth: int) -> Any:
        self.lines[path] = place.start_mark.line + 1
        return self._value(event, f"{path}.", depth + 1)


def _kind(event: Any) -> str:
    return type(event).__name__.removesuffix("Event")


def _line(event: Any) -> str:
    return f"line {event.start_mark.line + 1}"


def _refuse_extras(event: Any) -> None:
    if _kind(event) == "Alias" or event.anchor is not None:
        raise YamlMistake(_line(event), "has an anchor or an alias, which are not read here")
    if event.tag is not None:
        raise YamlMistake(_line(event), "has a tag, which is not read here")


def _to_key(event: Any) -> str:
    _refuse_extras(event)
    if _kind(event) != "Scalar":
        raise YamlMistake(_line(event), "has a key that is not a text")
    if _is_bare(event) and event.value == "<<":
        raise YamlMistake(_line(event), "has a merge key, which is not read here")
    return str(event.value)


def _is_bare(event: Any) -> bool:
    return bool(event.implicit[0])


def _to_value(event: Any) -> Any:
    text = str(event.value)
    if not _is_bare(event):
        return text
    if text in _WORDS:
        return _WORDS[text]
    return json.loads(text) if _NUMBER.fullmatch(text) else text
