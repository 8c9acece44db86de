"""Two nodes in random worlds: no turn is lost, doubled, or built on what it did not know."""

import logging

import pytest

from tests.simulation import nodes_mutants
from tests.simulation.loop import run
from tests.simulation.nodes_world import NodesWorld

WORLDS = 400  # for a mistake; of the 500 that are played every time


@pytest.fixture(autouse=True)
def _quiet():
    """These worlds are full of failures that are logged, as they should be."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def play(seed: int) -> NodesWorld:
    world = NodesWorld(seed)
    try:
        run(world.play(), seed, world.after_step)
    except BaseException as error:
        error.add_note(f"again: python3 scripts/dev.py test tests/simulation/test_nodes.py --seed {seed}")
        raise
    return world


def test_what_clients_of_two_nodes_were_told_is_what_is_stored(seeds):
    """In every world what was acknowledged is stored, once, behind the path that its agent knew."""
    worlds = [play(seed) for seed in seeds]
    assert len(seeds) == 1 or sum(world.lapsed for world in worlds) > len(seeds), "hardly a lease ran out"


@pytest.mark.parametrize("mutant", nodes_mutants.MUTANTS)
def test_a_mistake_between_nodes_is_found_out(mutant):
    """The worlds find each of these mistakes."""
    with nodes_mutants.in_force(mutant), pytest.raises(AssertionError):
        for seed in range(WORLDS):
            play(seed)
