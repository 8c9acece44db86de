"""What every response says to browsers, and the pages that browsers are served."""

import hashlib
import re
from base64 import b64encode
from collections.abc import Iterator

import httpx2
import pytest

from app.api.safety import DEFAULTS
from tests.integration.bad_input.asking import PARSERS, routes
from tests.integration.test_http_server import HttpServer

ALWAYS = {name.decode(): value.decode() for name, value in DEFAULTS}
PAGES = ("/docs", "/redoc", "/api/docs")


@pytest.fixture(scope="module", params=PARSERS)
def client(request: pytest.FixtureRequest) -> Iterator[httpx2.Client]:
    with HttpServer(http=PARSERS[request.param]) as server:
        server.client.post("/chat", json={"session_id": "s", "message": "hello"})
        yield server.client


def directives(response: httpx2.Response) -> dict[str, list[str]]:
    parts = [part.split() for part in response.headers["content-security-policy"].split(";")]
    return {name: values for name, *values in parts}


def check_safe(response: httpx2.Response, *, cache: str = "no-store") -> None:
    """Every header once; ``cache`` is what this kind of answer says of caches."""
    for name, value in (ALWAYS | {"cache-control": cache}).items():
        assert response.headers.get_list(name) == [value], name


def test_every_route_answers_safely(client: httpx2.Client) -> None:
    """Good answers and refusals of each route in the schema."""
    for route in routes():
        response = client.request(route.method, route.at(), json=route.body)
        is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        check_safe(response, cache="no-cache" if is_stream else "no-store")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("PUT", "/chat", 405),
        ("HEAD", "/sessions/none", 404),
        ("GET", "/openapi.json", 200),
        ("GET", "/static-offline-docs/nope.js", 404),
        ("GET", "/a%2Fb", 404),
    ],
)
def test_so_does_everything_else(client: httpx2.Client, method: str, path: str, status: int) -> None:
    """Paths that are none, methods that are none, and what is in no schema."""
    response = client.request(method, path)
    assert response.status_code == status
    check_safe(response)


def test_files_of_the_documentation_may_be_kept(client: httpx2.Client) -> None:
    """They are large and no secret: a browser keeps them, and asks whether they are still the same."""
    first = client.get("/static-offline-docs/swagger-ui.css")
    check_safe(first, cache="no-cache")
    again = client.get(
        "/static-offline-docs/swagger-ui.css", headers={"If-None-Match": first.headers["etag"]}
    )
    assert again.status_code == 304
    check_safe(again, cache="no-cache")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_what_is_ours(client: httpx2.Client, page: str) -> None:
    """The bundled scripts and the very one in it; it is in no frame, and talks to nobody else."""
    response = client.get(page)
    policy = directives(response)
    assert policy["default-src"] == ["'none'"]
    assert policy["frame-ancestors"] == ["'none'"]
    assert policy["connect-src"] == ["'self'"]
    scripts = re.findall(r"<script>(.*?)</script>", response.text, re.DOTALL)
    hashes = [f"'sha256-{b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in scripts]
    assert policy["script-src"] == ["'self'", *hashes]
    assert "unsafe-eval" not in response.headers["content-security-policy"]
    assert not re.search(r"\son\w+=|javascript:", response.text)
    check_safe_page = ALWAYS | {"content-security-policy": response.headers["content-security-policy"]}
    for name, value in check_safe_page.items():
        assert response.headers.get_list(name) == [value]


def test_nothing_else_is_a_page(client: httpx2.Client) -> None:
    """What users wrote is JSON or events, whatever a browser asks for."""
    accept = {"Accept": "text/html"}
    text = "<script>alert(1)</script>"
    asked = client.post("/chat", json={"session_id": "html", "message": text}, headers=accept)
    history = client.get("/sessions/html/history", headers=accept)
    assert text in history.text
    for response in (asked, history, client.get("/sessions/<b>", headers=accept)):
        assert response.headers["content-type"] in ("application/json", "application/problem+json")
        assert directives(response) == {"default-src": ["'none'"], "frame-ancestors": ["'none'"]}
