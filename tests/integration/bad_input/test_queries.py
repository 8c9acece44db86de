"""Rows 25 to 34 and 88 to 92 of the catalogue: queries, cursors, keys and positions."""

import json
from typing import Any

import pytest

from tests.integration.bad_input.asking import CANARY, TURN, Asked, Route, routes

NUMBERS = {
    "25 negative": "-1",
    "25 zero": "0",
    "26 huge": "1" + "0" * 20,
    "26 one too many": "201",
    "27 underscore": "1_000",
    "27 fraction": "5.0",
    "27 sign": "%2B1",
    "27 exponent": "1e2",
    "27 other digits": "%D9%A3",
    "27 nothing": "",
    "27 a word": CANARY,
    "29 5,000 digits": "9" * 5000,
    "30 nan": "nan",
    "30 inf": "inf",
    "30 beyond floats": "1e309",
}


def refused_field(asked: Asked, route: Route, query: str, field: str) -> None:
    body = json.dumps(route.body).encode() if route.has_body else None
    document = asked.refused(422, "VALIDATION_ERROR", asked.ask(route.method, f"{route.at()}?{query}", body))
    assert [error["field"] for error in document["errors"]] == [field]
    assert len(json.dumps(document)) < 1000


@pytest.mark.parametrize("row", NUMBERS)
def test_limits(asked: Asked, row: str) -> None:
    """A page's size is a plain number from 1 to 200, in every list."""
    lists = [route for route in routes() if "limit" in route.queries]
    assert len(lists) >= 6
    for route in lists:
        refused_field(asked, route, f"limit={NUMBERS[row]}", "limit")


@pytest.mark.parametrize("row", [row for row in NUMBERS if row[:2] not in ("26", "29") and row != "25 zero"])
def test_positions(asked: Asked, row: str) -> None:
    """So is the position in a stream."""
    for route in routes():
        if {"after"} == route.queries - {"user_id"}:
            refused_field(asked, route, f"after={NUMBERS[row]}", "after")


@pytest.mark.parametrize("value", ["2", "1", "True", "yes", "", CANARY], ids=lambda value: f"32 {value}")
def test_flags(asked: Asked, value: str) -> None:
    """A flag is true or false."""
    for route in routes():
        for name in route.queries & {"stream", "force"}:
            refused_field(asked, route, f"{name}={value}", name)


def test_28_a_parameter_twice(asked: Asked) -> None:
    """Of two values for one parameter neither is taken."""
    seen = 0
    for route in routes():
        for name in route.queries:
            refused_field(asked, route, f"{name}=1&{name}=2", name)
            seen += 1
    assert seen > 40


def test_33_an_unknown_parameter(asked: Asked) -> None:
    """A misspelt parameter is an error, not a surprise; only probes may add what they like."""
    for route in routes():
        if route.path not in ("/health", "/ready"):
            refused_field(asked, route, f"unknwon={CANARY}", "unknwon")
        else:
            assert asked.ask("GET", f"{route.path}?{CANARY}=1").status == 200


def test_more_parameters_than_anybody_needs(asked: Asked) -> None:
    """A hundred are told one by one that they are not known; of more there is one word for all."""
    query = "&".join(f"p{number}=" for number in range(100))
    document = asked.refused(422, "VALIDATION_ERROR", asked.ask("GET", f"/sessions?{query}"))
    assert len(document["errors"]) > 1
    query = "&".join(f"p{number}" for number in range(2_000))
    document = asked.refused(422, "VALIDATION_ERROR", asked.ask("GET", f"/sessions?{query}"))
    assert [error["field"] for error in document["errors"]] == ["query"]


@pytest.mark.parametrize("query", ["%ff=1", "limit=%ff", "\xff", "a=%ed%a0%80"], ids=lambda q: f"33 {q!a}")
def test_a_query_that_is_no_text(asked: Asked, query: str) -> None:
    """Broken UTF-8 in a query is refused."""
    for route in routes():
        if route.path in ("/health", "/ready"):
            continue
        body = json.dumps(route.body).encode() if route.has_body else None
        answer = asked.ask(route.method, f"{route.at()}?{query}", body)
        if query == "\xff":  # no HTTP: stock uvicorn says so in plain text
            assert answer.status == 400
        else:
            asked.refused(422, "VALIDATION_ERROR", answer)


@pytest.mark.parametrize(
    "cursor",
    ["", "%00", CANARY, "x" * 2000, "W10", "bnVsbA", "eyJhIjoxfQ", "%E4%BD%A0"],
    ids=lambda c: f"34 {c[:20]}",
)
def test_cursors(asked: Asked, cursor: str) -> None:
    """What was not handed out as a cursor is none."""
    lists = [route for route in routes() if "cursor" in route.queries]
    assert len(lists) >= 5
    for route in lists:
        refused_field(asked, route, f"cursor={cursor}", "cursor")


@pytest.mark.parametrize(
    "key",
    [b"", b"a b", b"k" * 129, b"\xc3\xa9", b"a, b", b"a\tb", b"k" * 10_000],
    ids=["empty", "blank", "129", "no ASCII", "list", "tab", "10 KB"],
)
def test_88_idempotency_keys(asked: Asked, key: bytes) -> None:
    """A key is 1 to 128 visible ASCII characters; with another one no turn is made."""
    for path in ("/chat", "/chat/stream", "/sessions/s/regenerate"):
        body = b"{}" if "regenerate" in path else b'{"session_id":"s","message":"x"}'
        answer = asked.ask("POST", path, body, {"Idempotency-Key": key})
        document = asked.refused(422, "VALIDATION_ERROR", answer)
        assert document["errors"][0]["field"] == "Idempotency-Key"


@pytest.mark.parametrize("name", ["Idempotency-Key", "If-Match", "Last-Event-ID"])
def test_24_a_header_twice(asked: Asked, name: str) -> None:
    """Of two values for one header neither is taken."""
    for route in routes():
        body = json.dumps(route.body).encode() if route.has_body else None
        headers: dict[str, Any] = {name: "a\r\n" + name + ": b"}
        document = asked.refused(422, "VALIDATION_ERROR", asked.ask(route.method, route.at(), body, headers))
        assert [error["field"] for error in document["errors"]] == [name]


@pytest.mark.parametrize(
    "value",
    [
        "x",
        "-1",
        "1" + "0" * 30,
        f"{TURN}:",
        f"{TURN}:-1",
        f"{TURN}:1.5",
        f"{TURN}:{'9' * 30}",
        "0" * 36 + ":1",
    ],
)
def test_92_event_ids(asked: Asked, value: str) -> None:
    """A malformed event id, or one of another turn, is refused."""
    for turn in (TURN, asked.turn_id):
        answer = asked.ask("GET", f"/sessions/s/turns/{turn}/stream", headers={"Last-Event-ID": value})
        assert asked.refused(422, "VALIDATION_ERROR", answer)["errors"][0]["field"] == "Last-Event-ID"


@pytest.mark.parametrize(
    "value", ["x", '"', '"0.1', 'W/"0.1"', '"0.1", "0.2"', '"-1.1"', "9" * 5000, "é".encode()]
)
def test_tags_that_are_none(asked: Asked, value: str | bytes) -> None:
    """A condition that cannot be met, or read, changes nothing."""
    for route in routes():
        if route.method == "PATCH" and "session_id" in route.names:
            answer = asked.ask("PATCH", route.at(), b'{"title":"x"}', {"If-Match": value})
            assert answer.status in (412, 422)
            assert answer.problem["code"] in ("PRECONDITION_FAILED", "VALIDATION_ERROR")
