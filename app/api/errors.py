"""The one table from an error's code to HTTP, and the problem documents (RFC 9457).

A problem document never repeats what the client sent, save the path and the names of
fields, and never shows the inside of the machine.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app.api.departure import ClientLeft
from app.api.exchange import Exchange, exchange_of
from app.api.field_path import field_path
from app.domain.errors import AgentPoolError, InternalError, RateLimited
from app.domain.turn import TurnError

PROBLEM_JSON = "application/problem+json"
DEFAULT_RETRY_AFTER_S = 1
MAX_FIELD_ERRORS = 50
CLIENT_CLOSED_REQUEST = 499  # nobody reads it but the access log; nginx's number for it

_log = logging.getLogger(__name__)

TABLE: dict[str, tuple[int, str]] = {
    "VALIDATION_ERROR": (422, "The request does not fit"),
    "MALFORMED_JSON": (400, "The body is not acceptable JSON"),
    "MALFORMED_REQUEST": (400, "The request is not acceptable HTTP"),
    "REQUEST_TIMEOUT": (408, "The request did not arrive in time"),
    "URI_TOO_LONG": (414, "The address is too long"),
    "HEAD_TOO_LARGE": (431, "The request's header is too large"),
    "UNSUPPORTED_MEDIA_TYPE": (415, "The body must be JSON"),
    "PAYLOAD_TOO_LARGE": (413, "The body is too large"),
    "UNAUTHENTICATED": (401, "A valid credential is needed"),
    "FORBIDDEN": (403, "Not allowed"),
    "NOT_FOUND": (404, "No such resource"),
    "SESSION_NOT_FOUND": (404, "No such session"),
    "TURN_NOT_FOUND": (404, "No such turn"),
    "CHECKPOINT_NOT_FOUND": (404, "No such checkpoint"),
    "AGENT_NOT_FOUND": (404, "No such agent"),
    "METHOD_NOT_ALLOWED": (405, "Method not allowed"),
    "SESSION_EXISTS": (409, "The session exists already"),
    "SESSION_BUSY": (409, "A turn is running"),
    "TURN_QUEUE_FULL": (429, "Too many turns are waiting"),
    "HEAD_MOVED": (409, "The session has moved on"),
    "PRECONDITION_FAILED": (412, "The session has changed"),
    "NO_ACTIVE_TURN": (409, "No turn is running"),
    "IDEMPOTENCY_MISMATCH": (422, "The key belongs to another request"),
    "SESSION_ARCHIVED": (409, "The session is archived"),
    "SESSION_EXPIRED": (410, "The session has expired"),
    "SESSION_LIMIT": (429, "Too many sessions"),
    "RATE_LIMITED": (429, "Too many requests"),
    "POOL_EXHAUSTED": (503, "Every agent is busy"),
    "OVERLOADED": (503, "The server is overloaded"),
    "DRAINING": (503, "The server is shutting down"),
    "UNKNOWN_MODEL": (422, "The model is not offered"),
    "MODEL_UNAVAILABLE": (503, "The model does not answer"),
    "MODEL_RATE_LIMITED": (429, "The model's provider limits requests"),
    "MODEL_ERROR": (502, "The model failed"),
    "TURN_TIMEOUT": (504, "The turn took too long"),
    "TURN_CANCELLED": (409, "The turn was cancelled"),
    "INTERRUPTED": (503, "The turn was interrupted"),
    "SNAPSHOT_UNREADABLE": (500, "The stored session cannot be read"),
    "STORE_UNAVAILABLE": (503, "The store does not answer"),
    "NODE_UNREACHABLE": (503, "Another node does not answer"),
    "INTERNAL_ERROR": (500, "Something went wrong"),
}
_CODE_OF_STATUS = {
    401: "UNAUTHENTICATED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    413: "PAYLOAD_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
}
_PLAIN_WORDS = {"extra_forbidden": "is not known here", "missing": "is required"}


class NotFound(AgentPoolError):
    """There is nothing at this path."""

    code = "NOT_FOUND"


class MethodNotAllowed(AgentPoolError):
    """This path does not answer to this method."""

    code = "METHOD_NOT_ALLOWED"


class MalformedJson(AgentPoolError):
    """The body is not valid JSON."""

    code = "MALFORMED_JSON"


class MalformedRequest(AgentPoolError):
    """The request is not valid HTTP/1.1."""

    code = "MALFORMED_REQUEST"


class RequestTimeout(AgentPoolError):
    """The rest of the request did not come in time."""

    code = "REQUEST_TIMEOUT"


class UriTooLong(AgentPoolError):
    """The address of the request is longer than this server accepts."""

    code = "URI_TOO_LONG"


class HeadTooLarge(AgentPoolError):
    """The request has more header fields, or larger ones, than this server accepts."""

    code = "HEAD_TOO_LARGE"


class UnsupportedMediaType(AgentPoolError):
    """The body must be UTF-8 JSON, sent as application/json and not compressed."""

    code = "UNSUPPORTED_MEDIA_TYPE"


class PayloadTooLarge(AgentPoolError):
    """The body is larger than this server accepts."""

    code = "PAYLOAD_TOO_LARGE"


class InvalidFields(AgentPoolError):
    """Some parts of the request do not fit."""

    code = "VALIDATION_ERROR"

    def __init__(self, errors: Sequence[tuple[str, str]]) -> None:
        field, message = errors[0]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        super().__init__(f"{field}: {message}{more}")
        self.errors = errors

    @property
    def extra(self) -> dict[str, Any]:
        shown = self.errors[:MAX_FIELD_ERRORS]
        return {"errors": [{"field": field, "message": message} for field, message in shown]}


def problem_type(code: str) -> str:
    """Return the URI that names a kind of problem."""
    return "/problems/" + code.lower().replace("_", "-")


def failure_members(error: AgentPoolError | TurnError, *, status: int | None = None) -> dict[str, Any]:
    """Return those members of the problem document for ``error`` that are the same for all requests.

    ``error`` may be one that was just raised or one that is stored with a turn.
    ``status`` is for the route where the code's usual one would be wrong.
    """
    usual, title = TABLE.get(error.code) or TABLE["INTERNAL_ERROR"]
    status = usual if status is None else status
    members: dict[str, Any] = {
        "type": problem_type(error.code),
        "title": title,
        "status": status,
        "detail": error.detail,
        "code": error.code,
    }
    if isinstance(error, AgentPoolError):
        members |= error.extra
    elif error.outcome_unknown:
        members["outcome"] = "unknown"
    if error.retry_after_s is not None or status in (429, 503):
        members["retry_after_s"] = max(1, math.ceil(error.retry_after_s or DEFAULT_RETRY_AFTER_S))
    return members


def problem_members(
    error: AgentPoolError | TurnError, exchange: Exchange, *, status: int | None = None
) -> dict[str, Any]:
    """Return the members of the problem document for ``error`` as an answer to ``exchange``."""
    members = failure_members(error, status=status)
    members |= {"instance": exchange.path, "request_id": exchange.request_id}
    session_id, turn_id = exchange.session_id, exchange.turn_id
    if isinstance(error, AgentPoolError):
        session_id = error.session_id or session_id
        turn_id = error.turn_id or turn_id
    return members | {k: v for k, v in (("session_id", session_id), ("turn_id", turn_id)) if v is not None}


def problem_response(
    error: AgentPoolError | TurnError,
    exchange: Exchange,
    headers: dict[str, str] | None = None,
    *,
    status: int | None = None,
) -> Response:
    """Return ``error`` as an HTTP answer, with ``Retry-After`` where it belongs."""
    members = problem_members(error, exchange, status=status)
    exchange.code = error.code
    if isinstance(error, RateLimited):
        exchange.quotas.append(error.quota)
    sent = {"Cache-Control": "no-store", **(headers or {})}
    if "retry_after_s" in members:
        sent["Retry-After"] = str(members["retry_after_s"])
    if members["status"] == 401:
        sent.setdefault("WWW-Authenticate", "Bearer")
    return Response(orjson.dumps(members), members["status"], sent, PROBLEM_JSON)


def unexpected_response(error: Exception, exchange: Exchange) -> Response:
    """Log an error that nobody foresaw and return the answer that tells nothing about it."""
    _log.error("request %s failed", exchange.request_id, exc_info=error)
    return problem_response(InternalError(), exchange)


def install_errors(app: FastAPI) -> None:
    """Let ``app`` answer every error with a problem document."""
    app.add_exception_handler(AgentPoolError, _on_domain_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientLeft, _on_departure)


async def _on_domain_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AgentPoolError)
    exchange = exchange_of(request.scope)
    if (TABLE.get(error.code) or TABLE["INTERNAL_ERROR"])[0] == 500:
        _log.error("request %s: %s", exchange.request_id, error.code, exc_info=error)
    return problem_response(error, exchange)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem_response(invalid_fields(error.errors()), exchange_of(request.scope))


def invalid_fields(errors: Iterable[Mapping[str, Any]]) -> InvalidFields:
    """Return what pydantic found wrong, as the error that is answered; its ``loc`` begins with the whole."""
    return InvalidFields(list(dict.fromkeys(_field_error(entry) for entry in errors)))


def _field_error(entry: Mapping[str, Any]) -> tuple[str, str]:
    where, *path = entry["loc"]
    message = _PLAIN_WORDS.get(entry["type"]) or str(entry["msg"]).removeprefix("Value error, ")
    return field_path(path, whole=str(where)), message[:1].lower() + message[1:]


async def _on_departure(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    exchange = exchange_of(request.scope)
    if error.status_code == 405:
        allowed = request.app.state.allowed_methods(request.scope)
        return problem_response(MethodNotAllowed(), exchange, {"Allow": allowed})
    code = _CODE_OF_STATUS.get(error.status_code) or (
        "VALIDATION_ERROR" if error.status_code < 500 else "INTERNAL_ERROR"
    )
    return problem_response(TurnError(code, TABLE[code][1] + "."), exchange)
