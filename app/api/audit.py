"""What belongs in the audit log: noted before it is done, written before it is answered."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from app.api.exchange import Deed, Exchange, exchange_of
from app.domain.audit import AuditRecord
from app.ports.identity import AuditLog

_READING = frozenset({"GET", "HEAD", "OPTIONS"})


def note_deed(request: Request, owner: str | None = None) -> None:
    """See to it that the audit log has this request, if it can change anything, before it is answered.

    ``owner``: the user whom it names, or one of them.

    Raises:
        StoreUnavailable: the log cannot be written; nothing must be changed.
    """
    if request.method in _READING:
        return
    audit: AuditLog = request.app.state.audit
    audit.require()
    exchange = exchange_of(request.scope)
    deed = exchange.deed or Deed(f"{request.method} {request.scope['route'].path_format}")
    if owner is not None and len(deed.owners) < 2:  # of several none is *the* owner; how many is no matter
        deed = replace(deed, owners=deed.owners | {owner})
    exchange.deed = deed


def note_receipt(request: Request, receipt_id: str) -> None:
    """Have the audit log name the receipt for what was noted as a deed."""
    _add(request, receipt_id=receipt_id)


def note_sessions(request: Request, sessions: Iterable[tuple[str, str | None]]) -> None:
    """Have the audit log name the sessions of a batch, by owner and id, and none that were noted before."""
    _add(request, sessions=tuple(sessions))


def note_choices(request: Request, **choices: str | float | None) -> None:
    """Have the audit log say how it was to be done; what is ``None`` was not said.

    Only what was checked, and can be no secret of the client's.
    """
    _add(request, choices={name: choice for name, choice in choices.items() if choice is not None})


def _add(request: Request, **changes: Any) -> None:
    exchange = exchange_of(request.scope)
    if exchange.deed is not None:
        exchange.deed = replace(exchange.deed, **changes)


def record_of(exchange: Exchange, deed: Deed, status: int | None) -> AuditRecord:
    """Return what the audit log is to be told of ``deed`` now that the request is answered."""
    return AuditRecord(
        credential=exchange.caller.credential,
        user_id=exchange.caller.user_id,
        action=deed.action,
        path=exchange.path,
        owner=next(iter(deed.owners)) if len(deed.owners) == 1 else None,
        session_id=exchange.session_id,
        status=status,
        code=exchange.code,
        request_id=exchange.request_id,
        receipt_id=deed.receipt_id,
        sessions=deed.sessions,
        choices=deed.choices,
    )
