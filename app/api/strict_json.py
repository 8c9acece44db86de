"""JSON as the contract wants it: parsed once, and nothing in it that could hurt later.

What is not JSON at all, or not unambiguous, is malformed. What is JSON but could not
be stored, compared or sent back unchanged (an integer beyond 2^53, half a surrogate
pair, NUL) is invalid, wherever in the document it stands.
"""

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from app.api.errors import MalformedJson
from app.api.field_path import field_path
from app.domain.errors import InvalidInput

MAX_DEPTH = 64
MAX_INTEGER = 2**53
MAX_KEYS = 4_096
"""Of one object: four times what any may have that is kept. To say of each of 90,000 unknown keys that it is
not known took 1.5 s, in which nobody else was served."""

_TOO_LARGE = MAX_INTEGER * 2
_HALF_PAIR = re.compile("[\ud800-\udfff]")
# A document without one of these has nothing to look for, and is not walked at all.
_SUSPECT = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)|[0-9]{16}")


def parse_json(raw: bytes) -> Any:
    """Return the value of the JSON document ``raw``.

    Raises:
        MalformedJson: not UTF-8, a byte order mark, not JSON, a number that is not
            finite, a key given twice, or deeper than ``MAX_DEPTH``.
        InvalidInput: an integer beyond ``MAX_INTEGER``, a lone surrogate, a NUL, or an object of
            more than ``MAX_KEYS``.
    """
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise MalformedJson("The body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise MalformedJson(f"The body is not valid JSON (at character {error.pos}).") from None
    except RecursionError:
        raise MalformedJson(_TOO_DEEP) from None
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise MalformedJson(_TOO_DEEP)
    if _SUSPECT.search(raw):
        _check_scalars(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise InvalidInput("body", f"must have no object with more than {MAX_KEYS} keys in it")
    members = dict(pairs)
    if len(members) != len(pairs):
        raise MalformedJson("A key is given twice in one object.")
    return members


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise MalformedJson("A number is not finite.")
    return number


def _integer(text: str) -> int:
    # int() of thousands of digits is slow or refused; any stand-in beyond the limit will do.
    return int(text) if len(text) <= 20 else _TOO_LARGE


def _no_constant(_name: str) -> Any:
    raise MalformedJson("NaN and Infinity are not JSON.")


_TOO_DEEP = f"The body is nested deeper than {MAX_DEPTH}."
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_finite, parse_int=_integer, parse_constant=_no_constant
)


def _depth(value: Any) -> int:
    """Return how many containers enclose the innermost, itself counted; stops past the limit."""
    deepest, level = 0, [value] if _is_container(value) else []
    while level and deepest <= MAX_DEPTH:
        deepest += 1
        children = chain.from_iterable(each.values() if type(each) is dict else each for each in level)
        level = [child for child in children if _is_container(child)]
    return deepest


def _is_container(value: Any) -> bool:
    return type(value) is dict or type(value) is list


def _check_scalars(document: Any) -> None:
    """Refuse the first string, key or integer in document order that could hurt; a key where its object is.

    One walk, in which the path is that of the container alone: with paths of their own for 500,000
    numbers that lay deep, it took 2 s.
    """
    path: list[str | int] = []  # to the innermost of those that are open; the document has none
    walks = [_members({"": document})]
    while walks:
        for step, value in walks[-1]:
            if type(step) is str and (fault := _fault_of(step)):
                raise InvalidInput(field_path(path[1:]), fault)
            if fault := _fault_of(value):
                raise InvalidInput(field_path([*path, step][1:]), fault)
            if value and _is_container(value):
                path.append(step)
                walks.append(_members(value))
                break
        else:
            walks.pop()
            if path:
                path.pop()


def _fault_of(scalar: Any) -> str | None:
    if type(scalar) is int:
        return None if -MAX_INTEGER <= scalar <= MAX_INTEGER else "must be between -2^53 and 2^53"
    if type(scalar) is not str:
        return None
    if "\0" in scalar:
        return "must not have a NUL character in it"
    return "must not have half a surrogate pair in it" if _HALF_PAIR.search(scalar) else None


def _members(container: Any) -> Iterator[tuple[str | int, Any]]:
    return iter(container.items()) if type(container) is dict else iter(enumerate(container))
