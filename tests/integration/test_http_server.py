"""The real server, as the other tests of the HTTP face use it; and what holds for all routes."""

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Self

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from app.api.native import branches, checkpoints, pool, requests, state
from app.config import Settings
from app.main import create_app
from app.runtime import Runtime

Json = dict[str, Any]


class HttpServer:
    """The application behind uvicorn, in a thread, on a free port. ``settings`` as environment names.

    ``http`` is what uvicorn is to parse with. Nothing is refused because the machine is slow.
    """

    def __init__(self, app: ASGIApp | None = None, *, http: Any = "auto", **settings: Any) -> None:
        self.app = app or create_app(
            Settings(**{"store_url": "memory://", "model_provider": "demo", "overload_lag_ms": 0, **settings})
        )
        config = uvicorn.Config(
            self.app,
            http=http,
            port=0,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._ready = threading.Event()

    def __enter__(self) -> Self:
        startup = self._server.startup

        async def startup_and_tell(*args: Any, **options: Any) -> None:
            await startup(*args, **options)
            self.loop = asyncio.get_running_loop()
            self._ready.set()

        self._server.startup = startup_and_tell  # type: ignore[method-assign]
        self._thread.start()
        assert self._ready.wait(10)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # Shorter than the server's 5 s: a connection that both give up at once looks like a failure.
        limits = httpx2.Limits(keepalive_expiry=2.0)
        self.client = httpx2.Client(base_url=self.url, timeout=10, limits=limits)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


def serving(runtime: Runtime, path: str = "/") -> FastAPI:
    """Return an application that opens ``runtime`` and serves it below ``path``."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with runtime:
            yield

    outer = FastAPI(lifespan=lifespan, openapi_url=None)

    @outer.get("/own/")
    async def own() -> str:
        return "mine"

    outer.mount(path, create_app(runtime=runtime))
    return outer


def problem(response: httpx2.Response, status: int, code: str) -> Json:
    """Return the problem document, having checked that it is that one, and complete."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    document: Json = response.json()
    assert document["code"] == code
    assert document["status"] == status
    assert document["type"] == "/problems/" + code.lower().replace("_", "-")
    assert document["request_id"] == response.headers["x-request-id"]
    assert document["title"]
    assert document["detail"]
    assert document["instance"]
    if status in (429, 503):
        assert int(response.headers["retry-after"]) == document["retry_after_s"] >= 1
    return document


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with HttpServer(cors_origins=("https://page.example",)) as running:
        yield running


@pytest.fixture
def client(server: HttpServer) -> httpx2.Client:
    return server.client


def test_health_says_alive(client: httpx2.Client) -> None:
    """Liveness as the document shows it, with what an operator wants beside."""
    answer = client.get("/health?probe=1").json()
    assert answer["status"] == "healthy"
    assert answer["agent_initialized"] is True
    assert set(answer) == {"status", "agent_initialized", "session_count", "live_agents", "version"}


def test_ready_says_ready(client: httpx2.Client) -> None:
    """Readiness is a 200 while turns are welcome."""
    assert client.get("/ready").json() == {"status": "ready"}


def test_health_counts_sessions(client: httpx2.Client) -> None:
    """``session_count`` grows with a new session."""
    before = client.get("/health").json()["session_count"]
    client.post("/sessions", json={})
    assert client.get("/health").json()["session_count"] == before + 1


@pytest.mark.parametrize(
    "path", ["/nope", "/sessions/", "/chat/", "//sessions", "/Sessions", "/", "/api", "/api/nope"]
)
def test_unknown_paths_are_not_found(client: httpx2.Client, path: str) -> None:
    """No redirect to a path with or without a slash, no guess about case."""
    problem(client.get(path), 404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/chat", "POST"),
        ("HEAD", "/chat/stream", "POST"),
        ("PUT", "/sessions/a", "DELETE, GET, HEAD, PATCH"),
        ("DELETE", "/sessions", "GET, POST"),
        ("POST", "/api/sessions/a", "DELETE, GET, HEAD, PATCH"),
        ("OPTIONS", "/agent-stats", "GET"),
        ("POST", "/sessions/a/turns/active", "GET"),
        ("POST", "/docs", "GET, HEAD"),
        ("PROPFIND", "/health", "GET, HEAD"),
    ],
)
def test_other_methods_are_told_what_is_allowed(
    server: HttpServer, method: str, path: str, allowed: str
) -> None:
    """405 with every method of that path."""
    response = server.client.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allowed


def test_the_schema_has_the_canonical_paths_only(client: httpx2.Client) -> None:
    """Aliases work but are not shown; every operation is described and documents its errors."""
    schema = client.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.1")
    assert not [path for path in schema["paths"] if path.startswith(("/api", "/agent_backend", "/static"))]
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            assert operation["summary"], (method, path)
            assert operation["description"], (method, path)
            assert operation["tags"], (method, path)
            assert "500" in operation["responses"], (method, path)
    assert "HTTPValidationError" not in schema["components"]["schemas"]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/sessions", "get post"),
        ("/sessions/stats", "get"),
        ("/sessions/batch", "post"),
        ("/sessions/batch-delete", "post"),
        ("/sessions/resume", "post"),
        ("/sessions/{session_id}", "delete get patch"),
        ("/sessions/{session_id}/refresh", "post"),
        ("/sessions/{session_id}/history", "get"),
        ("/sessions/{session_id}/events", "get"),
        ("/sessions/{session_id}/turns", "get"),
        ("/sessions/{session_id}/turns/{turn_id}", "get"),
        ("/sessions/{session_id}/state", "get patch"),
        ("/sessions/{session_id}/checkpoints", "delete get post"),
        ("/sessions/{session_id}/checkpoints/latest", "get"),
        ("/sessions/{session_id}/checkpoints/{checkpoint_id}", "delete get"),
        ("/sessions/{session_id}/checkpoints/{checkpoint_id}/restore", "post"),
        ("/sessions/{session_id}/rewind", "post"),
        ("/sessions/{session_id}/fork", "post"),
        ("/sessions/{session_id}/regenerate", "post"),
        ("/sessions/{session_id}/compact", "post"),
        ("/users/{user_id}/sessions", "delete get"),
        ("/users/{user_id}/usage", "get"),
        ("/users/{user_id}/state", "get patch"),
        ("/agents/{agent_id}/sessions", "delete"),
        ("/apps/{app_name}/state", "get patch"),
        ("/agents", "get"),
        ("/models", "get"),
    ],
)
def test_the_schema_has_what_is_promised(client: httpx2.Client, path: str, methods: str) -> None:
    """Sessions, their state and their branches: every route, and every one of its methods."""
    assert sorted(client.get("/openapi.json").json()["paths"][path]) == methods.split()


def test_every_field_is_described(client: httpx2.Client) -> None:
    """Each member of each body and answer, and each parameter, says what it is."""
    schema = client.get("/openapi.json").json()
    bare = [
        (name, member)
        for name, component in schema["components"]["schemas"].items()
        for member, field in component.get("properties", {}).items()
        if not field.get("description")
    ]
    bare += [
        (path, parameter["name"])
        for path, item in schema["paths"].items()
        for operation in item.values()
        for parameter in operation.get("parameters", ())
        if not parameter.get("description")
    ]
    assert bare == []


def test_every_reference_in_the_schema_leads_somewhere(client: httpx2.Client) -> None:
    """No ``$ref`` points to a component that is not there, and no component is unused."""
    schema = client.get("/openapi.json").json()
    referenced = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(schema)))
    assert referenced == set(schema["components"]["schemas"])


def test_every_body_has_an_example_that_fits(client: httpx2.Client) -> None:
    """Each example of the documentation is accepted by the route that shows it."""
    bodies = {
        name: kind
        for module in (branches, checkpoints, pool, requests, state)
        for name, kind in vars(module).items()
    }
    schema = client.get("/openapi.json").json()
    seen = 0
    for item in schema["paths"].values():
        for operation in item.values():
            for media in operation.get("requestBody", {}).get("content", {}).values():
                names = re.findall(r"#/components/schemas/(\w+)", json.dumps(media["schema"]))
                for example in media["examples"].values():
                    bodies[names[0]].model_validate(example["value"])
                    seen += 1
    assert seen >= 25


@pytest.mark.parametrize("prefix", ["", "/api"])
@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_documentation_works_offline(client: httpx2.Client, prefix: str, page: str) -> None:
    """Everything that the pages load comes from this server, and is there."""
    html = client.get(prefix + page).text
    sources = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert len(sources) >= 2
    for source in sources:
        assert source.startswith(prefix + "/static-offline-docs/")
        assert client.get(source).status_code == 200
    assert f"{prefix}/openapi.json" in html


def test_cors_as_configured(client: httpx2.Client) -> None:
    """The configured origin may read every answer; no other may."""
    headers = {"Origin": "https://page.example"}
    assert (
        client.get("/health", headers=headers).headers["access-control-allow-origin"]
        == "https://page.example"
    )
    assert (
        client.get("/nope", headers=headers).headers["access-control-allow-origin"] == "https://page.example"
    )
    other = client.get("/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_the_callers_request_id_comes_back(client: httpx2.Client) -> None:
    """On good answers and on errors."""
    for path, status in (("/health", 200), ("/nope", 404)):
        response = client.get(path, headers={"X-Request-ID": "trace-1"})
        assert response.status_code == status
        assert response.headers["x-request-id"] == "trace-1"


def test_mounted_into_another_application() -> None:
    """Links keep the mount and the alias; the other application's own routes are not touched."""
    runtime = Runtime(Settings(store_url="memory://", model_provider="demo"))
    with HttpServer(serving(runtime, "/pool")) as server:
        client = server.client
        assert client.get("/own", follow_redirects=True).json() == "mine"
        assert "x-request-id" not in client.get("/nope").headers
        created = client.post("/pool/api/sessions", json={"user_id": "alice"})
        assert created.headers["location"] == f"/pool/api/sessions/{created.json()['session_id']}"
        assert client.get(created.headers["location"]).status_code == 200
        client.post("/pool/sessions", json={"user_id": "alice"})
        listed = client.get("/pool/users/alice/sessions?limit=1")
        link = re.fullmatch(r'<(/pool/users/alice/sessions\?[^>]+)>; rel="next"', listed.headers["link"])
        assert link
        assert len(client.get(link[1]).json()) == 1
        assert problem(client.get("/pool/api/sessions/none"), 404, "SESSION_NOT_FOUND")["instance"] == (
            "/pool/api/sessions/none"
        )
        assert client.post("/pool/chat", json={"message": "你好"}).status_code == 200
        assert "/pool/static-offline-docs/" in client.get("/pool/docs").text
        assert client.get("/pool/openapi.json").json()["servers"] == [{"url": "/pool"}]
