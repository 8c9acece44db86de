"""What becomes of a turn whose watchers leave: it goes on, or ends with them."""

import time
from collections.abc import Iterator

import pytest

from app.config import Settings
from app.runtime import Runtime
from tests.integration.test_http_chat import STALL, Chat, Stream, says
from tests.integration.test_http_server import Json, serving
from tests.integration.test_watch import RawWatcher, WatchServer, count_tasks, settings_of
from tests.modelserver import ModelServer

SOON_S = 0.3  # instead of two seconds, where only the order matters
BEAT_S = 0.05
LEAVINGS = [(path, how) for path in ("/chat/stream", "/chat") for how in ("fin", "rst", "half")]


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture
def chat(models: ModelServer) -> Iterator[Chat]:
    models.reset()
    settings = Settings(store_url="memory://", stream_heartbeat_s=BEAT_S, **settings_of(models))
    with WatchServer(serving(Runtime(settings))) as server:
        moves = Chat(server, models)
        yield moves
        moves.close()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.services.turns.UNWATCHED_S", SOON_S)


def begin(chat: Chat, path: str = "/chat/stream", message: str = STALL, **choices: str) -> RawWatcher:
    """Return the first watcher of a turn that has said something."""
    body = {"session_id": "s", "message": message, **choices}
    first = RawWatcher(chat.server.port, "POST", path, body)
    turn_id = chat.until(lambda: chat.active().get("turn_id"))
    with chat.watch(turn_id, after=1) as response:
        assert Stream(response).next()["type"] == "text.delta"
    return first


def running(chat: Chat) -> str:
    return str(chat.active()["turn_id"])


def end_of(chat: Chat, turn_id: str) -> Json:
    """Wait until the turn has ended, without watching it, and return its terminal event."""
    chat.until(lambda: chat.active().get("code") == "NO_ACTIVE_TURN")
    with chat.watch(turn_id, after=1) as response:
        return Stream(response).rest()[-1]


def watch_for(lines: Iterator[str], seconds: float) -> None:
    """Hear a silent stream's heartbeats for so long."""
    end = time.monotonic() + seconds
    for line in lines:
        if line.startswith(":") and time.monotonic() > end:
            return
    raise AssertionError("the stream ended")


def test_a_turn_ends_two_seconds_after_its_last_watcher(chat: Chat) -> None:
    """With ``on_disconnect=cancel``, not before and not much later; the partial is kept as the new head."""
    first = begin(chat, on_disconnect="cancel")
    turn_id = running(chat)
    left_at = time.monotonic()
    first.leave("fin")
    end = end_of(chat, turn_id)
    assert 1.9 < time.monotonic() - left_at < 4
    assert (end["type"], end["reason"], end["partial_kept"], end["head"]) == (
        "turn.cancelled",
        "disconnect",
        True,
        turn_id,
    )
    answer = chat.client.get("/sessions/s/history").json()["messages"][1]
    assert (answer["content"], answer["interrupted"]) == ("partial", True)
    chat.until(lambda: chat.models.stats()["streaming"] == 0)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(("path", "how"), LEAVINGS)
def test_however_the_last_watcher_leaves_its_turn_ends(chat: Chat, path: str, how: str) -> None:
    """A close, a reset and a half-close end it, of a stream and of a plain chat; no task stays behind."""
    chat.say(session_id="other")
    tasks = count_tasks(chat)
    first = begin(chat, path, on_disconnect="cancel")
    turn_id = running(chat)
    first.leave(how)
    assert end_of(chat, turn_id)["reason"] == "disconnect"
    chat.until(lambda: count_tasks(chat) <= tasks)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("path", ["/chat/stream", "/chat"])
def test_an_attached_watcher_keeps_the_turn(chat: Chat, path: str) -> None:
    """The one who began it may leave; it ends when the last who attached has gone, whoever that is."""
    first = begin(chat, path, on_disconnect="cancel")
    turn_id = running(chat)
    with chat.watch(turn_id) as second, chat.watch(turn_id) as third:
        first.leave("rst")
        lines = second.iter_lines()
        watch_for(lines, 3 * SOON_S)
        third.close()
        watch_for(lines, 2 * SOON_S)
        assert running(chat) == turn_id
    assert end_of(chat, turn_id)["reason"] == "disconnect"


@pytest.mark.usefixtures("soon")
def test_who_comes_back_in_time_keeps_the_turn(chat: Chat) -> None:
    """Back within the time, and again: each departure starts it anew."""
    begin(chat, on_disconnect="cancel").leave("fin")
    turn_id = running(chat)
    for _ in range(3):
        with chat.watch(turn_id) as back:
            watch_for(back.iter_lines(), 2 * SOON_S)
            assert running(chat) == turn_id
    assert end_of(chat, turn_id)["reason"] == "disconnect"


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(("path", "how"), LEAVINGS)
@pytest.mark.parametrize("choices", [{}, {"on_disconnect": "continue"}], ids=["default", "continue"])
def test_by_default_a_turn_goes_on(chat: Chat, path: str, how: str, choices: Json) -> None:
    """Nobody watches, and it is finished and committed as any other."""
    message = says("all of it", chunks=9, delay_s=2 * SOON_S / 9)
    first = begin(chat, path, message, **choices)
    turn_id = running(chat)
    first.leave(how)
    end = end_of(chat, turn_id)
    assert (end["type"], end["reply"]) == ("turn.finished", "all of it")
    assert chat.client.get("/sessions/s").json()["head"] == turn_id


@pytest.mark.usefixtures("soon")
def test_a_turn_that_ended_in_time_is_not_cancelled(chat: Chat) -> None:
    """With ``on_disconnect=cancel`` a turn that is done before the time is over has won."""
    first = begin(chat, "/chat", says("quick", chunks=5, delay_s=0.02), on_disconnect="cancel")
    turn_id = running(chat)
    first.leave("fin")
    assert end_of(chat, turn_id)["type"] == "turn.finished"
    assert chat.say(says("next")).json()["turn_count"] == 2
