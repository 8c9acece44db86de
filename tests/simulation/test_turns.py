"""Pool, turns and a failing store in random worlds: what a client was told is what is stored."""

import logging

import pytest

from tests.simulation.loop import run
from tests.simulation.turn_world import TurnWorld


@pytest.fixture(autouse=True)
def _quiet():
    """These worlds are full of failures that are logged, as they should be."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def play(seed: int) -> None:
    world = TurnWorld(seed)
    try:
        run(world.play(), seed, world.after_step)
    except BaseException as error:
        error.add_note(f"again: python3 scripts/dev.py test tests/simulation/test_turns.py --seed {seed}")
        raise


def test_what_a_client_was_told_is_what_is_stored(seeds):
    """In every world each turn ends in time, once, and the stored path is what was acknowledged."""
    for seed in seeds:
        play(seed)
