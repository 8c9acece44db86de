"""What one user may have, and how much of it is left."""

from dataclasses import dataclass

UserKey = tuple[str, str]
"""Whose limit it is: the owner of the sessions, and their user."""


@dataclass(frozen=True, slots=True)
class Quota:
    """One limit at this moment. ``reset_s``: in so many seconds there will be more of it again.

    ``window_s`` is what it is counted over, ``None``: what goes on at the same time. ``unit`` is what
    is counted, in a word.
    """

    limit: int
    remaining: int
    reset_s: float
    window_s: int | None
    unit: str


@dataclass(frozen=True, slots=True)
class Spent:
    """Tokens that a user whom the store forgets had spent on ``day``, counted from the epoch in UTC.

    ``stored`` of them the store counted before it forgot, 0: it has.
    """

    day: int
    tokens: int
    stored: int
