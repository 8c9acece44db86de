"""The fault proxy does to connections what its faults say, and nothing else."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faultproxy import BLACK_HOLE, HOLD, HOST, REFUSE, RESET, SWALLOW_REPLIES, FaultProxy, latency

SILENCE_S = 0.15
ANSWER_S = 5


class Shouter(socketserver.ThreadingTCPServer):
    """Answers each line in capitals; ``heard`` are the lines that came."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.has_heard = threading.Condition()
        super().__init__((HOST, 0), _Shouting)

    def note(self, line: bytes) -> None:
        with self.has_heard:
            self.heard.append(line)
            self.has_heard.notify_all()

    def wait_heard(self, line: bytes) -> bool:
        with self.has_heard:
            return self.has_heard.wait_for(lambda: line in self.heard, ANSWER_S)


class _Shouting(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Shouter)
        try:
            for line in self.rfile:
                self.server.note(line.strip())
                self.wfile.write(line.upper())
        except ConnectionError:
            pass


@pytest.fixture
def server() -> Iterator[Shouter]:
    with Shouter() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def proxy(server: Shouter) -> Iterator[FaultProxy]:
    with FaultProxy(server.server_address[1]) as proxy:
        yield proxy


class Caller:
    """A client with one connection."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.socket = socket.create_connection((HOST, proxy.port), ANSWER_S)

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def say(self, line: bytes) -> None:
        self.socket.sendall(line + b"\n")

    def hear(self, within_s: float = ANSWER_S) -> bytes:
        """Return what comes, ``b""`` at the end; raises ``TimeoutError`` when nothing does."""
        self.socket.settimeout(within_s)
        return self.socket.recv(1000).strip()

    def ask(self, line: bytes) -> bytes:
        self.say(line)
        return self.hear()

    def hears_nothing(self) -> bool:
        try:
            self.hear(SILENCE_S)
        except TimeoutError:
            return True
        return False


def test_without_a_fault_everything_passes(proxy, server):
    """Bytes go both ways, and the end of one side is the end of the other."""
    with Caller(proxy) as one, Caller(proxy) as two:
        assert (one.ask(b"a"), two.ask(b"b")) == (b"A", b"B")
        assert (proxy.links, proxy.accepted) == ([1, 2], 2)
        one.socket.shutdown(socket.SHUT_WR)
        assert one.hear() == b""
    assert server.heard == [b"a", b"b"]


def test_latency_is_added_to_each_direction_and_keeps_the_order(proxy):
    """What is said under latency takes so long twice, and what is said after it comes behind it."""
    with Caller(proxy) as caller:
        caller.ask(b"warm")
        proxy.inflict(latency(0.2))
        began = time.monotonic()
        caller.say(b"slow")
        proxy.heal()
        caller.say(b"fast")
        said = caller.hear()
        while said.count(b"\n") < 1:
            said += b"\n" + caller.hear()
        assert said.split() == [b"SLOW", b"FAST"]
        assert time.monotonic() - began >= 0.2
        proxy.inflict(latency(0.1))
        began = time.monotonic()
        assert caller.ask(b"x") == b"X"
        assert time.monotonic() - began >= 0.2


def test_reset_ends_what_is_connected_and_what_connects(proxy):
    """Connections end with a reset; once it is over new ones are served."""
    with Caller(proxy) as caller:
        caller.ask(b"a")
        proxy.inflict(RESET)
        with pytest.raises(ConnectionResetError):
            caller.hear()
        with pytest.raises(ConnectionResetError), Caller(proxy) as late:
            late.ask(b"b")
    proxy.heal()
    with Caller(proxy) as caller:
        assert caller.ask(b"c") == b"C"


def test_black_hole_reads_and_says_nothing(proxy, server):
    """Old and new connections get no answer and no end; what they said is lost, and they with it."""
    with Caller(proxy) as old:
        old.ask(b"a")
        proxy.inflict(BLACK_HOLE)
        with Caller(proxy) as new:
            old.say(b"b")
            new.say(b"c")
            assert (old.hears_nothing(), new.hears_nothing()) == (True, True)
            proxy.heal()
            for caller in (old, new):
                with pytest.raises(ConnectionResetError):
                    caller.hear()
    assert server.heard == [b"a"]


def test_what_is_held_arrives_later_even_if_its_sender_has_left(proxy, server):
    """When it is over the server gets what was said meanwhile, and who waited gets its answer."""
    with Caller(proxy) as patient, Caller(proxy) as hasty:
        patient.ask(b"a")
        hasty.ask(b"b")
        proxy.inflict(HOLD)
        patient.say(b"late")
        hasty.say(b"from nobody")
        assert patient.hears_nothing()
        hasty.socket.close()
        assert server.heard == [b"a", b"b"]
        proxy.heal()
        assert patient.hear() == b"LATE"
    assert server.wait_heard(b"from nobody")


def test_swallowed_replies_were_carried_out(proxy, server):
    """The request arrives, its answer does not; the connection ends when the fault does."""
    with Caller(proxy) as caller:
        proxy.inflict(SWALLOW_REPLIES)
        caller.say(b"write")
        assert server.wait_heard(b"write")
        assert caller.hears_nothing()
        proxy.heal()
        with pytest.raises(ConnectionResetError):
            caller.hear()


def test_refused_until_it_is_over(proxy):
    """Nobody listens, and the same port listens again."""
    with Caller(proxy) as caller:
        caller.ask(b"a")
        proxy.inflict(REFUSE)
        with pytest.raises(ConnectionResetError):
            caller.hear()
    with pytest.raises(ConnectionRefusedError):
        Caller(proxy)
    proxy.heal()
    with Caller(proxy) as caller:
        assert caller.ask(b"b") == b"B"


def test_a_fault_of_one_connection_is_no_other_ones(proxy):
    """The named connection is silent, the others go on."""
    with Caller(proxy) as one:
        one.ask(b"a")
        with Caller(proxy) as two:
            two.ask(b"b")
            proxy.inflict(BLACK_HOLE, on=proxy.links[0])
            one.say(b"c")
            assert one.hears_nothing()
            assert two.ask(b"d") == b"D"


def test_a_server_that_is_gone_looks_gone(proxy, server):
    """A connection to nobody is reset."""
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionResetError), Caller(proxy) as caller:
        caller.ask(b"a")
