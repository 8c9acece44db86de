"""``--seed N`` plays one world again; ``--seeds N`` plays that many (500 if nothing is said)."""

import pytest

SEEDS = 500


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulation")
    group.addoption("--seed", type=int, default=None, help="play only the simulated world of this seed")
    group.addoption("--seeds", type=int, default=SEEDS, help="how many simulated worlds to play")


@pytest.fixture
def seeds(request: pytest.FixtureRequest) -> range:
    # Known to pytest only when this folder is named on the command line, hence the defaults.
    seed = request.config.getoption("--seed", default=None)
    return (
        range(request.config.getoption("--seeds", default=SEEDS)) if seed is None else range(seed, seed + 1)
    )
