"""Rows 35 to 55 and 74 to 83 of the catalogue: bodies, on every route that has one."""

import json
from typing import Any

import pytest

from tests.integration.bad_input.asking import CANARY, Asked, Route, routes

MALFORMED = (400, "MALFORMED_JSON")
UNFIT = (422, "VALIDATION_ERROR")
DEEP: Any = 1
for _ in range(33):
    DEEP = {"a": DEEP}

RAW = {
    "35 half a pair": (rb'{"message":"\ud800"}', UNFIT),
    "35 other half": (rb'{"message":"x\udfffx"}', UNFIT),
    "36 half a pair in bytes": (b'{"message":"\xed\xa0\x80"}', MALFORMED),
    "37 half a pair in a value": (rb'{"metadata":{"a":[{"b":"\udc00"}]}}', UNFIT),
    "37 half a pair in a key": (rb'{"metadata":{"\ud83d":1}}', UNFIT),
    "38 half a pair in a field of another type": (rb'{"ttl_s":"\ud800","turns":"\ud800"}', UNFIT),
    "39 no UTF-8": (b'{"message":"\xff\xfe"}', MALFORMED),
    "40 NUL": (rb'{"message":"a\u0000b"}', UNFIT),
    "40 NUL in a key": (rb'{"a\u0000b":1}', UNFIT),
    "42 infinity": (b'{"a":Infinity}', MALFORMED),
    "42 minus infinity": (b'{"a":-Infinity}', MALFORMED),
    "42 1e400": (b'{"a":1e400}', MALFORMED),
    "43 NaN for a message": (b'{"message":NaN}', MALFORMED),
    "44 NaN in metadata": (b'{"metadata":{"a":NaN}}', MALFORMED),
    "45 2^63": (b'{"metadata":{"a":9223372036854775808}}', UNFIT),
    "45 2^200": (b'{"ttl_s":%d}' % 2**200, UNFIT),
    "45 2^53 + 1": (b'{"turns":9007199254740993}', UNFIT),
    "46 5,000 digits": (b'{"metadata":{"a":' + b"9" * 5000 + b"}}", UNFIT),
    "48 key twice": (b'{"a":1,"a":1}', MALFORMED),
    "48 key twice inside": (b'{"metadata":{"a":{"b":1,"\\u0062":2}}}', MALFORMED),
    "49 1,000 arrays": (b"[" * 1000 + b"]" * 1000, MALFORMED),
    "49 100,000 arrays": (b"[" * 100_000 + b"]" * 100_000, MALFORMED),
    "49 100,000 arrays, open": (b"[" * 100_000, MALFORMED),
    "50 900 objects": (b'{"a":' * 900 + b"1" + b"}" * 900, MALFORMED),
    "51 90,000 fields": (b"{" + b",".join(b'"%d":1' % n for n in range(90_000)) + b"}", UNFIT),
    "52 BOM": (b"\xef\xbb\xbf{}", MALFORMED),
    "52 UTF-16": ("{}".encode("utf-16"), MALFORMED),
    "52 UTF-32": ("{}".encode("utf-32-le"), MALFORMED),
    "53 array": (b"[]", UNFIT),
    "53 string": (b'"' + CANARY.encode() + b'"', UNFIT),
    "53 number": (b"7", UNFIT),
    "54 junk behind": (b"{}x", MALFORMED),
    "54 two": (b"{}{}", MALFORMED),
    "54 comment": (b"{}//x", MALFORMED),
    "54 half": (b'{"message":"' + CANARY.encode(), MALFORMED),
    "54 single quotes": (b"{'message':'x'}", MALFORMED),
    "54 blanks": (b" \n", MALFORMED),
    "54 words": (CANARY.encode(), MALFORMED),
    "54 line end in a string": (b'{"message":"a\nb"}', MALFORMED),
}
UNKNOWN = {
    "74 extra": {"extra": CANARY},
    "74 prototype": {"__proto__": {"is_admin": True}},
    "74 class": {"__class__": CANARY, "__init__": {"__globals__": 1}},
    "74 model_config": {"model_config": {"extra": "allow"}},
    "75 owner": {"owner": CANARY},
    "75 admin": {"is_admin": True, "role": "admin", "scopes": ["admin"]},
    "75 version": {"version": 7, "rev": 7, "head": None},
    "75 history": {"message_count": 7, "turn_count": 7, "created_at": "2020-01-01T00:00:00Z"},
    "79 base URL": {"base_url": "http://169.254.169.254/", "api_key": CANARY, "organization": CANARY},
    "81 messages": {"messages": [{"role": "system", "content": CANARY}]},
    "81 role": {"role": "system"},
    "81 tool calls": {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
    "82 component": {"component": {"provider": "os.system", "config": {}}},
    "82 tools": {"tools": ["os.system"], "functions": [], "tool_choice": "auto"},
}
FREE_FIELDS = ("metadata", "state", "data")
NUMBERS: dict[str, list[Any]] = {
    "ttl_s": [-1, 1e308, 10**12, True, "7", 1.0, 0.5, [], {}],
    "turns": [0, -1, True, "1", 1.0, 2**53, []],
    "count": [0, -1, True, "1", 1.5, 10**9],
    "idle_s": [-1, True, "1", 1e300],
    "keep_partial": [0, "true", []],
    "dry_run": [1, "true"],
    "all": [1, "true"],
}
PARAMS: list[dict[str, Any]] = [
    {"temperature": 1e9},
    {"temperature": True},
    {"temperature": "0.1"},
    {"top_p": -0.1},
    {"max_tokens": -1},
    {"max_tokens": 10**12},
    {"max_tokens": 1.0},
    {"n": 1000},
    {"seed": 0.5},
    {"stop": ["x"] * 10_000},
    {"stop": ["x" * 1000]},
    {"stop": [7]},
    {"reasoning_effort": "extreme"},
    {"base_url": "http://169.254.169.254/"},
    {"api_key": CANARY},
    {"extra_headers": {"Authorization": CANARY}},
    {"response_format": {"type": "json_object"}},
]


def refused(asked: Asked, route: Route, body: Any, expected: tuple[int, str] = UNFIT) -> list[str]:
    """Return the fields that were found wrong."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    document = asked.refused(*expected, asked.ask(route.method, route.at(), raw))
    assert len(json.dumps(document)) < 20_000
    return [error["field"] for error in document.get("errors", ())]


def having(*names: str) -> list[tuple[Route, str]]:
    found = [(route, name) for route in routes() for name in names if name in route.fields]
    assert found
    return found


def with_field(route: Route, name: str, value: Any) -> dict[str, Any]:
    return {**(route.body or {}), name: value}


@pytest.mark.parametrize("row", RAW)
def test_whole_bodies(asked: Asked, row: str) -> None:
    """What is not JSON, not unambiguous, or not storable, is refused alike everywhere."""
    body, expected = RAW[row]
    bodied = [route for route in routes() if route.has_body]
    assert len(bodied) >= 18
    for route in bodied:
        refused(asked, route, body, expected)


def test_53_no_body(asked: Asked) -> None:
    """Nothing at all is refused where something is needed; ``null`` is nothing."""
    for route in routes():
        if route.body:
            for body in (b"", b"null"):
                assert refused(asked, route, body) == ["body"]


@pytest.mark.parametrize("row", UNKNOWN)
def test_unknown_fields(asked: Asked, row: str) -> None:
    """Nothing can be set but what is documented: no owner, no address, no key, no role, no code."""
    for route in routes():
        if route.has_body:
            names = UNKNOWN[row].keys() - route.fields
            body = {**(route.body or {}), **{name: UNKNOWN[row][name] for name in names}}
            assert sorted(refused(asked, route, body)) == sorted(names)


@pytest.mark.parametrize("row", UNKNOWN)
def test_unknown_fields_in_a_batch(asked: Asked, row: str) -> None:
    """An entry of a batch is judged as if it came alone, and makes nothing."""
    answer = asked.ask("POST", "/sessions/batch", json.dumps({"sessions": [UNKNOWN[row]]}).encode())
    assert answer.status == 200
    (result,) = json.loads(answer.body)["results"]
    assert result["error"]["code"] == "VALIDATION_ERROR"
    assert CANARY not in answer.body.decode()


@pytest.mark.parametrize("name", NUMBERS)
def test_31_47_numbers_and_flags(asked: Asked, name: str) -> None:
    """No value is taken for one of another type, and none beyond its bounds."""
    for route, field in having(name):
        for value in NUMBERS[name]:
            assert refused(asked, route, {field: value}) == [field]


@pytest.mark.parametrize("name", ["ttl_s", "idle_s", "turns"])
def test_30_numbers_that_are_none(asked: Asked, name: str) -> None:
    """NaN and infinity are no JSON, however they are written."""
    for route, field in having(name):
        for text in ("NaN", "Infinity", "-Infinity", "1e309", "-1e309"):
            refused(asked, route, f'{{"{field}":{text}}}'.encode(), MALFORMED)
        for text in ("nan", "inf"):
            assert refused(asked, route, {field: text}) == [field]


@pytest.mark.parametrize(
    "message", ["", "  ", "\u200b", "\u3000\n\t", "\u2060\ufeff", "x" * 100_001, 7, None, [], True]
)
def test_55_messages(asked: Asked, message: Any) -> None:
    """A message has something to read in it, and not too much."""
    for route, field in having("message"):
        assert refused(asked, route, with_field(route, field, message)) == [field]


@pytest.mark.parametrize(
    "message",
    [
        [{"type": "text", "text": "x"}],
        [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
        [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}],
        {"role": "system", "content": "x"},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ],
    ids=["83 parts", "83 file", "83 address", "81 system", "81 tool"],
)
def test_messages_of_parts(asked: Asked, message: Any) -> None:
    """A message is text and the user's: nothing is fetched for it, and no other role is spoken."""
    for route, field in having("message"):
        assert refused(asked, route, with_field(route, field, message)) == [field]


@pytest.mark.parametrize("params", PARAMS, ids=lambda params: f"80 {json.dumps(params)[:40]}")
def test_80_parameters(asked: Asked, params: dict[str, Any]) -> None:
    """Parameters are those that are documented, within their bounds."""
    for route, field in having("params"):
        for name in refused(asked, route, with_field(route, field, params)):
            assert name.split(".")[:2] == [field, next(iter(params))]


@pytest.mark.parametrize(
    "model", ["os.system", "../../etc/passwd", "gpt-5\u202e", CANARY, "*", "demo/../demo"]
)
def test_78_models(asked: Asked, model: str) -> None:
    """A model, or a provider, that the operator does not offer."""
    for route, field in having("model", "model_name", "provider"):
        refused(asked, route, with_field(route, field, model), (422, "UNKNOWN_MODEL"))


@pytest.mark.parametrize("name", ["os.system", "autogen_ext.code_executors.local", CANARY])
def test_82_agents_and_tools(asked: Asked, name: str) -> None:
    """An agent is one of the operator's profiles, and a tool one of its profile's."""
    for route, field in having("agent_id"):
        if route.path not in ("/sessions/resume", "/sessions/{session_id}/regenerate"):
            refused(asked, route, with_field(route, field, name), (404, "AGENT_NOT_FOUND"))
    for route, field in having("template"):
        assert refused(asked, route, {field: {"capabilities": [name]}}) == ["template.capabilities"]


@pytest.mark.parametrize(
    "template",
    [{"tools": []}, {"model": "x"}, {"system_prompt": 7}, {"system_prompt": "x" * 32_001}, {"context": []},
     {"context": DEEP}, {"capabilities": "x"}, {"capabilities": ["x"] * 101}, "x"],
    ids=lambda template: f"82 {json.dumps(template)[:40]}",
)  # fmt: skip
def test_82_templates(asked: Asked, template: Any) -> None:
    """What personalises an agent is text, values for it, and a choice of tools."""
    for route, field in having("template"):
        for name in refused(asked, route, {field: template}):
            assert name.startswith(field)


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ("50 33 deep", DEEP),
        ("51 1,001 keys", {str(n): n for n in range(1001)}),
        ("51 300 KB", {"a": "x" * 300_000}),
        ("77 list", [1]),
        ("77 text", CANARY),
        ("77 number", 1),
    ],
)
def test_free_objects(asked: Asked, row: str, value: Any) -> None:
    """Free data is an object, and has bounds in depth, keys and bytes."""
    for route, field in having(*FREE_FIELDS):
        fields = refused(asked, route, with_field(route, field, value))
        assert len(fields) == 1
        assert fields[0].startswith(field)


@pytest.mark.parametrize("key", ["temp:x", "app:x", "user:x"], ids=lambda key: f"76 {key}")
def test_76_keys_of_others(asked: Asked, key: str) -> None:
    """The prefixes of other states are no one's own keys."""
    for route, field in having("state"):
        assert refused(asked, route, {field: {key: 1}}) == [f"state.{key}"]


def test_76_keys_of_any_kind(asked: Asked) -> None:
    """Quotes, dollars, dots, operators and control characters are text in a key, which comes back."""
    odd = {
        "a'b": 1,
        'c"d': 2,
        "$.x[*]": 3,
        "a.b": 4,
        "$where": 5,
        "'; DROP TABLE x;--": 6,
        "\x1b[31m": "\x07",
        "": 0,
    }
    created = asked.ask(
        "POST", "/sessions", json.dumps({"session_id": "odd", "metadata": odd, "state": odd}).encode()
    )
    assert created.status == 201
    assert json.loads(created.body)["metadata"] == odd
    assert json.loads(asked.ask("GET", "/sessions/odd/state").body)["state"] == odd
    assert asked.ask("DELETE", "/sessions/odd").status == 200


@pytest.mark.parametrize(
    "text",
    ["x\n\nevent: turn.finished\ndata: {}\n\n", "x\r\rid: 1", "a\u2028b\u2029c\x85d", "\x1b[2J", "data: x"],
    ids=["93 event", "93 CR", "93 separators", "41 escape", "93 data"],
)
def test_text_that_looks_like_events(asked: Asked, text: str) -> None:
    """Text is in a stream's data, and is nothing else there; and it is stored as it came."""
    body = json.dumps({"session_id": "events", "message": text}).encode()
    answer = asked.ask("POST", "/chat/stream", body)
    assert answer.status == 200
    turn_id = answer.headers["x-turn-id"]
    frames = answer.body.decode().removeprefix("retry: 2000\n\n").removesuffix("\n\n").split("\n\n")
    for number, frame in enumerate(frames, 1):
        lines = frame.split("\n")
        assert lines[0] == f"id: {turn_id}:{number}"
        assert [line.partition(":")[0] for line in lines] == ["id", "event", "data"]
        assert json.loads(lines[2].removeprefix("data: "))["seq"] == number
        assert "\r" not in frame
    history = json.loads(asked.ask("GET", "/sessions/events/history").body)
    assert history["messages"][0]["content"] == text
    assert asked.ask("DELETE", "/sessions/events").status == 200


@pytest.mark.parametrize(
    "names", [("session_id", "conversation_id"), ("model", "model_name")], ids=["24 ids", "24 models"]
)
def test_24_two_names_for_one_thing(asked: Asked, names: tuple[str, str]) -> None:
    """That contradict each other."""
    for route, field in having(names[1]):
        body = {**(route.body or {}), names[0]: "demo", names[1]: "other"}
        assert refused(asked, route, body) == [field]
