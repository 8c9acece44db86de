"""What ``migrate-store`` asks of a store before it copies, and what it prints meanwhile."""

from contextlib import AsyncExitStack

import pytest

from app.domain.errors import StoreUnavailable
from app.domain.session import LifeSpan
from app.migrate import LINE_EVERY_S, Failed, Lines, open_unused
from app.services.moving import Moved
from app.stores.memory.shared import SharedMemoryStore
from tests.fakes import FakeClock


async def test_a_store_with_servers_is_refused() -> None:
    """While one has announced itself the store is closed again, in one line; with force it is opened."""
    serving = SharedMemoryStore(LifeSpan())
    await serving.open("boot", "http://10.0.0.1")
    await serving.leases.announce()
    mine = serving.beside()
    async with AsyncExitStack() as stack:
        with pytest.raises(Failed, match="TO: 1 server") as caught:
            await open_unused(stack, "TO", mine, force=False)
    assert "\n" not in str(caught.value)
    assert "10.0.0.1" not in str(caught.value)
    with pytest.raises(StoreUnavailable):
        await mine.ping()
    async with AsyncExitStack() as stack:
        await open_unused(stack, "TO", mine, force=True)
        await mine.ping()
    with pytest.raises(StoreUnavailable):
        await mine.ping()


async def test_a_shared_store_that_nobody_serves_is_opened() -> None:
    """Having leases is no reason to refuse it."""
    store = SharedMemoryStore(LifeSpan())
    async with AsyncExitStack() as stack:
        await open_unused(stack, "FROM", store, force=False)
        await store.ping()


@pytest.mark.parametrize(("total", "line"), [(2000, "1,234 of 2,000"), (None, "1,234")])
def test_a_log_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], total: int | None, line: str
) -> None:
    """Not with each session, but every few seconds, with how many there are if that is known."""
    clock = FakeClock()
    lines = Lines(total, clock, "copied")
    for _ in range(3):
        lines.show(Moved(sessions=7))
        assert capsys.readouterr().err == ""
        clock.advance(LINE_EVERY_S)
        lines.show(Moved(sessions=1234))
        lines.show(Moved(sessions=1235))
        assert capsys.readouterr().err == f"{line} sessions copied\n"
