"""What a provider's refusal becomes."""

import pytest

from app.domain.errors import ModelError, ModelRateLimited, ModelUnavailable
from app.models.failure import parse_retry_after, refused

DATE = "Wed, 21 Oct 2026 07:28:00 GMT"


@pytest.mark.parametrize(
    ("status", "error", "passing"),
    [
        (307, ModelError, False),
        (400, ModelError, False),
        (401, ModelError, False),
        (404, ModelError, False),
        (408, ModelUnavailable, True),
        (429, ModelRateLimited, True),
        (500, ModelUnavailable, True),
        (503, ModelUnavailable, True),
    ],
)
def test_statuses(status: int, error: type[Exception], passing: bool) -> None:
    """Each status has one meaning, and only what passes is tried again."""
    failure = refused(status)
    assert type(failure.error) is error
    assert failure.passing is passing
    assert str(status) in failure.error.detail


def test_only_known_codes_are_told() -> None:
    """A code that could carry anything is left out."""
    assert "context_length_exceeded" in refused(400, code="context_length_exceeded").error.detail
    assert "sk-" not in refused(400, code="sk-secret").error.detail
    assert refused(429, code="insufficient_quota").passing is False


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        ("1e9", 86_400.0),
        ("nan", None),
        ("soon", None),
        ("Wed, 21 Oct 2026 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2026 07:27:00 GMT", 0.0),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    """Seconds, or a time of day counted from the answer's own date; nonsense is none."""
    assert parse_retry_after(value, DATE) == seconds


def test_a_time_of_day_without_a_date_is_unknown() -> None:
    """There is no clock to count from."""
    assert parse_retry_after(DATE) is None
