"""What the guard lets in, what it refuses and how, driven by hand."""

import json
import logging

import pytest

from app.api.exchange import HOPS_KEY, Missing, exchange_of
from app.api.guard import Guard
from app.api.options import ApiOptions
from app.api.safety import DEFAULTS
from tests.unit.api.wire import GONE, Wire, http_scope, part

JSON = {"content-type": "application/json"}


class Inner:
    """The application behind the guard: reads the body and says what it saw."""

    def __init__(self, error: Exception | None = None, *, late: bool = False) -> None:
        self.scope = None
        self.body = None
        self.raw = b""
        self._error = error
        self._late = late

    async def __call__(self, scope, receive, send) -> None:
        self.scope = scope
        if scope["type"] != "http":
            return
        self.body = exchange_of(scope).body
        if scope["method"] in ("POST", "PATCH"):
            self.raw = (await receive())["body"]
        if self._error and not self._late:
            raise self._error
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
        if self._error:
            raise self._error
        await send({"type": "http.response.body", "body": b"ok"})


async def run(scope, *events, inner=None, **options) -> tuple[Wire, Inner]:
    inner = inner or Inner()
    wire = Wire(*events)
    await Guard(inner, ApiOptions(**options))(scope, wire.receive, wire.send)
    return wire, inner


async def test_a_get_passes_without_a_look_at_its_body() -> None:
    """A request without a body is not waited for."""
    wire, inner = await run(http_scope())
    assert wire.status == 200
    assert wire.received == 0
    assert isinstance(inner.body, Missing)


async def test_every_response_carries_a_request_id() -> None:
    """A generated id, another each time, beside the response's own headers."""
    first, _ = await run(http_scope())
    second, _ = await run(http_scope())
    assert first.headers["x-own"] == "1"
    assert len(first.headers["x-request-id"]) == 32
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_every_response_is_safe() -> None:
    """Good answers, refusals and crashes tell browsers not to keep, guess, show or embed them."""
    for scope, inner in (
        (http_scope(), None),
        (http_scope(path="/a%2Fb"), None),
        (http_scope("POST", headers=JSON | {"content-length": "9" * 9}), None),
        (http_scope(), Inner(ValueError())),
    ):
        wire, _ = await run(scope, inner=inner)
        assert {name: wire.headers[name.decode()].encode() for name, _ in DEFAULTS} == dict(DEFAULTS)


async def test_a_request_for_another_host_is_refused() -> None:
    """But not one that another node passes on, which asks by an address of its own."""
    wire, inner = await run(http_scope(headers={"host": "evil.example"}), allowed_hosts=("good.example",))
    assert (wire.status, wire.problem["code"]) == (400, "MALFORMED_REQUEST")
    assert b"evil" not in wire.body
    assert inner.scope is None
    for scope in (
        http_scope(headers={"host": "good.example"}),
        http_scope(path="/api/health"),
        http_scope(**{HOPS_KEY: 1}),
    ):
        wire, _ = await run(scope, allowed_hosts=("good.example",))
        assert wire.status == 200


@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [
        ("abc-123", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("é", False),
        ("a\tb", False),
    ],
)
async def test_a_sane_request_id_is_kept(sent: str, is_kept: bool) -> None:
    """The caller's id comes back if it is 1 to 128 visible ASCII characters."""
    wire, _ = await run(http_scope(headers={"X-Request-ID": sent}))
    assert (wire.headers["x-request-id"] == sent) is is_kept


@pytest.mark.parametrize(
    ("path", "root", "route"),
    [
        ("/api/chat", "/api", "/chat"),
        ("/agent_backend/agent-stats", "/agent_backend", "/agent-stats"),
        ("/chat", "", "/chat"),
        ("/apiary", "", "/apiary"),
        ("/api", "/api", ""),
        ("/api/api/chat", "/api", "/api/chat"),
    ],
)
async def test_an_alias_becomes_part_of_the_root_path(path: str, root: str, route: str) -> None:
    """Routes see the canonical path, links keep the prefix, and no prefix counts twice."""
    _, inner = await run(http_scope(path=path))
    assert inner.scope["root_path"] == root
    assert inner.scope["path"].removeprefix(root) == route
    assert exchange_of(inner.scope).path == path


async def test_aliases_work_below_a_mount_and_behind_a_proxy() -> None:
    """The alias follows whatever root path there is, given with the path or taken off before."""
    for path in ("/pool/api/chat", "/api/chat"):
        _, inner = await run(http_scope(path=path, root_path="/pool"))
        assert (inner.scope["root_path"], inner.scope["path"]) == ("/pool/api", "/pool/api/chat")


async def test_without_aliases_there_are_none() -> None:
    """An empty list of prefixes switches them off."""
    _, inner = await run(http_scope(path="/api/chat"), alias_prefixes=())
    assert inner.scope["root_path"] == ""


@pytest.mark.parametrize(
    "path",
    [
        "/sessions/a%2Fb",
        "/sessions/a%2fb",
        "/sessions/..%2f..%2fetc",
        "/sessions/..",
        "/sessions/%2e%2e",
        "/sessions/%2E/x",
        "/./sessions",
        "/sessions/a%00b",
        "/sessions/%ff",
        "/sessions/%ed%a0%80",
        "/sessions/a\x01b",
        "/sessions/a\x7fb",
        "/sessions/a\xffb",
    ],
)
async def test_a_path_that_cannot_name_anything_is_not_found(path: str) -> None:
    """Encoded slashes, dot segments, NUL, broken UTF-8 and raw controls never reach the routes."""
    wire, inner = await run(http_scope(path=path))
    assert (wire.status, wire.problem["code"]) == (404, "NOT_FOUND")
    assert inner.scope is None


@pytest.mark.parametrize(
    "path", ["/users/%E5%BC%A0/sessions", "/sessions/a.b", "/sessions/...", "/s/a%20b", "/s/%zz"]
)
async def test_other_paths_pass(path: str) -> None:
    """Dots inside of names, encoded text and strange ids are for the routes to judge."""
    wire, _ = await run(http_scope(path=path))
    assert wire.status == 200


async def test_the_body_is_parsed_once_and_handed_on() -> None:
    """The application gets the value and may read the bytes again."""
    wire, inner = await run(http_scope("POST", headers=JSON), part(b'{"a":', more=True), part(b"1}"))
    assert wire.status == 200
    assert inner.body == {"a": 1}
    assert inner.raw == b'{"a":1}'


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        ({}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE"),
        ({"content-type": "text/plain"}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE"),
        ({"content-type": "application/x-www-form-urlencoded"}, b"a=1", 415, "UNSUPPORTED_MEDIA_TYPE"),
        ({"content-type": "application/json; charset=utf-16"}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE"),
        ({"content-type": "application/json; charset=latin-1"}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE"),
        ({"content-type": "application/jsonp"}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE"),
        ({"content-type": "application/json" + ";" * 200}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE"),
        (
            {"content-type": "application/json;charset=utf-8;charset=utf-7"},
            b"{}",
            415,
            "UNSUPPORTED_MEDIA_TYPE",
        ),
        ({**JSON, "content-encoding": "gzip"}, b"\x1f\x8b", 415, "UNSUPPORTED_MEDIA_TYPE"),
        (JSON, b"{", 400, "MALFORMED_JSON"),
        (JSON, b'{"a":NaN}', 400, "MALFORMED_JSON"),
        (JSON, rb'{"a":"\ud800"}', 422, "VALIDATION_ERROR"),
        (JSON, b" " * 101, 413, "PAYLOAD_TOO_LARGE"),
    ],
)
async def test_an_unfit_body_is_refused(headers, body: bytes, status: int, code: str) -> None:
    """What is too large, not JSON by its type, or not JSON at all, gets its problem and stops there."""
    wire, inner = await run(http_scope("POST", headers=headers), part(body), max_body_bytes=100)
    assert (wire.status, wire.problem["code"]) == (status, code)
    assert inner.scope is None


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        'Application/JSON;charset="UTF-8"',
        "application/json; v=1",
        "application/json ; v=1 ; charset = utf8 ;",
    ],
)
async def test_json_by_any_spelling_passes(content_type: str) -> None:
    """Case, quotes and further parameters do not matter."""
    wire, _ = await run(http_scope("POST", headers={"content-type": content_type}), part(b"{}"))
    assert wire.status == 200


async def test_an_empty_body_needs_no_type() -> None:
    """A POST without a body passes."""
    wire, inner = await run(http_scope("POST"), part(b""))
    assert wire.status == 200
    assert isinstance(inner.body, Missing)


async def test_a_body_of_exactly_the_limit_passes() -> None:
    """The limit itself is allowed."""
    wire, _ = await run(http_scope("POST", headers=JSON), part(b'"' + b"a" * 98 + b'"'), max_body_bytes=100)
    assert wire.status == 200


async def test_an_announced_excess_is_refused_unread() -> None:
    """The answer is out before a single byte was asked for; the connection is to be closed."""
    headers = {**JSON, "content-length": "99999999999", "expect": "100-continue"}
    wire, _ = await run(http_scope("POST", headers=headers), max_body_bytes=100)
    assert wire.status == 413
    assert wire.headers["connection"] == "close"
    assert wire.received == 0
    assert wire.is_complete


async def test_an_unannounced_excess_is_cut_while_it_comes() -> None:
    """Without a length, or with a false one, reading ends at the limit; a little is swallowed after it."""
    endless = [part(b"a" * 1024, more=True) for _ in range(10_000)]
    headers = {**JSON, "transfer-encoding": "chunked"}
    wire, inner = await run(http_scope("POST", headers=headers), *endless, max_body_bytes=4096)
    assert wire.status == 413
    assert wire.received <= 5 + 64 + 1
    assert wire.is_complete
    assert inner.scope is None


async def test_a_client_that_leaves_while_it_sends_gets_nothing() -> None:
    """Half a request is not carried out."""
    wire, inner = await run(http_scope("POST", headers=JSON), part(b"{", more=True), GONE)
    assert wire.sent == []
    assert inner.scope is None


async def test_a_bug_is_answered_without_a_word_about_it(caplog: pytest.LogCaptureFixture) -> None:
    """An exception becomes a 500 that tells nothing; the log has it with the request's id."""
    caplog.set_level(logging.ERROR)
    wire, _ = await run(http_scope(), inner=Inner(ValueError("sk-12345 in /secret/path")))
    assert (wire.status, wire.problem["code"]) == (500, "INTERNAL_ERROR")
    assert b"sk-12345" not in wire.body
    assert wire.headers["x-request-id"] in caplog.text
    assert "sk-12345" in caplog.text


async def test_a_bug_after_the_response_began_goes_to_the_server() -> None:
    """A second response cannot be sent: the server has to close the connection."""
    with pytest.raises(ValueError, match="late"):
        await run(http_scope(), inner=Inner(ValueError("late"), late=True))


async def test_other_protocols_pass_untouched() -> None:
    """Lifespan and websocket scopes are not the guard's business."""
    scope = {"type": "lifespan"}
    _, inner = await run(scope)
    assert inner.scope is scope


async def test_cors_reaches_refusals_too() -> None:
    """A page of an allowed origin may read errors and the named headers; others get no permission."""
    options = {"cors_origins": ("https://a.example",)}
    headers = {"origin": "https://a.example", "content-type": "text/plain"}
    wire, _ = await run(http_scope("POST", headers=headers), part(b"x"), **options)
    assert wire.status == 415
    assert wire.headers["access-control-allow-origin"] == "https://a.example"
    exposed = wire.headers["access-control-expose-headers"].split(", ")
    limits = {f"RateLimit-{name}" for name in ("Limit", "Remaining", "Reset", "Policy")}
    assert set(exposed) == limits | {
        *("X-Request-ID", "X-Session-ID", "X-Turn-ID", "ETag", "Link", "Location", "Retry-After")
    }

    other, _ = await run(http_scope(headers={"origin": "https://evil.example"}), **options)
    assert "access-control-allow-origin" not in other.headers


async def test_any_origin_never_comes_with_credentials() -> None:
    """No answer lets a browser send what it holds for this server; so ``*`` lets nobody in by itself."""
    for origins in (("*",), ("https://a.example",)):
        preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
        for scope in (
            http_scope("OPTIONS", headers=preflight),
            http_scope(headers=preflight | {"cookie": "a=b"}),
        ):
            wire, _ = await run(scope, cors_origins=origins)
            assert wire.headers["access-control-allow-origin"] in ("*", "https://a.example")
            assert "access-control-allow-credentials" not in wire.headers


async def test_a_preflight_names_what_is_allowed() -> None:
    """Browsers may send the contract's headers and methods."""
    headers = {
        "origin": "https://a.example",
        "access-control-request-method": "PATCH",
        "access-control-request-headers": "if-match,content-type,last-event-id,idempotency-key,authorization",
    }
    wire, inner = await run(http_scope("OPTIONS", headers=headers), cors_origins=("https://a.example",))
    assert wire.status == 200
    assert "PATCH" in wire.headers["access-control-allow-methods"]
    assert "x-request-id" in wire.headers
    assert inner.scope is None


async def test_without_origins_there_is_no_cors() -> None:
    """By default no other site's page may read anything."""
    wire, _ = await run(http_scope(headers={"origin": "https://a.example"}))
    assert not [name for name in wire.headers if name.startswith("access-control")]


async def test_a_problem_names_the_path_as_it_was_sent() -> None:
    """``instance`` keeps the alias and the percent-encoding."""
    wire, _ = await run(http_scope(path="/api/sessions/a%2Fb"))
    assert wire.problem["instance"] == "/api/sessions/a%2Fb"
    assert json.loads(wire.body)["request_id"] == wire.headers["x-request-id"]
