"""A user's limits on requests, as the ``RateLimit`` headers tell of them.

In the form of draft-ietf-httpapi-ratelimit-headers-06, which is what servers and clients in use speak:
``RateLimit-Limit``, ``-Remaining`` and ``-Reset`` of the limit that is used up most, and
``RateLimit-Policy`` with all that apply.
"""

from collections.abc import Sequence
from math import ceil

from starlette.types import Scope

from app.api.exchange import HOPS_KEY, Exchange
from app.domain.quota import Quota
from app.services.quota import RequestQuota


async def count_request(quota: RequestQuota, scope: Scope, exchange: Exchange) -> None:
    """Count a request of a user who is known by a credential; admins are not limited.

    One that another node forwards was counted there.

    Raises:
        RateLimited: it is one too many.
    """
    caller = exchange.caller
    if caller.user_id is None or caller.is_admin or HOPS_KEY in scope:
        return
    exchange.quotas.append(await quota.take(caller.user_id))


def quota_headers(quotas: Sequence[Quota]) -> list[tuple[bytes, bytes]]:
    """Return the headers that tell of ``quotas``, of which there is at least one."""
    least = min(quotas, key=lambda quota: quota.remaining / quota.limit)
    return [
        (b"ratelimit-limit", b"%d" % least.limit),
        (b"ratelimit-remaining", b"%d" % least.remaining),
        (b"ratelimit-reset", b"%d" % ceil(least.reset_s)),
        (b"ratelimit-policy", ", ".join(map(_policy, quotas)).encode()),
    ]


def _policy(quota: Quota) -> str:
    window = "" if quota.window_s is None else f";w={quota.window_s}"
    return f'{quota.limit}{window};comment="{quota.unit}"'
