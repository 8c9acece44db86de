"""For schemathesis: what no schema can say, and so cannot be held against an answer.

Loaded into its process. Whatever fits the schema has to be accepted, but for the reasons that are listed
here; in a batch, an entry that does not fit is refused, not the batch.
"""

import json
from typing import Any

import schemathesis
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

CODES = frozenset(
    {
        "UNKNOWN_MODEL",  # what an operator offers differs
        "IDEMPOTENCY_MISMATCH",  # the key was used for another request
        "PRECONDITION_FAILED",  # it is another revision
        "SESSION_EXPIRED",  # ttl_s was small
    }
)
REASONS = (
    "is of another",  # cursors and event ids: which belong to one list, or one turn
    "is not one of this list's",
    "is no node of this store",
    "cannot be given with",
    "differs from",
    "must be between -2^53 and 2^53",  # deep inside of free objects
    "must not have a NUL character in it",
    "must not have half a surrogate pair in it",
    "must not have a control character in it",  # in titles, where a pattern would be a page long
    "must have a visible character",
    "must take at most",
    "must be nested at most",
    "must have turn_id or turns",  # and neither null
    "must be <turn_id>:<seq>",  # null, which a header cannot be
    "must be a whole number",  # null in a query, likewise
    "should be a valid integer",  # 1.0 is one for JSON Schema
)


def _body_of(response: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(response.content))
    except ValueError:
        return {}


@schemathesis.check
def what_fits_is_accepted(ctx: Any, response: Any, case: Any) -> bool | None:
    problem = _body_of(response) if response.status_code in (410, 412, 422) else {}
    if problem.get("code") in CODES:
        return None
    errors = problem.get("errors", [])
    if errors and all(any(reason in error["message"] for reason in REASONS) for error in errors):
        return None
    return positive_data_acceptance(ctx, response, case)


@schemathesis.check
def what_does_not_fit_is_refused(ctx: Any, response: Any, case: Any) -> bool | None:
    results = _body_of(response).get("results", ())
    if case.operation.label == "POST /sessions/batch" and any("error" in result for result in results):
        return None
    return negative_data_rejection(ctx, response, case)
