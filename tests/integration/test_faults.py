"""Everything that a model can do wrong, through the whole server: what clients, store and model see of it.

Each fault comes in a plain turn and in the model call after a tool has returned, for ``/chat``
and for ``/chat/stream``, with both clients. A session that had it is compared with a twin that
never did.
"""

import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest

from app.config import Settings
from app.runtime import Runtime
from tests.integration.test_http_chat import Stream, says
from tests.integration.test_http_server import HttpServer, Json, problem, serving
from tests.modelserver import ModelServer

CANARY = "sk-CANARY-4f1d0c2b9a8e7f60"
KINDS = ("lean", "stock")
FIRST_EVENT_S, IDLE_S, TURN_S, MAX_BYTES = 0.8, 0.6, 2.0, 1 << 20
SLACK_S = 1.5  # a busy machine, and what HTTP and the store take
CLOSED_WITHIN_S = 1.0
HELLO, AFTER = "Hello there", "And what did I say before?"


@dataclass(frozen=True)
class Fault:
    """What the model does, what clients are told, and after how long at most.

    ``patience_s``: a server that waits so long for a first event, for what is tried again.
    ``retry_after``: what the client is told.
    """

    step: Json
    code: str = "MODEL_ERROR"
    within_s: float = 0.0
    patience_s: float = FIRST_EVENT_S
    retry_after: int | None = None


STATUS = {"MODEL_ERROR": 502, "MODEL_UNAVAILABLE": 503, "MODEL_RATE_LIMITED": 429, "TURN_TIMEOUT": 504}
GONE = "MODEL_UNAVAILABLE"
PATIENT_S = 8.0
RETRIED_S = 0.75 + 1.5  # two pauses at their longest


def status(number: int, **more: Any) -> Json:
    return {"mode": "status", "status": number, **more}


FAULTS: dict[str, Fault] = {
    "headers never come": Fault({"mode": "never_headers"}, GONE, FIRST_EVENT_S),
    "stall first": Fault({"mode": "stall_first"}, GONE, FIRST_EVENT_S),
    "comments for ever": Fault({"mode": "stall_first", "comments": True}, GONE, FIRST_EVENT_S),
    "drip": Fault({"mode": "drip", "text": ""}, GONE, FIRST_EVENT_S),
    "stall in the middle": Fault({"mode": "stall_mid"}, GONE, IDLE_S),
    "comments in the middle": Fault({"mode": "stall_mid", "comments": True}, GONE, IDLE_S),
    "drip in the middle": Fault({"mode": "drip"}, GONE, IDLE_S),
    "words for ever": Fault({"mode": "endless"}, "TURN_TIMEOUT", TURN_S),
    "empty chunks for ever": Fault({"mode": "endless", "text": ""}, GONE, FIRST_EVENT_S),
    "closed unanswered": Fault({"mode": "drop"}, GONE),
    "closed unanswered, patient": Fault({"mode": "drop"}, GONE, RETRIED_S, PATIENT_S),
    "reset in the middle": Fault({"mode": "rst"}),
    "closed inside a chunk": Fault({"mode": "fin"}),
    "no reason, no DONE": Fault({"mode": "cut"}),
    "no reason": Fault({"mode": "text", "finish": None}),
    "empty choices": Fault({"mode": "empty_choices"}),
    "empty text": Fault({"mode": "empty_text"}),
    "filtered to nothing": Fault({"mode": "text", "text": "", "finish": "content_filter"}),
    "only reasoning": Fault({"mode": "reasoning", "text": ""}),
    "a web page": Fault({"mode": "html"}),
    "broken JSON": Fault({"mode": "bad_json"}),
    "an error event": Fault({"mode": "error_event"}),
    "an error event first": Fault({"mode": "error_event", "text": ""}),
    "one delta of 50 MB": Fault({"mode": "flood"}, within_s=1.0),
    "50 MB without a newline": Fault({"mode": "flood", "line": False, "text": ""}, within_s=1.0),
    "400 that echoes the key": Fault(status(400)),
    "401": Fault(status(401, code="invalid_api_key")),
    "404": Fault(status(404)),
    "a redirect": Fault({"mode": "redirect", "location": "/v1/chat/completions"}),
    "429 for long": Fault(status(429, retry_after=3600), "MODEL_RATE_LIMITED", retry_after=3600),
    "429 for longer than is waited": Fault(status(429, retry_after=1), "MODEL_RATE_LIMITED", retry_after=1),
    "429 for ever": Fault(status(429, retry_after=1), "MODEL_RATE_LIMITED", 3.0, PATIENT_S, retry_after=1),
    "500 for ever": Fault(status(500), GONE, RETRIED_S, PATIENT_S),
}
FINE = {"mode": "text", "text": "fine"}
GOOD: dict[str, tuple[Json, str, str]] = {
    "length": ({"mode": "text", "text": "cut sh", "finish": "length"}, "cut sh", "length"),
    "content_filter": ({"mode": "text", "text": "hm", "finish": "content_filter"}, "hm", "content_filter"),
    "500 twice": (status(500, times=2, next=FINE), "fine", "stop"),
    "429 for short": (status(429, retry_after=1, times=1, next=FINE), "fine", "stop"),
    "no DONE": ({"mode": "text", "text": "fine", "done": False}, "fine", "stop"),
    "never closed": ({"mode": "endless", "text": "fine", "finish": "stop"}, "fine", "stop"),
}
PHASES = ("plain", "tools")
PATHS = ("/chat", "/chat/stream")


async def clock() -> str:
    """Tell the time."""
    return "noon"


@dataclass
class Ended:
    """How a turn ended for its client; ``text``: everything that was answered on the way."""

    status: int
    body: Json
    text: str
    seconds: float
    turn_id: str


@dataclass
class World:
    """A server of one kind and patience, and the model behind it."""

    server: HttpServer
    models: ModelServer
    texts: list[str] = field(default_factory=list)

    def say(self, session_id: str, message: str, path: str = "/chat") -> Ended:
        """Carry out a turn; a stream's answer is its terminal event."""
        body = {"session_id": session_id, "message": message}
        begun = time.monotonic()
        client = self.server.client
        if path == "/chat":
            response = client.post(path, json=body)
            answer, text, number = response.json(), response.text, response.status_code
            if number != 200:
                problem(response, number, answer["code"])
                assert answer.get("retry_after_s", 0) == int(response.headers.get("retry-after", 0))
        else:
            with client.stream("POST", path, json=body) as response:
                assert response.status_code == 200
                events = Stream(response).rest()
            answer, text = events[-1], json.dumps(events)
            number = answer.get("status", 200)
            assert answer["type"] == ("turn.failed" if "status" in answer else "turn.finished")
        seconds = time.monotonic() - begun
        self.texts.append(text + repr(response.headers))
        return Ended(number, answer, text, seconds, response.headers["x-turn-id"])

    def get(self, path: str) -> Json:
        response = self.server.client.get(path)
        self.texts.append(response.text)
        document: Json = response.json()
        return document

    def sent_with(self, message: str) -> list[str]:
        """Return the bodies, byte by byte, of the model calls that asked ``message``."""
        pairs = zip(self.models.requests(), self.models.bodies(), strict=True)
        return [raw for body, raw in pairs if body["messages"][-1]["content"] == message]

    def wait_closed(self) -> None:
        """Return when no answer is being read any more, and no connection is left but idle ones."""
        give_up_at = time.monotonic() + CLOSED_WITHIN_S
        while (stats := self.models.stats())["streaming"] or stats["open"] > MOST_IDLE:
            assert time.monotonic() < give_up_at, stats


CASES = tuple(product(PHASES, PATHS))
MOST_IDLE = 4 * (len(CASES) + 1)  # four servers that each had so many turns at once


def start(kind: str, models: ModelServer, **settings: Any) -> HttpServer:
    values = {
        "store_url": "memory://",
        "model_provider": "openai",
        "openai_api_key": CANARY,
        "openai_base_url": models.base_url,
        "model_client": kind,
        "model_first_event_timeout_s": FIRST_EVENT_S,
        "model_idle_timeout_s": IDLE_S,
        "model_max_bytes": MAX_BYTES,
        "turn_timeout_s": TURN_S,
        **settings,
    }
    return HttpServer(serving(Runtime(Settings(**values), tools=[clock])))


@pytest.fixture(scope="module")
def model_server() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture(scope="module")
def servers(model_server: ModelServer) -> Iterator[dict[tuple[str, float], HttpServer]]:
    """All four: each kind, impatient and patient."""
    with (
        start("lean", model_server) as lean,
        start("stock", model_server) as stock,
        start("lean", model_server, model_first_event_timeout_s=PATIENT_S, turn_timeout_s=30) as patient,
        start(
            "stock", model_server, model_first_event_timeout_s=PATIENT_S, turn_timeout_s=30
        ) as patient_stock,
    ):
        started = {
            ("lean", FIRST_EVENT_S): lean,
            ("stock", FIRST_EVENT_S): stock,
            ("lean", PATIENT_S): patient,
            ("stock", PATIENT_S): patient_stock,
        }
        for server in started.values():  # the very first turn pays for what is made once
            server.client.post("/chat", json={"message": says(HELLO)})
        yield started


def directive(phase: str, step: Json, session: str = "") -> str:
    """Return a message that makes the model do ``step``, at once or when its tool has returned."""
    if phase == "tools":
        step = {"mode": "tools", "calls": [{"name": "clock", "arguments": "{}"}], "next": step}
    return f"{session}[[{json.dumps(step)}]]"


def in_parallel(calls: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [each.result() for each in [threads.submit(call) for call in calls]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault(
    servers: dict[tuple[str, float], HttpServer],
    model_server: ModelServer,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    name: str,
) -> None:
    """The right error in time, on record; no key anywhere; the session goes on as if it had not been."""
    fault = FAULTS[name]
    model_server.reset()
    caplog.set_level(logging.DEBUG)
    world = World(servers[kind, fault.patience_s], model_server)
    sessions = {case: f"{name.replace(' ', '-').replace(',', '')}-{i}" for i, case in enumerate(CASES)}
    twin = f"twin-{sessions[CASES[0]]}"
    in_parallel([lambda s=s: world.say(s, says(HELLO)) for s in (*sessions.values(), twin)])
    failed = in_parallel(
        [lambda s=s, c=c: world.say(s, directive(c[0], fault.step), c[1]) for c, s in sessions.items()]
    )
    world.wait_closed()
    for (phase, _), session, ended in zip(CASES, sessions.values(), failed, strict=True):
        check_failed(world, fault, session, ended, phase)
    activations = in_parallel(
        [lambda s=s: world.say(s, AFTER).body["activation"] for s in (*sessions.values(), twin)]
    )
    assert activations == ["restored"] * len(CASES) + ["warm"]
    sent = world.sent_with(AFTER)
    assert sent == [sent[0]] * (len(CASES) + 1)
    stats = world.get("/agent-stats")
    assert (stats["active_agents"], stats["zombie_agents"]) == (0, 0)
    for told in (*world.texts, caplog.text):
        assert CANARY not in told
        assert "echoed" not in told  # a word of the provider's own texts
        assert "you sent" not in told


def check_failed(world: World, fault: Fault, session: str, ended: Ended, phase: str) -> None:
    """Check what the client was told, how soon, and what is on record."""
    assert (ended.body["code"], ended.status) == (fault.code, STATUS[fault.code])
    assert ended.seconds < fault.within_s + SLACK_S
    if fault.retry_after is not None:
        assert ended.body["retry_after_s"] == fault.retry_after
    turns = world.get(f"/sessions/{session}/turns")["turns"]
    assert [turn["status"] for turn in turns] == ["failed", "finished"]
    assert turns[0]["turn_id"] == ended.turn_id
    assert turns[0]["error"]["code"] == fault.code
    assert not turns[0]["on_branch"]
    record = world.get(f"/sessions/{session}")
    assert (record["head"], record["message_count"]) == (turns[1]["turn_id"], 2)
    assert len(world.get(f"/sessions/{session}/history")["messages"]) == 2
    text = world.server.client.get(f"/sessions/{session}/turns/{ended.turn_id}/stream").text
    world.texts.append(text)
    assert '"turn.failed"' in text
    assert ('"tool.returned"' in text) == (phase == "tools")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GOOD)
def test_what_looks_like_a_fault_and_is_none(
    servers: dict[tuple[str, float], HttpServer], model_server: ModelServer, kind: str, name: str
) -> None:
    """A short or filtered answer, a first attempt that fails, a missing good-bye: good turns, and kept."""
    step, reply, reason = GOOD[name]
    model_server.reset()
    world = World(servers[kind, PATIENT_S], model_server)
    sessions = {case: f"good-{name.replace(' ', '-')}-{i}" for i, case in enumerate(CASES)}
    ended = in_parallel(
        [lambda s=s, c=c: world.say(s, directive(c[0], step, s), c[1]) for c, s in sessions.items()]
    )
    world.wait_closed()
    for (phase, _), session, end in zip(CASES, sessions.values(), ended, strict=True):
        assert (end.status, end.body["reply"], end.body["finish_reason"]) == (200, reply, reason)
        assert world.say(session, f"{AFTER} {session}").body["activation"] == "warm"
        (sent,) = world.sent_with(f"{AFTER} {session}")
        messages = json.loads(sent)["messages"]
        roles = ["system", "user", *(["assistant", "tool"] if phase == "tools" else []), "assistant", "user"]
        assert [message["role"] for message in messages] == roles
        assert messages[-2] == {"role": "assistant", "content": reply}


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_listens(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A refused connection, from the start or after a tool, and the session goes on when it is back."""
    caplog.set_level(logging.DEBUG)
    models = ModelServer().start()

    async def unplug() -> str:
        """End the model."""
        models.stop()
        return "unplugged"

    settings = {"store_url": "memory://", "model_provider": "openai", "openai_api_key": CANARY}
    settings |= {"openai_base_url": models.base_url, "model_client": kind, "model_first_event_timeout_s": 0.5}
    unplugging = {"mode": "tools", "calls": [{"name": "unplug", "arguments": "{}"}]}
    with HttpServer(serving(Runtime(Settings(**settings), tools=[unplug]))) as server:
        world = World(server, models)
        for session in ("twin", *map(str, range(len(CASES)))):
            world.say(session, says(HELLO))
        for session, (phase, path) in enumerate(CASES):
            if phase == "plain":
                models.stop()
            ended = world.say(str(session), f"[[{json.dumps(unplugging)}]]", path)
            check_failed(world, Fault({}, GONE), str(session), ended, phase)
            models.start()
        for session in ("twin", *map(str, range(len(CASES)))):
            world.say(session, AFTER)
        sent = world.sent_with(AFTER)
        assert sent == [sent[0]] * (len(CASES) + 1)
    models.stop()
    assert CANARY not in "".join(world.texts) + caplog.text
