"""The test of the tests: a table with a mistake in it survives neither random lives nor random worlds."""

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.simulation.test_pool import play
from tests.unit.pool.machine import TableMachine
from tests.unit.pool.mutants import (
    MUTANTS,
    DropsTheGrant,
    ForgetsWhoWaitsForRoom,
    GivesThePlaceBackEarly,
    KeepsThePoisoned,
    PopsTheHead,
)
from tests.unit.pool.test_table_properties import BUDGET

# The mistakes fall within the 200 lives of the real test today; the rest is for luck.
PATIENT = settings(BUDGET, max_examples=1000, phases=[Phase.generate], print_blob=False)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_table_with_a_mistake_is_found_out(mutant):
    """Random lives find every one of these mistakes."""
    machine = type("MutantMachine", (TableMachine,), {"table_class": mutant})
    with pytest.raises((AssertionError, ValueError, IndexError, KeyError)):
        run_state_machine_as_test(machine, settings=PATIENT)


@pytest.mark.parametrize(
    "mutant", [PopsTheHead, DropsTheGrant, KeepsThePoisoned, GivesThePlaceBackEarly, ForgetsWhoWaitsForRoom]
)
def test_a_pool_with_a_mistake_is_found_out(mutant):
    """A few worlds are enough to find a mistake in the table from outside."""
    with pytest.raises((AssertionError, ValueError, KeyError)):
        for seed in range(100):
            play(seed, mutant)
