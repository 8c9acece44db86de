"""What went wrong at a provider, in the words of the domain.

A provider's own text is never passed on: it may repeat the key, or the conversation.
Of its error codes only well-known ones are named.
"""

from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from app.domain.errors import AgentPoolError, ModelError, ModelRateLimited, ModelUnavailable

_LONGEST_RETRY_AFTER_S: Final = 86_400.0
_TOLD_CODES: Final = frozenset(
    {
        "content_filter",
        "content_policy_violation",
        "context_length_exceeded",
        "insufficient_quota",
        "invalid_api_key",
        "invalid_request_error",
        "model_not_found",
        "rate_limit_exceeded",
        "unsupported_parameter",
        "unsupported_value",
    }
)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error to raise, and whether trying again may help."""

    error: AgentPoolError
    passing: bool = False


def malformed() -> ModelError:
    """Return the error for what is not the protocol: a web page, broken JSON, a shape nobody knows."""
    return ModelError("The model's answer was malformed.")


def reported() -> ModelError:
    """Return the error for a provider that reports one inside its stream."""
    return ModelError("The model's provider broke off with an error.")


def refused(
    status: int, *, retry_after: str | None = None, date: str | None = None, code: object = None
) -> Failure:
    """Return the failure that an HTTP status other than 200 means.

    ``retry_after`` and ``date`` are the headers of these names.
    """
    named = f", {code}" if isinstance(code, str) and code in _TOLD_CODES else ""
    told = f"(HTTP {status}{named})"
    wait = parse_retry_after(retry_after, date)
    if status == 429:
        detail = f"The model's provider limits the rate of requests {told}."
        return Failure(ModelRateLimited(detail, retry_after_s=wait), passing=code != "insufficient_quota")
    if status >= 500 or status == 408:
        detail = f"The model's provider cannot answer now {told}."
        return Failure(ModelUnavailable(detail, retry_after_s=wait), passing=True)
    if 300 <= status < 400:
        return Failure(ModelError(f"The model's provider points elsewhere {told}, which is not followed."))
    return Failure(ModelError(f"The model's provider refused the request {told}."))


def broken_off(*, begun: bool) -> Failure:
    """Return the failure of a connection that could not be made, or broke; ``begun``: the answer had."""
    if begun:
        return Failure(ModelError("The model's answer was cut off."))
    return Failure(ModelUnavailable("The model's provider cannot be reached."), passing=True)


def parse_retry_after(value: str | None, date: str | None = None) -> float | None:
    """Return the seconds that a ``Retry-After`` header means, or ``None``.

    A time of day counts from the answer's own ``Date``, so no clock of ours is needed.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        if date is None:
            return None
        try:
            seconds = (parsedate_to_datetime(value) - parsedate_to_datetime(date)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_S) if seconds == seconds else None
