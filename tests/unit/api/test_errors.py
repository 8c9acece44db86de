"""Problem documents: their members, their statuses, and what is never in them."""

import re
from pathlib import Path

import pytest

from app.api.errors import (
    MAX_FIELD_ERRORS,
    TABLE,
    InvalidFields,
    problem_members,
    problem_response,
    problem_type,
    unexpected_response,
)
from app.api.exchange import Exchange
from app.domain import errors as domain_errors
from app.domain.errors import AgentPoolError, InvalidInput, PoolExhausted, SessionBusy, StoreUnavailable
from app.domain.turn import TurnError

EXCHANGE = Exchange(path="/api/chat", request_id="r1")


def all_errors(kind: type[AgentPoolError] = AgentPoolError) -> list[type[AgentPoolError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in all_errors(child))]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_row_in_the_table(kind: type[AgentPoolError]) -> None:
    """No domain error falls through to the wrong status."""
    assert kind.code in TABLE


def test_the_table_is_that_of_the_contract() -> None:
    """A few rows that clients rely on most."""
    statuses = {
        code: TABLE[code][0] for code in ("SESSION_BUSY", "TURN_QUEUE_FULL", "SESSION_EXPIRED", "MODEL_ERROR")
    }
    assert statuses == {
        "SESSION_BUSY": 409,
        "TURN_QUEUE_FULL": 429,
        "SESSION_EXPIRED": 410,
        "MODEL_ERROR": 502,
    }


def test_members_of_a_problem() -> None:
    """All members of the contract, those that do not apply left out."""
    assert problem_members(SessionBusy(session_id="s", turn_id="t"), EXCHANGE) == {
        "type": "/problems/session-busy",
        "title": "A turn is running",
        "status": 409,
        "detail": "A turn is running in this session.",
        "instance": "/api/chat",
        "code": "SESSION_BUSY",
        "request_id": "r1",
        "session_id": "s",
        "turn_id": "t",
    }


def test_a_stored_error_reads_like_a_raised_one() -> None:
    """A turn's stored error becomes the same document, with the exchange's ids."""
    exchange = Exchange(path="/p", request_id="r", session_id="s", turn_id="t")
    stored = problem_members(TurnError("POOL_EXHAUSTED", "Busy.", 2.1, outcome_unknown=True), exchange)
    assert stored["status"] == 503
    assert stored["retry_after_s"] == 3
    assert stored["outcome"] == "unknown"
    assert (stored["session_id"], stored["turn_id"]) == ("s", "t")


def test_a_code_of_another_release_is_an_internal_error() -> None:
    """A stored code that nobody knows any more keeps its name and gets 500."""
    members = problem_members(TurnError("GONE_CODE", "Old."), EXCHANGE)
    assert (members["status"], members["code"]) == (500, "GONE_CODE")


@pytest.mark.parametrize("code", [code for code, (status, _) in TABLE.items() if status in (429, 503)])
def test_429_and_503_always_say_when_to_come_back(code: str) -> None:
    """``Retry-After`` is a whole number of seconds, one at least."""
    response = problem_response(TurnError(code, "Later."), EXCHANGE)
    assert int(response.headers["retry-after"]) >= 1


def test_retry_after_is_rounded_up() -> None:
    """A fraction never sends clients back too early."""
    assert problem_response(PoolExhausted(retry_after_s=0.2), EXCHANGE).headers["retry-after"] == "1"
    assert problem_response(PoolExhausted(retry_after_s=4.01), EXCHANGE).headers["retry-after"] == "5"


def test_further_members_are_kept() -> None:
    """What a domain error adds is in the document."""
    assert problem_members(StoreUnavailable(outcome_unknown=True), EXCHANGE)["outcome"] == "unknown"
    assert problem_members(InvalidInput("a.b", "is wrong"), EXCHANGE)["errors"] == [
        {"field": "a.b", "message": "is wrong"}
    ]


def test_a_flood_of_errors_is_cut() -> None:
    """A body of a thousand wrong fields does not make an answer of a thousand."""
    error = InvalidFields([(f"f{n}", "is wrong") for n in range(1000)])
    members = problem_members(error, EXCHANGE)
    assert len(members["errors"]) == MAX_FIELD_ERRORS
    assert members["detail"] == "f0: is wrong (and 999 more)"


def test_an_unexpected_error_tells_nothing() -> None:
    """Neither its class nor its text leaves the process."""
    response = unexpected_response(RuntimeError("/home/x sk-1"), EXCHANGE)
    assert response.status_code == 500
    assert b"sk-1" not in response.body
    assert b"RuntimeError" not in response.body


def test_unauthenticated_names_the_scheme() -> None:
    """A 401 carries ``WWW-Authenticate``."""
    assert "www-authenticate" in problem_response(TurnError("UNAUTHENTICATED", "Who?"), EXCHANGE).headers


@pytest.mark.parametrize("code", TABLE)
def test_type_is_a_stable_uri(code: str) -> None:
    """Lower case, words joined by hyphens."""
    assert re.fullmatch(r"/problems/[a-z]+(-[a-z]+)*", problem_type(code))


def test_domain_errors_know_no_http() -> None:
    """The only table from codes to statuses is the face's."""
    assert not re.search(r"\b(4|5)\d\d\b", Path(domain_errors.__file__).read_text())
