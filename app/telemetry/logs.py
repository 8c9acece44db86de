"""Log lines: one shape for ours and for the libraries', on the console or as JSON."""

import logging
import sys
from typing import Literal

from app.domain.ids import SessionKey
from app.domain.stats import DiscardCause, EvictionCause

LogFormat = Literal["console", "json"]

_log = logging.getLogger("app.pool")
_NOISY = ("asyncio", "httpx", "httpx2", "openai", "uvicorn.access", "uvicorn.error")


def configure_logs(log_format: LogFormat, level: str) -> None:
    """Send everything at ``level`` and above to stderr in ``log_format``.

    Called by the command line only: a program that embeds the product keeps its own logging.
    """
    import structlog  # with rich and pygments behind it, a fifth of all that an embedder would import

    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    final: list[structlog.types.Processor]
    if log_format == "json":
        final = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    else:
        final = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
    )
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


class PoolLog:
    """A ``PoolObserver`` that writes what the pool did into the log."""

    def evicted(self, key: SessionKey, cause: EvictionCause) -> None:
        _log.debug("evicted the agent of %s: %s", key.session_id, cause)

    def discarded(self, key: SessionKey, cause: DiscardCause) -> None:
        _log.info("discarded the agent of %s: %s", key.session_id, cause)

    def zombie_appeared(self, key: SessionKey) -> None:
        _log.error("a turn of %s ignores its cancellation; its place is taken until it ends", key.session_id)
