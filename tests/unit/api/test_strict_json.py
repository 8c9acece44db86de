"""What is JSON for us, and what is refused, as malformed or as invalid."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.errors import MalformedJson
from app.api.strict_json import MAX_DEPTH, MAX_INTEGER, MAX_KEYS, parse_json
from app.domain.errors import InvalidInput


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nul",
        b'{"a":1}x',
        b'{"a":1,}',
        b"{'a':1}",
        b'{"a":1} // note',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\x00"}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e400}',
        b'{"a":-1e400}',
        b'{"a":1,"a":2}',
        b'{"b":{"a":1,"a":1}}',
        nested(MAX_DEPTH + 1),
        nested(100_000),
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
    ],
)
def test_what_is_not_json_is_malformed(raw: bytes) -> None:
    """Whatever a strict reader would not read, or read in two ways, is refused as malformed."""
    with pytest.raises(MalformedJson):
        parse_json(raw)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (rb'{"message":"\ud800"}', "message"),
        (rb'{"message":"a\udfffb"}', "message"),
        (rb'{"metadata":{"x":["\uD83D"]}}', "metadata.x.0"),
        (rb'{"metadata":{"\ud800":1}}', "metadata"),
        (rb'{"message":"a\u0000b"}', "message"),
        (rb'{"a\u0000":1}', "body"),
        (b'{"n":9007199254740993}', "n"),
        (b'{"n":-9007199254740993}', "n"),
        (b'{"n":%s}' % (b"9" * 5000), "n"),
        (b'[{"n":18446744073709551616}]', "0.n"),
        (b'{"a":[[1],[2,{"b":9007199254740993}]],"c":9007199254740993}', "a.1.1.b"),
        (rb'{"a":[[],{}],"c":[1,[],"\u0000"]}', "c.2"),
        (rb'"\u0000"', "body"),
    ],
)
def test_json_that_could_hurt_is_invalid_where_it_stands(raw: bytes, field: str) -> None:
    """Half surrogate pairs, NUL and integers beyond 2^53 are refused with the name of their field."""
    with pytest.raises(InvalidInput) as caught:
        parse_json(raw)
    assert caught.value.field == field


def test_limits_are_inclusive() -> None:
    """The deepest and the largest that are allowed are allowed."""
    assert parse_json(nested(MAX_DEPTH))
    assert parse_json(b"[9007199254740992,-9007199254740992]") == [MAX_INTEGER, -MAX_INTEGER]
    assert parse_json(rb'"\ud83d\ude00"') == "😀"
    assert len(parse_json(keys(MAX_KEYS))) == MAX_KEYS


def keys(number: int) -> bytes:
    return b"{" + b",".join(b'"%d":1' % key for key in range(number)) + b"}"


def test_an_object_of_too_many_keys_is_invalid() -> None:
    """Wherever it stands; nobody has to be told of each key that it is not known."""
    for raw in (keys(MAX_KEYS + 1), b'{"a":[' + keys(MAX_KEYS + 1) + b"]}"):
        with pytest.raises(InvalidInput) as caught:
            parse_json(raw)
        assert caught.value.field == "body"


def test_how_deep_numbers_lie_hardly_matters() -> None:
    """Many of them, where one has to be looked for: the path to each is not written down."""

    def cost_s(depth: int) -> float:
        raw = b"[" * depth + b"9007199254740991" + b",1" * 50_000 + b"]" * depth
        started = time.process_time()
        parse_json(raw)
        return time.process_time() - started

    assert min(cost_s(MAX_DEPTH) for _ in range(3)) < 4 * min(cost_s(1) for _ in range(3))


def test_a_wide_document_is_not_a_deep_one() -> None:
    """Only nesting counts towards the depth."""
    assert len(parse_json(b"[" + b"[]," * 1000 + b"[]]")) == 1001


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-MAX_INTEGER, MAX_INTEGER)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), inner
            )
        ),
        max_leaves=20,
    ),
    st.booleans(),
)
def test_ordinary_json_comes_through_unchanged(value: object, escaped: bool) -> None:
    """Every document without those oddities means what the standard library says it means."""
    assert parse_json(json.dumps(value, ensure_ascii=escaped).encode()) == value
