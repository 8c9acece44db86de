"""Rows 20 to 23 and 56 to 73 of the catalogue: headers, sizes, types, methods, and what is no HTTP.

How long a request may take (61 to 63) is in ``test_arrival``. What the parser itself refuses, stock
uvicorn with h11 answers in its own words, and some of it not at all like us: there is a status then.
"""

import json

import pytest

from tests.integration.bad_input.asking import CANARY, Asked, routes

HEAD = b"POST /chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
MESSAGE = b'{"session_id":"s","message":"x"}'
OURS = {400: "MALFORMED_REQUEST", 414: "URI_TOO_LONG", 431: "HEAD_TOO_LARGE"}


@pytest.mark.parametrize(
    "value",
    [
        b"a\tX-Evil: 1",
        "日本".encode(),
        "é".encode("latin-1"),
        b"a b",
        b"",
        b"x" * 129,
        CANARY.encode() + b" ",
        b"a,b;\x80",
    ],
    ids=["20 header", "22 script", "23 latin-1", "23 blank", "23 empty", "23 long", "23 end", "21 byte"],
)
def test_headers_that_could_come_back(asked: Asked, value: bytes) -> None:
    """Nothing of a request's headers comes back but a request id of visible ASCII characters."""
    headers: dict[str, str | bytes] = {"X-Request-ID": value, "X-Session-ID": value, "X-Turn-ID": value}
    for path, status in (("/ready", 200), ("/nope", 404), ("/sessions/s", 200)):
        answer = asked.ask("GET", path, headers=headers)
        assert answer.status == status
        sent = value.strip().decode("latin-1")
        assert answer.headers["x-request-id"] != sent or sent == CANARY
        assert "x-session-id" not in answer.headers
        assert "x-evil" not in answer.headers


@pytest.mark.parametrize("row", ["20 CR", "20 LF", "21 NUL", "21 bell"])
def test_headers_that_are_none(asked: Asked, row: str) -> None:
    """Control characters end no header, and begin none."""
    character = {"20 CR": b"\r", "20 LF": b"\n", "21 NUL": b"\0", "21 bell": b"\a"}[row]
    answer = asked.send(
        b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-ID: a" + character + b"b\r\n\r\n"
    )
    assert answer.status in (200, 400)
    assert b"a" + character + b"b" not in answer.body


def test_56_a_large_body(asked: Asked) -> None:
    """2 MB, announced, on every route that has one."""
    for route in routes():
        if route.has_body:
            asked.refused(413, "PAYLOAD_TOO_LARGE", asked.ask(route.method, route.at(), b"x" * 2_000_000))


def test_57_a_large_body_in_chunks(asked: Asked) -> None:
    """Cut at the limit, whatever comes; the client still gets to read why."""
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    answer = asked.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 2000, b"0\r\n\r\n")
    asked.refused(413, "PAYLOAD_TOO_LARGE", answer)


@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"], ids=["58 announced", "59 waiting"])
def test_a_monster_is_refused_at_once(asked: Asked, expect: bytes) -> None:
    """Nothing of the body has to be sent, and none is asked for."""
    answer = asked.send(HEAD + b"Content-Length: 99999999999\r\n" + expect + b"\r\n")
    asked.refused(413, "PAYLOAD_TOO_LARGE", answer)
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: -1",
        b"Content-Length: +32",
        b"Content-Length: 1\r\nContent-Length: 2",
        b"Content-Length: 32\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, gzip",
        b"Content-Length : 32",
        b"Content-Length: 32\r\n folded",
        b"Content-Length: " + b"9" * 30,
    ],
    ids=lambda fields: f"60 {fields.decode()[:50]}",
)
def test_lengths_that_contradict(asked: Asked, fields: bytes) -> None:
    """Where a request ends must be certain, or it is none; there is no second one in its body."""
    if asked.parser == "h11" and fields in (b"Content-Length: 32\r\nTransfer-Encoding: chunked",):
        fields += b", gzip"  # h11 takes the chunks, as it may; this it does not
    answer = asked.send(HEAD + fields + b"\r\n\r\n" + MESSAGE)
    assert answer.status in (400, 413) if asked.parser == "h11" else answer.status == 400
    if asked.parser == "httptools":
        asked.refused(400, "MALFORMED_REQUEST", answer)


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ("64 header of 10 MB", 431),
        ("64 header of 33 KB", 431),
        ("64 5,000 headers", 431),
        ("65 address of 20 KB", 414),
        ("65 address of 100 KB", 414),
        ("66 no version", 400),
        ("66 version 0.9", 400),
        ("66 version 2.0", 400),
        ("68 TLS", 400),
        ("68 garbage", 400),
        ("68 HTTP/2", 400),
    ],
)
def test_what_is_no_request(asked: Asked, row: str, status: int) -> None:
    """Told so, with a problem document, while the client still sends; there is no empty reply."""
    get = b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    raw = {
        "64 header of 10 MB": get + b"X: " + b"a" * 10_000_000 + b"\r\n\r\n",
        "64 header of 33 KB": get + b"X: " + b"a" * 33_000 + b"\r\n\r\n",
        "64 5,000 headers": get + b"X: y\r\n" * 5000 + b"\r\n",
        "65 address of 20 KB": get.replace(b"/ready", b"/" + b"a" * 20_000) + b"\r\n",
        "65 address of 100 KB": get.replace(b"/ready", b"/" + b"a" * 100_000) + b"\r\n",
        "66 no version": b"GET /ready\r\n\r\n",
        "66 version 0.9": b"GET /ready HTTP/0.9\r\nHost: x\r\n\r\n",
        "66 version 2.0": b"GET /ready HTTP/2.0\r\nHost: x\r\n\r\n",
        "68 TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
        "68 garbage": b"\x00\xff" * 500 + b"\r\n\r\n",
        "68 HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    }[row]
    if asked.parser == "httptools":
        asked.refused(status, OURS[status], asked.send(raw))
    elif not row.startswith(("64 header of 10 MB", "65 address of 100 KB")):  # stock uvicorn resets these
        # What h11 has no limit for is taken, or not found.
        assert asked.send(raw).status in (400, 200 if row.startswith("64") else 404)


@pytest.mark.parametrize("hosts", [b"", b"Host: x\r\nHost: x\r\n", b"Host: x\r\nhost: evil.example\r\n"])
def test_66_a_request_for_nobody_or_for_two(asked: Asked, hosts: bytes) -> None:
    """HTTP/1.1 says once for whom a request is."""
    answer = asked.send(b"GET /ready HTTP/1.1\r\nConnection: close\r\n" + hosts + b"\r\n")
    assert answer.status == 400
    if asked.parser == "httptools":
        asked.refused(400, "MALFORMED_REQUEST", answer)


def test_66_an_old_probe_names_no_host(asked: Asked) -> None:
    """HTTP/1.0 need not say for whom a request is."""
    assert asked.send(b"GET /ready HTTP/1.0\r\n\r\n").status == 200


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_67_a_request_for_another_server(parser: str) -> None:
    """Refused on every route but the two that probes ask, once the operator has said who we are."""
    with Asked(parser, allowed_hosts=("127.0.0.1", "*.pool.example")) as server:
        for route in routes():
            body = json.dumps(route.body).encode() if route.has_body else None
            answer = server.ask(route.method, route.at(), body, {"Host": "evil.example:8000"})
            if route.path in ("/health", "/ready"):
                assert answer.status == 200
            else:
                assert "evil" not in server.refused(400, "MALFORMED_REQUEST", answer)["detail"]
        assert server.ask("GET", "/agents", headers={"Host": "A.Pool.example:8000"}).status == 200
        assert server.stored() == server.before


@pytest.mark.parametrize(
    ("content_type", "encoding"),
    [
        (None, None),
        ("text/plain", None),
        ("text/json", None),
        ("application/x-www-form-urlencoded", None),
        ("multipart/form-data; boundary=x", None),
        ("application/xml", None),
        ("application/jsonp", None),
        ("application/json, text/plain", None),
        ("application/json\r\nContent-Type: text/plain", None),
        ("application/json; charset=utf-16", None),
        ("application/json; charset=latin-1", None),
        ("application/json", "gzip"),
        ("application/json", "br"),
        ("application/json", "identity, gzip"),
    ],
    ids=["69 none", "69 text", "69 text/json", "69 form", "69 multipart", "69 xml", "69 jsonp", "69 two",
         "69 twice", "70 utf-16", "70 latin-1", "71 gzip", "71 br", "71 list"],
)  # fmt: skip
def test_types(asked: Asked, content_type: str | None, encoding: str | None) -> None:
    """Only JSON in UTF-8, and as it is: no bomb is unpacked, no form of another site (101) is taken."""
    headers: dict[str, str | bytes] = {"Cookie": "session=1", "Origin": "https://beside.example"}
    headers["Sec-Fetch-Site"] = "same-site"  # of others it is refused before
    if content_type is not None:
        headers["Content-Type"] = content_type
    if encoding is not None:
        headers["Content-Encoding"] = encoding
    for route in routes():
        if route.has_body:
            answer = asked.ask(route.method, route.at(), MESSAGE, headers, is_json=False)
            asked.refused(415, "UNSUPPORTED_MEDIA_TYPE", answer)
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("coding", ["gzip, chunked"])
def test_71_a_body_in_another_coding(asked: Asked, coding: str) -> None:
    """Chunks of something that would have to be unpacked first."""
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(MESSAGE), MESSAGE)
    answer = asked.send(HEAD + f"Transfer-Encoding: {coding}\r\n\r\n".encode() + body)
    assert answer.status in (415, 400, 501)
    if asked.parser == "httptools":
        asked.refused(415, "UNSUPPORTED_MEDIA_TYPE", answer)


HEADS = ("/sessions/s", "/health", "/ready")


def test_72_other_methods(asked: Asked) -> None:
    """405 and what is allowed; a stream is not begun by HEAD."""
    allowed: dict[str, set[str]] = {}
    for route in routes():
        allowed.setdefault(route.at(), set()).add(route.method)
    for path, methods in allowed.items():
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"):
            if method in methods or (method == "HEAD" and path in HEADS):
                continue
            answer = asked.ask(method, path)
            assert answer.status == 405, (method, path)
            if method != "HEAD":
                assert answer.problem["code"] == "METHOD_NOT_ALLOWED"
            assert methods == set(answer.headers["allow"].split(", ")) - {"HEAD"}


def test_72_methods_that_are_none(asked: Asked) -> None:
    """httptools does not know them as methods, so there is no asking whether a path has them."""
    for method in ("BREW", "get", "G\u00cbT"):
        answer = asked.ask(method, "/chat", b"")
        assert answer.status in (400, 405)
        if asked.parser == "httptools":
            asked.refused(400, "MALFORMED_REQUEST", answer)


@pytest.mark.parametrize("name", ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"])
def test_73_a_method_in_a_header(asked: Asked, name: str) -> None:
    """It is not looked at."""
    assert asked.ask("GET", "/sessions/s", headers={name: "DELETE"}).status == 200
    answer = asked.ask("POST", "/sessions/s", b"{}", {name: "PATCH"})
    asked.refused(405, "METHOD_NOT_ALLOWED", answer)


@pytest.mark.parametrize(
    "name", ["X-Forwarded-Host", "X-Forwarded-Prefix", "X-Original-URL", "X-Rewrite-URL", "Forwarded"]
)
def test_73_a_path_in_a_header(asked: Asked, name: str) -> None:
    """Nor do links, or what is answered, come from headers that anybody may send."""
    answer = asked.ask("GET", "/users/u/sessions?limit=1", headers={name: "/evil.example"})
    assert answer.status == 200
    assert "evil" not in json.dumps(answer.headers)
    asked.refused(404, "NOT_FOUND", asked.ask("GET", "/nope", headers={name: "/ready"}))


@pytest.mark.parametrize("site", [{"Sec-Fetch-Site": "cross-site"}, {}], ids=["said", "not said"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
def test_101_changes_by_pages_of_other_sites(asked: Asked, origin: str, site: dict[str, str]) -> None:
    """A browser that says so, or whose page has another name, is refused whatever changes something.

    With a body and without.
    """
    headers: dict[str, str | bytes] = {"Origin": origin, **site}
    for route in routes():
        if route.method == "GET":
            assert asked.ask("GET", route.at(), headers=headers).status in (200, 404)
            continue
        for body in (None, b"", json.dumps(route.body or {}).encode()):
            asked.refused(403, "FORBIDDEN", asked.ask(route.method, route.at(), body, headers))


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_101_changes_by_pages_that_may(parser: str) -> None:
    """Pages of this server's own site, of the origins that the operator lists, and what is no browser."""
    listed: dict[str, str | bytes] = {"Origin": "https://page.example", "Sec-Fetch-Site": "cross-site"}
    for origins, headers in (
        (("https://page.example",), listed),
        (("*",), listed),
        ((), {"Origin": "http://x", "Sec-Fetch-Site": "same-origin"}),
        ((), {"Origin": "http://x:8000", "Host": "X:8000"}),
        (("https://page.example",), {"Origin": "https://page.example"}),
        ((), {}),
    ):
        with Asked(parser, cors_origins=origins) as server:
            assert server.ask("POST", "/sessions/s/refresh", b"", headers).status == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://page.example.evil.example"])
@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_100_pages_of_other_origins(parser: str, origin: str) -> None:
    """They may read nothing, with a list of origins and without."""
    for origins in ((), ("https://page.example",)):
        with Asked(parser, cors_origins=origins) as server:
            for method in ("GET", "OPTIONS"):
                headers: dict[str, str | bytes] = {"Origin": origin, "Access-Control-Request-Method": "GET"}
                answer = server.ask(method, "/sessions/s", headers=headers)
                assert "access-control-allow-origin" not in answer.headers
                assert "access-control-allow-credentials" not in answer.headers
