"""What belongs in the audit log: noted before it is done, written before it is answered."""

from dataclasses import replace

from starlette.requests import Request

from app.api.exchange import Deed, Exchange, exchange_of
from app.domain.audit import AuditRecord
from app.ports.identity import AuditLog

_READING = frozenset({"GET", "HEAD", "OPTIONS"})


def note_deed(request: Request, owner: str | None = None) -> None:
    """See to it that the audit log has this request, if it can change anything, before it is answered.

    ``owner``: the user whom it names.

    Raises:
        StoreUnavailable: the log cannot be written; nothing must be changed.
    """
    if request.method in _READING:
        return
    audit: AuditLog = request.app.state.audit
    audit.require()
    exchange = exchange_of(request.scope)
    if owner is None and exchange.deed is not None:
        return
    exchange.deed = Deed(f"{request.method} {request.scope['route'].path_format}", owner)


def note_receipt(request: Request, receipt_id: str) -> None:
    """Have the audit log name the receipt for what was noted as a deed."""
    exchange = exchange_of(request.scope)
    if exchange.deed is not None:
        exchange.deed = replace(exchange.deed, receipt_id=receipt_id)


def record_of(exchange: Exchange, deed: Deed, status: int | None) -> AuditRecord:
    """Return what the audit log is to be told of ``deed`` now that the request is answered."""
    return AuditRecord(
        credential=exchange.caller.credential,
        user_id=exchange.caller.user_id,
        action=deed.action,
        path=exchange.path,
        owner=deed.owner,
        session_id=exchange.session_id,
        status=status,
        code=exchange.code,
        request_id=exchange.request_id,
        receipt_id=deed.receipt_id,
    )
