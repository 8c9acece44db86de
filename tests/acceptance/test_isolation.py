"""Every operation there is, as its owner, as somebody else, as nobody and as an admin; on every store.

The walk goes over the OpenAPI schema: a new operation has to be entered in ``WAYS`` first.
What another user asks of a session that is there is answered, byte for byte, as what they ask of one
that is not, but for what differs anyway: the session's id, the times, and ids that are made anew.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.integration.test_http_server import HttpServer, problem
from tests.modelserver import ModelServer
from tests.people import bearer, make_keys
from tests.storeserver import STORES, open_store_server

Json = dict[str, Any]
ABSENT_USER = "carol"
STUCK = '[[{"mode": "stall_mid", "text": "begun", "comments": true}]]'
REQUEST_ID = "00000000-fixed"
NEVER = "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"


@dataclass(frozen=True)
class Way:
    """How an operation is asked: of what, and with which body, in which ``$S`` is a session's id."""

    of: str  # open, everybody, session, user, admin, body
    body: Any = None
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)


SESSION, USER, ADMIN = Way("session"), Way("user"), Way("admin")
WAYS: dict[str, Way] = {
    "GET /health": Way("open"),
    "GET /ready": Way("open"),
    "GET /agents": Way("everybody"),
    "GET /models": Way("everybody"),
    "GET /apps/{app_name}/state": Way("everybody"),
    "POST /chat": Way("body", {"session_id": "$S", "message": "hello"}),
    "POST /chat/stream": Way("body", {"session_id": "$S", "message": "hello"}),
    "POST /sessions": Way("body", {"session_id": "$S", "title": "t"}),
    "POST /sessions/resume": Way("body", {"user_id": "$U"}),
    "POST /sessions/batch": Way("body", {"sessions": [{"session_id": "$S"}, {"title": "t"}]}),
    "POST /sessions/batch-delete": Way("body", {"session_ids": ["$S"]}),
    "GET /sessions": Way("body", query="q=$S"),
    "GET /sessions/{session_id}": SESSION,
    "HEAD /sessions/{session_id}": SESSION,
    "PATCH /sessions/{session_id}": Way("session", {"title": "changed", "metadata": {"a": 1}}),
    "DELETE /sessions/{session_id}": SESSION,
    "POST /sessions/{session_id}/refresh": SESSION,
    "POST /sessions/{session_id}/cancel": SESSION,
    "POST /sessions/{session_id}/compact": SESSION,
    "POST /sessions/{session_id}/fork": SESSION,
    "POST /sessions/{session_id}/regenerate": SESSION,
    "POST /sessions/{session_id}/rewind": Way("session", {"turns": 1}),
    "GET /sessions/{session_id}/history": SESSION,
    "GET /sessions/{session_id}/events": SESSION,
    "GET /sessions/{session_id}/state": SESSION,
    "PATCH /sessions/{session_id}/state": Way("session", {"state": {"a": 1}}),
    "GET /sessions/{session_id}/turns": SESSION,
    "GET /sessions/{session_id}/turns/active": SESSION,
    "GET /sessions/{session_id}/turns/{turn_id}": SESSION,
    "GET /sessions/{session_id}/turns/{turn_id}/stream": Way("session", headers={"Last-Event-ID": "$T:1"}),
    "GET /sessions/{session_id}/checkpoints": SESSION,
    "POST /sessions/{session_id}/checkpoints": Way("session", {"label": "here"}),
    "DELETE /sessions/{session_id}/checkpoints": SESSION,
    "GET /sessions/{session_id}/checkpoints/latest": SESSION,
    "GET /sessions/{session_id}/checkpoints/{checkpoint_id}": SESSION,
    "DELETE /sessions/{session_id}/checkpoints/{checkpoint_id}": SESSION,
    "POST /sessions/{session_id}/checkpoints/{checkpoint_id}/restore": SESSION,
    "GET /users/{user_id}/sessions": USER,
    "DELETE /users/{user_id}/sessions": USER,
    "GET /users/{user_id}/usage": USER,
    "GET /users/{user_id}/export": USER,
    "DELETE /users/{user_id}": USER,
    "GET /users/{user_id}/state": USER,
    "PATCH /users/{user_id}/state": Way("user", {"state": {"a": 1}}),
    "GET /sessions/stats": ADMIN,
    "DELETE /agents/{agent_id}/sessions": ADMIN,
    "PATCH /apps/{app_name}/state": Way("admin", {"state": {"a": 1}}),
    "GET /agent-stats": ADMIN,
    "GET /agent-nodes": ADMIN,
    "GET /agent-sessions": ADMIN,
    "DELETE /agent-sessions/{session_id}": Way("admin", query="user_id=alice"),
    "POST /agent-cleanup": ADMIN,
    "GET /agent-health": ADMIN,
}
CLOSED = [operation for operation, way in WAYS.items() if way.of != "open"]


def operations_of(*kinds: str) -> list[str]:
    return [operation for operation, way in WAYS.items() if way.of in kinds]


@dataclass(frozen=True)
class Target:
    """What the placeholders of a request stand for."""

    session_id: str
    turn_id: str = NEVER
    checkpoint_id: str = NEVER
    user_id: str = "alice"

    def fill(self, text: str) -> str:
        values = {"$S": self.session_id, "$T": self.turn_id, "$U": self.user_id}
        values |= {f"{{{name}}}": getattr(self, name) for name in ("session_id", "turn_id", "checkpoint_id")}
        values |= {"{user_id}": self.user_id, "{agent_id}": "assistant", "{app_name}": "default"}
        for name, value in values.items():
            text = text.replace(name, value)
        return text


class World:
    """A server with three users, of whom ``alice`` has sessions."""

    def __init__(self, server: HttpServer, keys: dict[str, str]) -> None:
        self.client = server.client
        self.keys = keys
        self._numbers = count(1000)

    def ask(
        self, who: str | None, operation: str, target: Target, query: str = "", **changes: Any
    ) -> httpx2.Response:
        """Send the operation's request as ``who``; ``changes`` are made to its body."""
        way = WAYS[operation]
        method, path = operation.split(" ")
        headers = {"X-Request-ID": REQUEST_ID} | {k: target.fill(v) for k, v in way.headers.items()}
        if who is not None:
            headers |= bearer(self.keys[who])
        body = None if way.body is None else json.loads(target.fill(json.dumps(way.body)))
        whole = "&".join(part for part in (target.fill(way.query), query) if part)
        url = target.fill(path) + (f"?{whole}" if whole else "")
        json_body = {} if body is None and changes else body
        return self.client.request(
            method, url, headers=headers, json=None if json_body is None else json_body | changes
        )

    def make(self) -> Target:
        """Return a session of alice's, with a turn and a checkpoint."""
        session_id = f"e{next(self._numbers)}"
        mine = bearer(self.keys["alice"])
        turn = self.client.post("/chat", json={"session_id": session_id, "message": "one"}, headers=mine)
        made = self.client.post(f"/sessions/{session_id}/checkpoints", json={}, headers=mine)
        return Target(session_id, turn.json()["turn_id"], made.json()["checkpoint_id"])

    def absent(self, like: Target) -> Target:
        """Return a session that nobody has, otherwise named as ``like``."""
        return Target("m" + like.session_id[1:], like.turn_id, like.checkpoint_id)


@pytest.fixture(scope="module", params=["memory", "sqlite", *STORES])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder: Path = tmp_path_factory.mktemp("world")
    path, keys = make_keys(folder)
    urls = {"memory": "memory://", "sqlite": f"sqlite:///{folder / 'pool.db'}"}
    with ExitStack() as stack:
        url = urls.get(request.param) or stack.enter_context(open_store_server(request.param)).url
        settings: Json = {"auth_mode": "api_key", "api_keys_file": path, "store_url": url}
        yield World(stack.enter_context(HttpServer(**settings, accept_volatile=True)), keys)


def seen(response: httpx2.Response, *names: str) -> tuple[int, Any, str]:
    """Return all of a response that could tell anything, without what differs anyway."""
    headers = {k: v for k, v in response.headers.items() if k != "date"}
    if response.status_code < 400:
        headers.pop("content-length", None)  # how long something took has one digit or two
    return response.status_code, bare(json.dumps(headers), *names), bare(response.text, *names)


def bare(text: str, *names: str) -> str:
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "$UUID", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "$TIME", text)
    for name in names:  # last: a short one may be part of an id
        text = text.replace(name, "$NAME")
    return re.sub(r'("\w+_(?:ms|s)":)[\d.]+', r"\1$N", text)


def code_of(response: httpx2.Response) -> str | None:
    is_problem = response.headers.get("content-type") == "application/problem+json"
    return response.json()["code"] if is_problem and response.content else None


def test_every_operation_is_walked(world: World) -> None:
    """A route that nobody has said who may use is a failure here."""
    paths = world.client.get("/openapi.json").json()["paths"]
    there = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert there | {"HEAD /sessions/{session_id}"} == set(WAYS)


@pytest.mark.parametrize("operation", CLOSED)
def test_nobody_gets_in_without_a_credential(world: World, operation: str) -> None:
    """401 for everything, the same whether it exists, and with nothing done."""
    there = world.make()
    answers = [world.ask(None, operation, target) for target in (there, world.absent(there))]
    for response in answers:
        if not operation.startswith("HEAD"):
            problem(response, 401, "UNAUTHENTICATED")
        assert response.headers["www-authenticate"] == 'Bearer realm="agentpool"'
    first, second = (
        seen(r, t.session_id) for r, t in zip(answers, (there, world.absent(there)), strict=True)
    )
    assert first == second


@pytest.mark.parametrize("operation", operations_of("session"))
def test_anothers_session_is_as_one_that_is_not_there(world: World, operation: str) -> None:
    """By id; with the owner named; with the name of a user who does not exist."""
    there = world.make()
    absent = world.absent(there)
    first, second = (world.ask("bobby", operation, target) for target in (there, absent))
    assert first.status_code == 404
    if not operation.startswith("HEAD"):
        assert code_of(first) == "SESSION_NOT_FOUND"
    assert seen(first, there.session_id) == seen(second, absent.session_id)
    refused = [
        seen(world.ask("bobby", operation, target, f"user_id={user}"), target.session_id)
        for target in (there, absent)
        for user in ("alice", ABSENT_USER)
    ]
    assert refused[0][0] == 403
    assert refused == [refused[0]] * 4
    assert world.ask("alice", "GET /sessions/{session_id}", there).json()["title"] == "one"


@pytest.mark.parametrize("operation", operations_of("session"))
def test_owner_and_admin_reach_the_session(world: World, operation: str) -> None:
    """The owner with or without naming themselves, an admin by naming the owner, and only so."""
    answers = [
        world.ask("alice", operation, world.make()),
        world.ask("alice", operation, world.make(), "user_id=alice"),
        world.ask("chief", operation, world.make(), "user_id=alice"),
    ]
    assert len({response.status_code for response in answers}) == 1
    assert answers[0].status_code < 300 or code_of(answers[0]) == "NO_ACTIVE_TURN", answers[0].text
    assert world.ask("chief", operation, world.make()).status_code == 404


@pytest.mark.parametrize("operation", operations_of("user"))
def test_a_user_reaches_only_themselves(world: World, operation: str) -> None:
    """403 for another, the same whether that user exists; an admin reaches everybody."""
    world.make()
    for who in ("alice", "chief"):
        assert world.ask(who, operation, Target("s")).status_code == 200
    refused = [
        world.ask("bobby", operation, Target("s", user_id=user)) for user in ("alice", ABSENT_USER, "chief")
    ]
    problem(refused[0], 403, "FORBIDDEN")
    names = ("alice", ABSENT_USER, "chief")
    assert len({seen(response, name) for response, name in zip(refused, names, strict=True)}) == 1


@pytest.mark.parametrize("operation", operations_of("admin"))
def test_admin_routes_are_for_admins(world: World, operation: str) -> None:
    """Users get 403, the same whatever they name; admins get in."""
    there = world.make()
    absent = world.absent(there)
    for who in ("alice", "bobby"):
        refused = [world.ask(who, operation, target) for target in (there, absent)]
        problem(refused[0], 403, "FORBIDDEN")
        assert seen(refused[0], there.session_id) == seen(refused[1], absent.session_id)
    assert world.ask("chief", operation, there).status_code == 200


@pytest.mark.parametrize("operation", operations_of("body"))
def test_ids_in_a_body_are_the_callers_own(world: World, operation: str) -> None:
    """Another user's id is a free one, and what is made or deleted by it is the caller's own."""
    there = world.make()
    if WAYS[operation].body == {"user_id": "$U"}:
        target = Target(there.session_id, user_id="bobby")
        assert world.ask("bobby", operation, target).json()["user_id"] == "bobby"
        return
    absent = world.absent(there)
    first, second = (world.ask("bobby", operation, target) for target in (there, absent))
    assert first.status_code < 300
    assert seen(first, there.session_id) == seen(second, absent.session_id)
    mine = world.ask("alice", "GET /sessions/{session_id}", there).json()
    assert (mine["user_id"], mine["title"], mine["turn_count"]) == ("alice", "one", 1)


@pytest.mark.parametrize("operation", operations_of("body"))
def test_a_body_names_another_user_for_admins_only(world: World, operation: str) -> None:
    """403, the same whether that user exists or has the session; an admin acts for them."""
    there = world.make()
    in_query = operation in ("GET /sessions", "POST /sessions/batch-delete")

    def ask(who: str, target: Target, user: str) -> httpx2.Response:
        target = Target(target.session_id, user_id=user)
        if in_query:
            return world.ask(who, operation, target, f"user_id={user}")
        if operation == "POST /sessions/batch":
            entry = {"session_id": target.session_id, "user_id": user}
            return world.ask(who, operation, target, sessions=[entry])
        return world.ask(who, operation, target, user_id=user)

    absent = world.absent(there)
    refused = [
        seen(ask("bobby", target, user), target.session_id)
        for target in (there, absent)
        for user in ("alice", ABSENT_USER)
    ]
    assert refused == [refused[0]] * 4
    if operation == "POST /sessions/batch":
        assert json.loads(refused[0][2])["results"][0]["error"]["code"] == "FORBIDDEN"
    else:
        assert refused[0][0] == 403
    done = ask("chief", absent, "alice")
    assert done.status_code < 300, done.text
    if operation in ("POST /chat", "POST /sessions"):
        made = world.ask("alice", "GET /sessions/{session_id}", absent)
        assert made.json()["user_id"] == "alice"


@pytest.mark.parametrize("operation", operations_of("everybody"))
def test_what_is_for_everybody_with_a_credential(world: World, operation: str) -> None:
    """The same for users and admins."""
    answers = {seen(world.ask(who, operation, Target("s"))) for who in ("alice", "bobby", "chief")}
    assert len(answers) == 1
    assert next(iter(answers))[0] == 200


def test_lists_show_the_callers_own(world: World) -> None:
    """A user's list, search and total are their own; an admin's are everybody's, or one user's."""
    there = world.make()

    def listed(who: str, query: str = "") -> Json:
        response = world.client.get(f"/sessions?limit=200&{query}", headers=bearer(world.keys[who]))
        assert response.status_code == 200
        answer: Json = response.json()
        return answer

    assert {one["user_id"] for one in listed("alice")["sessions"]} == {"alice"}
    assert there.session_id not in {one["session_id"] for one in listed("bobby")["sessions"]}
    assert listed("bobby", f"q={there.session_id}")["sessions"] == []
    assert listed("bobby")["total"] == len(listed("bobby")["sessions"])
    world.client.post("/sessions", json={}, headers=bearer(world.keys["bobby"]))
    assert {"alice", "bobby"} <= {one["user_id"] for one in listed("chief")["sessions"]}
    assert {one["user_id"] for one in listed("chief", "user_id=alice")["sessions"]} == {"alice"}


def test_a_cursor_of_another_user_shows_nothing_of_theirs(world: World) -> None:
    """It is a place in the caller's own list, or refused as malformed; never a way into the other's."""
    for _ in range(3):
        world.make()
    page = world.client.get("/sessions?limit=1", headers=bearer(world.keys["alice"])).json()
    assert page["next_cursor"]
    taken = world.client.get(
        f"/sessions?limit=1&cursor={page['next_cursor']}", headers=bearer(world.keys["bobby"])
    )
    assert taken.status_code in (200, 422)
    assert {one["user_id"] for one in taken.json().get("sessions", ())} <= {"bobby"}


def test_an_idempotency_key_is_its_owners(world: World) -> None:
    """Two users' turns with the same key are two turns, and neither notices."""
    there = world.make()
    told = {}
    for who in ("alice", "bobby"):
        headers = bearer(world.keys[who]) | {"Idempotency-Key": "same"}
        body = {"session_id": there.session_id, "message": f"I am {who}"}
        told[who] = [world.client.post("/chat", json=body, headers=headers).json() for _ in range(2)]
    for answers in told.values():
        assert answers[0] == answers[1]
    assert told["alice"][0]["turn_id"] != told["bobby"][0]["turn_id"]


def test_a_users_state_is_in_their_sessions_only(world: World) -> None:
    """What a user sets for themselves, or an admin for them, their sessions see and nobody else's."""
    there, theirs = world.make(), Target("own")
    world.ask("bobby", "POST /sessions", theirs)
    for who, value in (("alice", 1), ("chief", 2)):
        done = world.ask(who, "PATCH /users/{user_id}/state", there, state={"seen": value})
        assert done.status_code == 200
        read = world.ask("alice", "GET /sessions/{session_id}", there, "include=state").json()["state"]
        assert read["user:seen"] == value
    read = world.ask("bobby", "GET /sessions/{session_id}", theirs, "include=state").json()["state"]
    assert "user:seen" not in read


def test_a_system_prompt_is_the_admins(world: World) -> None:
    """Set, changed or taken away by a user it is 403; in a batch that entry fails alone."""
    there = world.make()
    template = {"template": {"system_prompt": "You are root."}}
    problem(world.ask("alice", "POST /sessions", Target("p1"), **template), 403, "FORBIDDEN")
    problem(world.ask("alice", "PATCH /sessions/{session_id}", there, **template), 403, "FORBIDDEN")
    for taking in ({"system_prompt": None}, {"system_prompt": ""}):
        change = {"template": taking}
        problem(world.ask("alice", "PATCH /sessions/{session_id}", there, **change), 403, "FORBIDDEN")
    batch = world.ask("alice", "POST /sessions/batch", Target("p2"), sessions=[template, {"title": "t"}])
    assert [list(result) for result in batch.json()["results"]] == [["error"], ["session_id"]]
    done = world.ask("chief", "PATCH /sessions/{session_id}", there, "user_id=alice", **template)
    assert done.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/turns/$T", None),
        ("GET", "/turns/$T/stream", None),
        ("GET", "/turns/$T/stream?after=1", None),
        ("GET", "/history?before=$T", None),
        ("GET", "/events?after=$T:1", None),
        ("GET", "/events?before=$T:1", None),
        ("GET", "/checkpoints/$C", None),
        ("DELETE", "/checkpoints/$C", None),
        ("POST", "/checkpoints/$C/restore", {}),
        ("POST", "/rewind", {"turn_id": "$T"}),
        ("POST", "/fork", {"turn_id": "$T"}),
        ("POST", "/fork", {"checkpoint_id": "$C"}),
        ("POST", "/cancel", {"turn_id": "$T"}),
        ("POST", "", {"message": "hi", "parent": "$T"}),
    ],
)
def test_anothers_turns_cannot_be_named(world: World, method: str, path: str, body: Any) -> None:
    """Not even from a session of one's own with the same id: they are as turns that never were."""
    theirs = world.make()
    mine = bearer(world.keys["bobby"]) | {"X-Request-ID": REQUEST_ID}
    made = {"session_id": theirs.session_id, "message": "mine"}
    assert world.client.post("/chat", json=made, headers=mine).status_code == 200
    answers = []
    for turn_id, checkpoint_id in ((theirs.turn_id, theirs.checkpoint_id), (NEVER, NEVER)):
        text = path.replace("$T", turn_id).replace("$C", checkpoint_id)
        url = f"/sessions/{theirs.session_id}{text}" if path else "/chat"
        filled = json.loads(json.dumps(body).replace("$T", turn_id).replace("$C", checkpoint_id))
        if not path:
            filled["session_id"] = theirs.session_id
        answers.append(world.client.request(method, url, json=filled, headers=mine))
    assert code_of(answers[0]) in ("TURN_NOT_FOUND", "CHECKPOINT_NOT_FOUND"), answers[0].text
    assert seen(answers[0], theirs.turn_id, theirs.checkpoint_id) == seen(answers[1], NEVER)


def test_a_running_turn_is_nobody_elses(tmp_path: Path) -> None:
    """Who is not its owner can neither see, watch, attach to nor cancel it; it runs on."""
    path, keys = make_keys(tmp_path)
    settings: Json = {"model_provider": "openai", "openai_api_key": "k", "auth_mode": "api_key"}
    with (
        ModelServer() as model,
        HttpServer(**settings, openai_base_url=model.base_url, api_keys_file=path) as server,
    ):
        world = World(server, keys)
        mine = bearer(keys["alice"]) | {"Idempotency-Key": "k"}
        body = {"session_id": "e1", "message": STUCK}
        with server.client.stream("POST", "/chat/stream", json=body, headers=mine) as running:
            there = Target("e1", running.headers["x-turn-id"])
            for operation in operations_of("session"):
                if "checkpoint" in operation:
                    continue
                first, second = (world.ask("bobby", operation, t) for t in (there, world.absent(there)))
                assert first.status_code == 404, operation
                assert seen(first, "e1") == seen(second, "m1"), operation
            active = world.ask("alice", "GET /sessions/{session_id}/turns/active", there)
            assert active.json()["turn_id"] == there.turn_id
            assert world.ask("alice", "POST /sessions/{session_id}/cancel", there).status_code == 202
