"""What the server or the network refused, in the words of the store."""

import logging

import asyncpg

from app.domain.errors import StoreUnavailable

_log = logging.getLogger(__name__)


class TookTooLong(StoreUnavailable):
    """The database takes too long."""


def unavailable(error: BaseException, *, outcome_unknown: bool = False) -> StoreUnavailable:
    """Translate what asyncpg or the network raised; no message repeats the URL or the password."""
    match error:
        case asyncpg.DiskFullError():
            detail = "The database is full."
        case asyncpg.TooManyConnectionsError():
            detail = "The database has no connection left."
        case asyncpg.ReadOnlySQLTransactionError():
            detail = "The database takes no writes: it is a standby."
        case asyncpg.InvalidAuthorizationSpecificationError():
            detail = "The database refuses the user or the password."
        case asyncpg.InvalidCatalogNameError():
            detail = "The database of this name does not exist."
        case asyncpg.QueryCanceledError():
            return TookTooLong("The database takes too long.", outcome_unknown=outcome_unknown)
        case asyncpg.LockNotAvailableError():
            detail = "The database takes too long."
        case asyncpg.InsufficientPrivilegeError():
            detail = "The database does not permit what the store needs."
        case OSError() | asyncpg.InterfaceError() | asyncpg.InternalClientError():
            detail = "The database cannot be reached."
        case asyncpg.PostgresConnectionError():
            detail = "The database cannot be reached."
        case asyncpg.OperatorInterventionError():
            detail = "The database is being shut down or started."
        case _:
            _log.error("the database refused a statement: %s: %s", type(error).__name__, error)
            detail = f"The database failed ({type(error).__name__})."
    return StoreUnavailable(detail, outcome_unknown=outcome_unknown)
