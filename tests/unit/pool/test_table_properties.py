"""The table under random lives: every invariant after every step, and always a way to the end."""

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.pool.machine import TableMachine

BUDGET = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_table_keeps_its_invariants_in_random_lives():
    """After any sequence of calls the table is consistent, fair and can be drained to empty."""
    run_state_machine_as_test(TableMachine, settings=BUDGET)
