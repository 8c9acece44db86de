"""Any JSON value as the body of any route: it is refused, or kept as it was; nothing else can happen."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.native.redact import redact
from tests.integration.bad_input.asking import BODIES, PARSERS, routes
from tests.integration.test_http_server import HttpServer

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | ANY_TEXT
    | st.sampled_from([2**53, 2**53 + 1, -(2**63), 1e308, -0.0, "", "s", "root", "idle", "x" * 129])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(ANY_TEXT, VALUES, max_size=5)
BODIED = [route for route in routes() if route.has_body]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    with HttpServer(http=PARSERS["httptools"]) as server:
        server.client.post("/chat", json={"session_id": "s", "message": "x"})
        yield server.client


def post(client: httpx2.Client, method: str, path: str, body: Any) -> httpx2.Response:
    """Send ``body`` as it is, NaN and half surrogate pairs too, and check that the answer is one of ours."""
    raw = json.dumps(body).encode()
    response = client.request(method, path, content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["status"] == response.status_code
    return response


@pytest.mark.parametrize("route", BODIED, ids=lambda route: f"{route.method} {route.path}")
@settings(max_examples=60)
@given(data=st.data())
def test_any_value(client: httpx2.Client, route: Any, data: st.DataObject) -> None:
    """Of any shape, and in any of the fields that the route knows."""
    known = st.dictionaries(st.sampled_from(sorted(route.fields)), VALUES, max_size=4)
    body = data.draw(
        VALUES | OBJECTS | known | known.map(lambda some: {**BODIES.get(route.path, {}), **some})
    )
    post(client, route.method, route.at(), body)


def is_plain(value: Any) -> bool:
    """Whether JSON has room for it as it is: no odd number, no odd character."""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return all(map(is_plain, (*value, *value.values())))
    if isinstance(value, list):
        return all(map(is_plain, value))
    if isinstance(value, float):
        return text not in ("NaN", "Infinity", "-Infinity")
    if isinstance(value, int):
        return abs(value) <= 2**53
    return not isinstance(value, str) or not any("\ud800" <= c <= "\udfff" or c == "\0" for c in value)


@settings(max_examples=150)
@given(kept=OBJECTS)
def test_what_is_taken_comes_back(client: httpx2.Client, kept: dict[str, Any]) -> None:
    """Metadata, state and a checkpoint's data are the same afterwards, byte for byte as JSON."""
    has_prefix = any(key.startswith(("temp:", "app:", "user:")) for key in kept)
    for field, path, method in (
        ("metadata", "/sessions", "POST"),
        ("state", "/sessions/s/state", "PATCH"),
        ("data", "/sessions/s/checkpoints", "POST"),
    ):
        response = post(client, method, path, {field: kept})
        if not is_plain(kept) or (field == "state" and has_prefix):
            assert response.status_code in (400, 422)
            continue
        assert response.status_code in (200, 201), response.text
        expected = redact(kept)
        if field == "state":  # a merge patch: null takes a key away, and others were there before
            back = response.json()["state"]
            for key, value in expected.items():
                if not isinstance(value, dict | type(None)):
                    assert json.dumps(back[key], sort_keys=True) == json.dumps(value, sort_keys=True)
        else:
            assert json.dumps(response.json()[field], sort_keys=True) == json.dumps(expected, sort_keys=True)
