"""What every request passes before FastAPI sees it, and every response on its way out.

Outwards: the headers of ``app.api.safety`` and a request id on every response, no exception that
reaches the server, and no answer to an admin's change before that is in the audit log.
Inwards: the alias prefix is taken off, the request is meant for this server and no change that a
page of another site wants, who asks is known (``Exchange.caller``), the path can name a resource,
the body is small enough and is JSON, parsed here once (``Exchange.body``). A request without a body
costs a few microseconds.
"""

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.audit import record_of
from app.api.auth import challenge, identify
from app.api.body import BodyHeaders, drain, read_body, replaying
from app.api.departure import ClientLeft
from app.api.errors import NotFound, PayloadTooLarge, problem_response, unexpected_response
from app.api.exchange import HOPS_KEY, SCOPE_KEY, Exchange
from app.api.hosts import Hosts
from app.api.options import ApiOptions
from app.api.origins import Origins
from app.api.quota import count_request, quota_headers
from app.api.safety import with_safety
from app.api.shedding import Places, Shedding
from app.api.strict_json import parse_json
from app.domain.errors import AgentPoolError, Unauthenticated
from app.domain.principal import NOBODY
from app.ports.identity import AuditLog, Authenticator
from app.services.overload import Gate
from app.services.quota import RequestQuota

CORS_METHODS: Final = ("GET", "HEAD", "POST", "PATCH", "DELETE")
CORS_ALLOWED: Final = (
    "Last-Event-ID",
    "Idempotency-Key",
    "If-Match",
    "Authorization",
    "X-API-Key",
    "Content-Type",
)
CORS_EXPOSED: Final = (
    "X-Request-ID",
    "X-Session-ID",
    "X-Turn-ID",
    "ETag",
    "Link",
    "Location",
    "Retry-After",
    "RateLimit-Limit",
    "RateLimit-Remaining",
    "RateLimit-Reset",
    "RateLimit-Policy",
)

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
# Whatever a path may be refused for has one of these in it.
_SUSPECT_PATH = re.compile(rb"%|/\.|[\x00-\x20\x7f-\xff]")
_PATH_SAFE = "/%:@!$&'()*+,;=~"


class Guard:
    """Pure ASGI middleware. Everything but HTTP requests passes untouched.

    Without an ``authenticator`` nobody is asked for a credential; without a ``gate`` nobody is
    refused because of an overload, and without a ``quota`` nobody because of requests before.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ApiOptions,
        audit: AuditLog | None = None,
        authenticator: Authenticator | None = None,
        gate: Gate | None = None,
        quota: RequestQuota | None = None,
    ) -> None:
        self._app = app
        self._admitted = app if gate is None else Places(app, gate)
        self._audit = audit
        self._authenticator = authenticator
        self._quota = quota
        self._limit = options.max_body_bytes
        self._hosts = Hosts(options.allowed_hosts)
        self._origins = Origins(options.cors_origins)
        self._prefixes = options.alias_prefixes
        # CORS stands outside of the checks: a browser may read the refusals too.
        admit = self._admit if gate is None else Shedding(self._admit, gate)
        self._inner: ASGIApp = _with_cors(admit, options.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _open_exchange(scope)
        if self._authenticator is not None:
            exchange.caller = NOBODY  # until it is known
        self._take_prefix(scope)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.is_answered = True
                self._tell_audit(exchange, message["status"])
                headers = [*message.get("headers", ()), *exchange.response_headers()]
                if exchange.quotas:
                    headers += quota_headers(exchange.quotas)
                message["headers"] = with_safety(headers)
            await send(message)

        try:
            await self._inner(scope, receive, send_named)
        finally:
            self._tell_audit(exchange, None)

    def _tell_audit(self, exchange: Exchange, status: int | None) -> None:
        if exchange.deed is not None and self._audit is not None:
            self._audit.write(record_of(exchange, exchange.deed, status))
            exchange.deed = None

    def _take_prefix(self, scope: Scope) -> None:
        """Make the alias part of the root path, so that links keep it."""
        root: str = scope.get("root_path", "")
        path: str = scope["path"]
        route_path = path[len(root) :] if path.startswith(root + "/") else path
        for prefix in self._prefixes:
            if route_path.startswith(prefix) and route_path[len(prefix) :][:1] in ("", "/"):
                scope["root_path"] = root + prefix
                scope["path"] = root + route_path  # a proxy in front may have taken the root path off
                return

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope[SCOPE_KEY]
        try:
            receive = await self._check(scope, receive, exchange)
        except PayloadTooLarge as error:
            await _refuse_and_close(error, scope, receive, send)
        except Unauthenticated as error:
            await problem_response(error, exchange, challenge(scope))(scope, receive, send)
        except AgentPoolError as error:
            await problem_response(error, exchange)(scope, receive, send)
        except ClientLeft:
            pass
        else:
            await self._pass_on(scope, receive, send)

    async def _check(self, scope: Scope, receive: Receive, exchange: Exchange) -> Receive:
        if HOPS_KEY not in scope:  # a node asks by another name, and has checked what it was asked by
            self._hosts.check(scope, scope["path"].removeprefix(scope.get("root_path", "")))
            self._origins.check(scope)
        if self._authenticator is not None:
            exchange.caller = identify(self._authenticator, scope)
            if self._quota is not None:
                await count_request(self._quota, scope, exchange)
        if not _is_addressable(_raw_path(scope)):
            raise NotFound()
        headers = BodyHeaders(scope["headers"])
        if not headers.may_have_body(scope["method"]):
            return receive
        body = await read_body(receive, headers.length, self._limit)
        if body:
            headers.check_json()
            exchange.body = parse_json(body)
        return replaying(body, receive)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope[SCOPE_KEY]
        try:
            await self._admitted(scope, receive, send)
        except Exception as error:
            response = unexpected_response(error, exchange)
            if exchange.is_answered:  # too late for a problem document: let the server hang up
                raise
            await response(scope, receive, send)


def _with_cors(app: ASGIApp, origins: Iterable[str]) -> ASGIApp:
    if not (allowed := tuple(origins)):
        return app
    return CORSMiddleware(
        app,
        allow_origins=allowed,
        allow_methods=CORS_METHODS,
        allow_headers=CORS_ALLOWED,
        expose_headers=CORS_EXPOSED,
    )


def _open_exchange(scope: Scope) -> Exchange:
    exchange = Exchange(path=quote_from_bytes(_raw_path(scope), _PATH_SAFE))
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            if _REQUEST_ID.fullmatch(value):
                exchange.request_id = value.decode("ascii")
            break
    scope[SCOPE_KEY] = exchange
    return exchange


def _raw_path(scope: Scope) -> bytes:
    raw: bytes | None = scope.get("raw_path")
    return scope["path"].encode("utf-8", "surrogatepass") if raw is None else raw.partition(b"?")[0]


def _is_addressable(raw_path: bytes) -> bool:
    """Whether the path means the same to everyone who decodes it, and can name something."""
    if not _SUSPECT_PATH.search(raw_path):
        return True
    if re.search(rb"[\x00-\x20\x7f]|%2f|%00", raw_path, re.IGNORECASE):
        return False
    try:
        path = unquote_to_bytes(raw_path).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return not any(segment in (".", "..") for segment in path.split("/"))


async def _refuse_and_close(error: PayloadTooLarge, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer while the client still sends; then swallow a little, and close the connection."""
    is_http_1 = scope.get("http_version", "1.1").startswith("1")
    response = problem_response(error, scope[SCOPE_KEY], {"Connection": "close"} if is_http_1 else None)
    await send(
        {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    )
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    if not BodyHeaders(scope["headers"]).expects_continue:
        await drain(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})
