"""The whole pool in random worlds: slow and failing loads, cancels, zombies, sweeps, drains."""

from app.pool.table import PoolTable
from tests.simulation.loop import run
from tests.simulation.pool_world import PoolWorld


def play(seed: int, table_class: type[PoolTable] = PoolTable) -> None:
    world = PoolWorld(seed, table_class)
    try:
        run(world.play(), seed, world.after_step)
    except BaseException as error:
        error.add_note(f"again: python3 scripts/dev.py test tests/simulation/test_pool.py --seed {seed}")
        raise


def test_the_pool_keeps_its_promises_in_every_world(seeds):
    """In every world the pool stays consistent, serves in order, keeps its time limits and ends empty."""
    for seed in seeds:
        play(seed)


def test_one_seed_is_one_world():
    """The same seed plays the same world step by step, so that a failure can be played again."""

    def trace(seed: int) -> list[str]:
        world, seen = PoolWorld(seed), []
        run(world.play(), seed, lambda: seen.append(repr(world.pool.stats())))
        return seen

    assert trace(3) == trace(3)
    assert trace(3) != trace(4)
