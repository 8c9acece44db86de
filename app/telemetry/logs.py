"""Log lines: one shape for ours and for the libraries', on the console or as JSON."""

import json
import logging
import sys
import threading
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal

from app.domain.ids import SessionKey
from app.domain.stats import DiscardCause, EvictionCause
from app.telemetry.redaction import Redactor, secrets_in_environment

LogFormat = Literal["console", "json"]

_log = logging.getLogger("app.pool")
_NOISY = ("asyncio", "httpcore2", "httpx", "httpx2", "openai", "uvicorn.access", "uvicorn.error")


def configure_logs(log_format: LogFormat, level: str, secrets: Iterable[str] = ()) -> None:
    """Send everything at ``level`` and above to stderr in ``log_format``, without secrets.

    ``secrets`` are those of the settings; those of the environment are looked for anyway. What ends a
    thread or the program is told without them, too. Called by the command line only: a program that
    embeds the product keeps its own logging, and may add a ``RedactionFilter``.
    """
    redactor = Redactor([*secrets, *secrets_in_environment()])
    root = logging.getLogger()
    root.handlers[:] = [make_handler(log_format, redactor)]
    root.setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    _tell_the_end(redactor)


def make_handler(log_format: LogFormat, redactor: Redactor) -> "RedactingHandler":
    """Return what writes lines to stderr in ``log_format``."""
    import structlog  # with rich and pygments behind it, a fifth of all that an embedder would import

    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    final: list[structlog.types.Processor]
    if log_format == "json":
        # No variables in tracebacks: what people say is in them, and keys.
        frames = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        final = [structlog.processors.ExceptionRenderer(frames), structlog.processors.JSONRenderer()]
    else:
        plain = structlog.dev.plain_traceback
        final = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
    )
    handler = RedactingHandler(redactor, is_json=log_format == "json")
    handler.setFormatter(formatter)
    return handler


class RedactingHandler(logging.StreamHandler[Any]):
    """Writes lines to stderr, each cleaned as a whole; of JSON each text, so that it stays JSON."""

    def __init__(self, redactor: Redactor, *, is_json: bool) -> None:
        super().__init__()
        self._redactor = redactor
        self._is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        redactor, line = self._redactor.of_logger(record.name), super().format(record)
        if self._is_json:
            return json.dumps(redactor.clean_value(json.loads(line)))
        return redactor.clean(line)

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        """Say where a line got lost; the standard one would print its arguments."""
        error = sys.exc_info()[0]
        name = error.__name__ if error else "an error"
        self.stream.write(f"a line of {record.name} could not be logged ({name}, line {record.lineno})\n")


def _tell_the_end(redactor: Redactor) -> None:
    """Have uncaught exceptions printed as ever, but cleaned."""

    def tell(
        kind: type[BaseException], error: BaseException | None, trace: TracebackType | None, where: str = ""
    ) -> None:
        lines = traceback.format_exception(kind, error, trace)
        print(where + redactor.clean("".join(lines)), end="", file=sys.stderr, flush=True)  # noqa: T201

    def tell_of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            name = args.thread.name if args.thread else "a thread"
            tell(args.exc_type, args.exc_value, args.exc_traceback, f"Exception in {name}: ")

    def tell_of_unraisable(args: Any) -> None:
        # Not what it happened in: its repr could be anything.
        tell(args.exc_type, args.exc_value, args.exc_traceback, "Exception ignored: ")

    sys.excepthook = tell
    threading.excepthook = tell_of_thread
    sys.unraisablehook = tell_of_unraisable


class PoolLog:
    """A ``PoolObserver`` that writes what the pool did into the log."""

    def evicted(self, key: SessionKey, cause: EvictionCause) -> None:
        _log.debug("evicted the agent of %s: %s", key.session_id, cause)

    def discarded(self, key: SessionKey, cause: DiscardCause) -> None:
        _log.info("discarded the agent of %s: %s", key.session_id, cause)

    def zombie_appeared(self, key: SessionKey) -> None:
        _log.error("a turn of %s ignores its cancellation; its place is taken until it ends", key.session_id)
