"""Who is it, and where is it noted what admins do."""

from collections.abc import Iterable
from typing import Protocol

from app.domain.audit import AuditRecord
from app.domain.principal import Principal

RawHeaders = Iterable[tuple[bytes, bytes]]
"""A request's headers as they came, names in lower case."""


class Authenticator(Protocol):
    def authenticate(self, headers: RawHeaders) -> Principal:
        """Return whoever the credential among ``headers`` stands for. Never waits.

        Raises:
            Unauthenticated: there is none, more than one, or one that does not count; it does not say
                which.
        """


class AuditLog(Protocol):
    def require(self) -> None:
        """Return if a record could be written now: asked before anything is changed.

        Raises:
            StoreUnavailable: it could not.
        """

    def write(self, record: AuditRecord) -> None:
        """Keep the record, with the time. One that cannot be written is logged as an error."""
