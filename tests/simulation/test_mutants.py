"""The test of the tests: no mistake survives the random lives of the table or the random worlds."""

import logging

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.simulation import mutants, test_pool, test_turns
from tests.unit.pool.machine import TableMachine
from tests.unit.pool.mutants import (
    MUTANTS,
    DropsTheGrant,
    ForgetsWhoWaitsForRoom,
    GivesThePlaceBackEarly,
    KeepsThePoisoned,
    LeavesTheBusyInTheIdleList,
    LeavesWaitersBehind,
    PopsTheHead,
)
from tests.unit.pool.test_table_properties import BUDGET

# The mistakes fall within the 200 lives of the real test today; the rest is for luck.
PATIENT = settings(BUDGET, max_examples=1000, phases=[Phase.generate], print_blob=False)
FOUND = (AssertionError, ValueError, IndexError, KeyError)
WORLDS = 150  # of the 500 that are played every time

# Those of the first model of this pool. Two more of them are elsewhere: a release that is not
# idempotent is ``FreesForAnybody`` (a lease hides it from the worlds), and a hand-off that is lost
# with its load ``mutants.forgets_a_load_that_was_cancelled``.
CLASSIC = (
    DropsTheGrant,
    KeepsThePoisoned,
    LeavesTheBusyInTheIdleList,
    GivesThePlaceBackEarly,
    mutants.ForgetsALoad,
    LeavesWaitersBehind,
    ForgetsWhoWaitsForRoom,
    mutants.KeepsLateIdlers,
    PopsTheHead,
    mutants.LeaksThePlaceOfAFailedLoad,
)


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_table_with_a_mistake_is_found_out(mutant):
    """Random lives find every one of these mistakes."""
    machine = type("MutantMachine", (TableMachine,), {"table_class": mutant})
    with pytest.raises(FOUND):
        run_state_machine_as_test(machine, settings=PATIENT)


@pytest.mark.parametrize("mutant", CLASSIC, ids=lambda mutant: mutant.__name__)
def test_a_pool_with_a_mistake_is_found_out(mutant):
    """A few worlds are enough to find a mistake in the table from outside."""
    with pytest.raises(FOUND):
        for seed in range(WORLDS):
            test_pool.play(seed, mutant)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_turn_engine_with_a_mistake_is_found_out(mutant):
    """Each mistake in the carrying out of turns shows in one of the first worlds."""
    with mutant.in_force(), pytest.raises(FOUND):
        for seed in range(WORLDS):
            test_turns.play(seed)
