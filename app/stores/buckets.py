"""Response times are counted in buckets of a logarithmic scale, eight to a doubling.

So a percentile of them is off by a twentieth at most.
"""

import math

BUCKETS_PER_DOUBLING = 8
PREFIX = "ms:"
"""Before the number of a bucket in a counter's name."""
P95 = 0.95


def bucket_of(time_ms: int) -> int:
    """Return the bucket of a response time; 0 is for less than a millisecond."""
    return 1 + math.floor(BUCKETS_PER_DOUBLING * math.log2(time_ms)) if time_ms >= 1 else 0


def percentile(buckets: dict[int, int], share: float) -> int:
    """Return about the smallest time (ms) that at least this share of the counted ones kept to."""
    missing = math.ceil(share * sum(buckets.values()))
    # A bucket may be left over from before the store was loaded, and have none.
    for bucket in sorted(bucket for bucket, count in buckets.items() if count):
        missing -= buckets[bucket]
        if missing <= 0:
            return round(2 ** ((bucket - 0.5) / BUCKETS_PER_DOUBLING)) if bucket else 0
    return 0
