"""The server's own decisions: which signal counts, which socket it takes, what closes when."""

import gc
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from app.config import Settings
from app.runtime import Runtime
from app.server import (
    GC_THRESHOLDS,
    LOCAL_NAMES,
    SAME_SIGNAL_S,
    PoolServer,
    bind,
    calm_collector,
    serve,
    take_over,
    with_local_names,
)
from tests.fakes import FakeClock

TERM, INT = int(signal.SIGTERM), int(signal.SIGINT)


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(Settings(store_url="memory://", model_provider="demo"))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with bind("127.0.0.1", 0) as bound:
        yield bound


@pytest.mark.parametrize(
    ("signals", "skips_wait"),
    [
        ([(0.0, TERM)], False),
        ([(0.0, TERM), (0.999, TERM)], False),
        ([(0.0, TERM), (SAME_SIGNAL_S, TERM)], True),
        ([(0.0, INT), (0.0, INT), (0.5, INT), (0.9, INT)], False),
        ([(0.0, INT), (0.6, INT), (1.2, INT)], True),
        ([(0.0, INT), (0.0, TERM)], True),
        ([(0.0, TERM), (0.0, INT)], True),
    ],
)
def test_equal_signals_within_a_second_count_once(
    runtime: Runtime, signals: list[tuple[float, int]], skips_wait: bool
) -> None:
    """The first signal ends the server; only another, or the same a second after it, skips the wait."""
    clock = FakeClock()
    server = PoolServer(runtime, clock=clock)
    began = clock.monotonic()
    for at, number in signals:
        clock.advance(began + at - clock.monotonic())
        server.handle_exit(number, None)
        assert server.should_exit
    assert server.is_wait_over is skips_wait


def test_listening_socket_is_taken_over(listener: socket.socket) -> None:
    """The same socket comes out, ready for an event loop, and programs that tools start do not get it."""
    inherited = os.dup(listener.fileno())
    os.set_inheritable(inherited, True)
    with take_over(inherited) as taken:
        assert taken.getsockname() == listener.getsockname()
        assert (taken.getblocking(), os.get_inheritable(inherited)) == (False, False)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_other_sockets_are_refused_and_left_open(kind: socket.SocketKind) -> None:
    """A socket that does not listen raises and stays as it was."""
    with socket.socket(socket.AF_INET, kind) as other:
        with pytest.raises(OSError, match="not a listening TCP socket"):
            take_over(other.fileno())
        assert other.getsockname()


async def test_port_for_nodes_is_another_than_that_for_clients(listener: socket.socket) -> None:
    """The same number on another address ends the start: requests of both are told apart by their ports."""
    settings = Settings(
        store_url="redis://127.0.0.1:1",
        model_provider="demo",
        node_listen=f"127.0.0.2:{listener.getsockname()[1]}",
    )
    with pytest.raises(ValueError, match=r"^NODE_LISTEN: 127\.0\.0\.2:\d+ has the port that clients use"):
        await serve(settings, listener)


async def test_store_closes_last_whatever_fails(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of closing that fails or hangs does not keep the later ones from their turn."""
    steps: list[str] = []
    close_store = runtime._store.close

    async def fail() -> None:
        steps.append("models")
        raise ValueError("no")

    async def note() -> None:
        steps.append("store")
        await close_store()

    async with runtime:
        monkeypatch.setattr(runtime._models, "close", fail)
        monkeypatch.setattr(runtime._store, "close", note)
        with pytest.raises(ValueError, match="no"):
            await runtime.close()
        assert steps == ["models", "store"]
        monkeypatch.undo()


def test_collector_leaves_what_the_start_has_made() -> None:
    """What is there is not looked at any more, and passes over everything are rare."""
    thresholds, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        calm_collector()
        assert gc.get_freeze_count() > frozen + 10_000
        assert gc.get_threshold() == GC_THRESHOLDS
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)


def test_on_this_machine_alone_only_its_own_names_count() -> None:
    """Where nobody is asked for a credential, and the operator has named no hosts; else all as it was set."""
    base = {"store_url": "memory://", "model_provider": "demo"}
    keyed = {"auth_mode": "api_key"}
    named = {"allowed_hosts": ("pool.example",)}
    for address, given, expected in (
        ("127.0.0.1", {}, {*LOCAL_NAMES}),
        ("127.0.0.2", {}, {*LOCAL_NAMES, "127.0.0.2"}),
        ("0.0.0.0", {}, set()),
        ("127.0.0.1", keyed, set()),
        ("127.0.0.1", named, {"pool.example"}),
    ):
        with bind(address, 0) as listener:
            settings = with_local_names(Settings(**base, **given), listener)
        assert set(settings.allowed_hosts) == expected
