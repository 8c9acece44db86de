"""The guard and who asks: set before anything else, refused alike, noted if an admin changes something."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from app.api.exchange import HOPS_KEY, Deed, exchange_of
from app.api.guard import Guard
from app.api.options import ApiOptions
from app.domain.audit import AuditRecord
from app.domain.errors import StoreUnavailable, Unauthenticated
from app.domain.principal import ANYONE, NOBODY, NODE, Principal, principal_of
from tests.unit.api.wire import Wire, http_scope, part

ROOT = principal_of("root", is_admin=True, credential="key:1")


class OneKey:
    """An authenticator that knows ``Bearer right``."""

    def __init__(self) -> None:
        self.asked = 0

    def authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> Principal:
        self.asked += 1
        if (b"authorization", b"Bearer right") not in headers:
            raise Unauthenticated
        return ROOT


class Lines:
    """An audit log that keeps what it is told, and how much of the answer had been sent then."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.told: list[tuple[AuditRecord, int]] = []

    def require(self) -> None: ...

    def write(self, record: AuditRecord) -> None:
        self.told.append((record, len(self._wire.sent)))


class Inner:
    """The application behind the guard: notes who asks, may do an admin's deed, and answers or fails."""

    def __init__(self, deed: Deed | None = None, error: BaseException | None = None) -> None:
        self.caller: Principal | None = None
        self._deed = deed
        self._error = error

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        exchange = exchange_of(scope)
        self.caller = exchange.caller
        exchange.deed = self._deed
        if self._error is not None:
            raise self._error
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


async def run(
    scope: Any, *events: Any, inner: Inner | None = None, asks: bool = True
) -> tuple[Wire, Inner, Lines]:
    inner, wire = inner or Inner(), Wire(*events)
    lines = Lines(wire)
    guard = Guard(inner, ApiOptions(), lines, OneKey() if asks else None)
    await guard(scope, wire.receive, wire.send)
    return wire, inner, lines


async def test_the_caller_is_known_behind_the_guard() -> None:
    """Whoever the credential stands for; anyone where none is asked for."""
    right = {"authorization": "Bearer right"}
    assert (await run(http_scope(headers=right)))[1].caller == ROOT
    assert (await run(http_scope(), asks=False))[1].caller == ANYONE
    assert (await run(http_scope(headers=right), asks=False))[1].caller == ANYONE


async def test_who_has_none_gets_no_further() -> None:
    """Not a byte of the body is read, and the path is not looked at."""
    for path in ("/chat", "/nothing", "/a%2Fb", "/%00", "/healthz", "/node/turns"):
        wire, inner, _ = await run(http_scope("POST", path, {"content-length": "9"}), part(b"x"))
        assert (wire.status, inner.caller, wire.received) == (401, None, 0)


@pytest.mark.parametrize("path", ["/health", "/ready", "/docs", "/redoc", "/openapi.json", "/api/health"])
async def test_open_paths_are_nobodys(path: str) -> None:
    """There is no caller there, and not an admin; a credential is not looked at."""
    for headers in ({}, {"authorization": "Bearer right"}, {"authorization": "\xff"}):
        _, inner, _ = await run(http_scope(path=path, headers=headers))
        assert inner.caller == NOBODY
        assert not inner.caller.is_admin


async def test_nodes_ask_for_themselves_and_pass_on_for_others() -> None:
    """What a node asks of its own accord needs no credential; what it forwards does, also there."""
    own, forwarded = {HOPS_KEY: 0}, {HOPS_KEY: 1}
    for path in ("/node/turns", "/agent-stats"):
        assert (await run(http_scope(path=path, **own)))[1].caller == NODE
        assert (await run(http_scope(path=path, **forwarded)))[0].status == 401
    for path in ("/sessions", "/agent-sessions", "/chat"):
        assert (await run(http_scope(path=path, **own)))[0].status == 401
    right = {"authorization": "Bearer right"}
    assert (await run(http_scope(path="/chat", headers=right, **forwarded)))[1].caller == ROOT


DEED = Deed("DELETE /x", frozenset({"alice"}))


async def test_a_deed_is_told_before_the_answer() -> None:
    """Once, with the status, when nothing has been sent yet."""
    headers = {"authorization": "Bearer right", "x-request-id": "r"}
    _, _, lines = await run(http_scope("DELETE", headers=headers), inner=Inner(DEED))
    expected = AuditRecord("key:1", "root", "DELETE /x", "/x", "alice", None, 200, None, "r")
    assert lines.told == [(expected, 0)]


async def test_a_deed_that_fails_is_told_too() -> None:
    """With the error's code; and without a status if there is no answer at all."""
    right = {"authorization": "Bearer right"}
    for error, status, code in (
        (RuntimeError("x"), 500, "INTERNAL_ERROR"),
        (StoreUnavailable(), 500, "INTERNAL_ERROR"),
    ):
        _, _, lines = await run(http_scope(headers=right), inner=Inner(DEED, error))
        assert [(record.status, record.code) for record, _ in lines.told] == [(status, code)]
    wire = Wire()
    lines = Lines(wire)
    guard = Guard(Inner(DEED, KeyboardInterrupt()), ApiOptions(), lines, OneKey())
    with pytest.raises(KeyboardInterrupt):
        await guard(http_scope(headers=right), wire.receive, wire.send)
    assert [(record.status, record.code) for record, _ in lines.told] == [(None, None)]


async def test_what_is_no_deed_is_not_told() -> None:
    """Nothing of ordinary requests, nor of those that are refused."""
    assert (await run(http_scope(headers={"authorization": "Bearer right"})))[2].told == []
    wire, _, lines = await run(http_scope("POST"))
    assert (json.loads(wire.sent[1]["body"])["code"], lines.told) == ("UNAUTHENTICATED", [])
