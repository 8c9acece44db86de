"""The OpenAPI schema, and pages that show it without fetching anything from elsewhere."""

import re
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from app.api.errors import PROBLEM_JSON, TABLE, problem_type
from app.api.options import AuthMode

STATIC_PATH = "/static-offline-docs"
OPEN_PATHS = frozenset({"/health", "/ready", "/docs", "/redoc", "/openapi.json"})
"""What is there for everybody, beside the files below ``STATIC_PATH``."""
EVERYWHERE = (
    *("MALFORMED_REQUEST", "NOT_FOUND", "METHOD_NOT_ALLOWED", "VALIDATION_ERROR"),
    *("RATE_LIMITED", "OVERLOADED", "INTERNAL_ERROR"),
)
WITH_BODY = ("MALFORMED_JSON", "PAYLOAD_TOO_LARGE", "UNSUPPORTED_MEDIA_TYPE")
_STATIC_DIR = Path(fastapi_offline.__file__).parent / "static"
_INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
# Both bundles make style elements of their own, and have images in them. ReDoc's search is a worker that it
# makes from a string. Its logo, which it would fetch from elsewhere, is not shown.
_POLICY = (
    "default-src 'none'; script-src 'self'{hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class FieldProblem(BaseModel):
    """One part of the request that does not fit."""

    field: str = Field(description="Its name, dotted where it is nested.", examples=["params.temperature"])
    message: str = Field(description="What is wrong with it.", examples=["is required"])


class Problem(BaseModel):
    """What every error looks like (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="Names the kind of problem.", examples=["/problems/session-not-found"])
    title: str = Field(description="The kind of problem in words.", examples=["No such session"])
    status: int = Field(description="The HTTP status.", examples=[404])
    detail: str = Field(description="What happened this time.", examples=["There is no such session."])
    instance: str = Field(description="The path of the request.", examples=["/sessions/user_001"])
    code: str = Field(description="Names the kind of problem, for programs.", examples=["SESSION_NOT_FOUND"])
    request_id: str = Field(description="The response's X-Request-ID.", examples=["5b0c…"])
    session_id: str | None = Field(default=None, description="The session concerned.")
    turn_id: str | None = Field(default=None, description="The turn concerned.")
    errors: list[FieldProblem] | None = Field(default=None, description="Every part that does not fit.")
    retry_after_s: int | None = Field(default=None, description="As the Retry-After header.")


def problems(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Return the ``responses=`` of a route that answers with these codes, beside those that all share."""
    by_status: dict[int, list[str]] = {}
    for code in dict.fromkeys((*codes, *EVERYWHERE)):
        by_status.setdefault(TABLE[code][0], []).append(code)
    return {status: _documented(status, by_status[status]) for status in sorted(by_status)}


def _documented(status: int, codes: Sequence[str]) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": " · ".join(f"`{code}`: {TABLE[code][1]}" for code in codes),
        "content": {
            PROBLEM_JSON: {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "examples": {code: {"value": _example(code)} for code in codes},
            }
        },
    }
    if status in (429, 503):
        answer["headers"] = {
            "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}
        }
    return answer


def _example(code: str) -> dict[str, Any]:
    status, title = TABLE[code]
    example = {"type": problem_type(code), "title": title, "status": status, "detail": title + "."}
    return {**example, "instance": "/…", "code": code, "request_id": "5b0c…"}


def install_docs(app: FastAPI, auth_mode: AuthMode = "none") -> None:
    """Serve /docs and /redoc from bundled files, and complete the schema.

    ``app`` must have been made without FastAPI's own pages, which need a CDN.
    """
    app.mount(STATIC_PATH, _Bundle(directory=_STATIC_DIR), name="static-offline-docs")
    app.add_api_route("/docs", _swagger_page, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/redoc", _redoc_page, methods=["GET", "HEAD"], include_in_schema=False)
    make_schema = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(make_schema())
            if auth_mode != "none":
                _secure(app.openapi_schema, auth_mode)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _completed(schema: dict[str, Any]) -> dict[str, Any]:
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    components.update(problem.pop("$defs"))
    components["Problem"] = problem
    return schema


class _Bundle(StaticFiles):
    """Large files that are no secret: kept by browsers, which ask whether they are still the same."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _only_ours(page: HTMLResponse) -> HTMLResponse:
    """Let ``page`` run its own scripts and the bundled ones, and talk to this server; nothing else."""
    scripts = _INLINE_SCRIPT.findall(bytes(page.body).decode())
    hashes = [f" 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts]
    page.headers["Content-Security-Policy"] = _POLICY.format(hashes="".join(hashes))
    return page


def _secure(schema: dict[str, Any], auth_mode: AuthMode) -> None:
    """Say which credential every operation needs, and what is answered without."""
    schemes: dict[str, dict[str, str]] = {"bearer": {"type": "http", "scheme": "bearer"}}
    if auth_mode == "jwt":
        schemes["bearer"]["bearerFormat"] = "JWT"
    else:
        schemes["api_key"] = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    schema["components"]["securitySchemes"] = schemes
    for path, operations in schema["paths"].items():
        if path in OPEN_PATHS:
            continue
        for operation in operations.values():
            operation["security"] = [{name: []} for name in schemes]
            refusals = {"401": _documented(401, ["UNAUTHENTICATED"]), "403": _documented(403, ["FORBIDDEN"])}
            refusals["401"]["headers"] = {
                "WWW-Authenticate": {"description": "What is wanted.", "schema": {"type": "string"}}
            }
            operation["responses"] = dict(sorted((operation["responses"] | refusals).items()))


async def _swagger_page(request: Request) -> HTMLResponse:
    root = request.scope.get("root_path", "").rstrip("/")
    page = get_swagger_ui_html(
        openapi_url=f"{root}{request.app.openapi_url}",
        title=request.app.title,
        swagger_js_url=f"{root}{STATIC_PATH}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{STATIC_PATH}/swagger-ui.css",
        swagger_favicon_url=f"{root}{STATIC_PATH}/favicon.png",
    )
    return _only_ours(page)


async def _redoc_page(request: Request) -> HTMLResponse:
    root = request.scope.get("root_path", "").rstrip("/")
    page = get_redoc_html(
        openapi_url=f"{root}{request.app.openapi_url}",
        title=request.app.title,
        redoc_js_url=f"{root}{STATIC_PATH}/redoc.standalone.js",
        redoc_favicon_url=f"{root}{STATIC_PATH}/favicon.png",
        with_google_fonts=False,
    )
    return _only_ours(page)
