"""The pool's knobs, validated once."""

from dataclasses import dataclass

USER_SHARE = 10  # one user may hold a tenth of the places while others wait …
USER_PLACES_MIN = 4  # … but at least four
ZOMBIE_SHARE = 10  # more than a tenth of the places lost to zombies: replace the process


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """Sizes and bounds of one pool.

    ``max_instances`` is hard: live agents, agents being loaded and zombies together.
    ``idle_ttl_s`` slides from the end of the last turn; 0 = no limit.
    ``capacity_wait_s``, ``capacity_queue``: how long, and how many sessions, wait for a place.
    ``queue_depth``, ``queue_wait_s``: how many turns, and how long, wait for one session.
    ``activation_timeout_s``: how long loading one agent may take.

    Raises:
        ValueError: a number is out of its range; names it.
    """

    max_instances: int = 100
    idle_ttl_s: float = 3600.0
    capacity_wait_s: float = 5.0
    capacity_queue: int = 1000
    queue_depth: int = 4
    queue_wait_s: float = 30.0
    activation_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (("max_instances", 1), ("capacity_queue", 0), ("queue_depth", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}")
        for name in ("idle_ttl_s", "capacity_wait_s", "queue_wait_s", "activation_timeout_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number of seconds, at least 0")

    @property
    def places_per_user(self) -> int:
        """How many places one user may hold while others wait."""
        return max(USER_PLACES_MIN, self.max_instances // USER_SHARE)

    @property
    def front_depth(self) -> int:
        """How long a queue may be that a turn at the front still enters: full, but not without end."""
        return 2 * self.queue_depth + 1

    @property
    def zombies_tolerated(self) -> int:
        return self.max_instances // ZOMBIE_SHARE
