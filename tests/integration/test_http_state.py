"""State over HTTP: of sessions, users and applications; templates; statistics."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from tests.integration.test_http_chat import Chat
from tests.integration.test_http_server import HttpServer, Json, problem
from tests.integration.test_http_sessions import FIELDS
from tests.modelserver import ModelServer

SCOPES = ["/apps/default/state", "/users/alice/state", "/sessions/s/state"]


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with HttpServer() as server:
        server.client.post("/sessions", json={"session_id": "s", "user_id": "alice"})
        yield server.client


def change(client: httpx2.Client, path: str, patch: object, tag: str | None = None) -> httpx2.Response:
    headers = {} if tag is None else {"If-Match": tag}
    return client.patch(path, json={"state": patch}, headers=headers)


@pytest.mark.parametrize("path", SCOPES)
def test_a_state_is_merged(client: httpx2.Client, path: str) -> None:
    """Empty at first; keys are set, merged inside, taken away by null; reading says the same."""
    assert client.get(path).json() == {"state": {}}
    assert change(client, path, {"a": 1, "b": {"c": 2, "d": [3]}}).json() == {
        "state": {"a": 1, "b": {"c": 2, "d": [3]}}
    }
    response = change(client, path, {"a": None, "b": {"c": None, "e": "你好"}, "none": None})
    assert response.json() == {"state": {"b": {"d": [3], "e": "你好"}}}
    read = client.get(path)
    assert read.json() == response.json()
    assert read.headers["etag"] == response.headers["etag"]


@pytest.mark.parametrize("path", SCOPES)
def test_a_states_tag(client: httpx2.Client, path: str) -> None:
    """``"<rev>"``: it moves with a change; another one, a weak one or no revision is 412, two are 422."""
    assert client.get(path).headers["etag"] == '"0"'
    assert change(client, path, {"n": 1}, '"0"').headers["etag"] == '"1"'
    for tag in ('"0"', 'W/"1"', '"01"', '"x"', '"-1"', '"1.1"', '"\u00b2"', '""'):
        headers = {"If-Match": tag.encode("latin-1")}
        refused = client.patch(path, json={"state": {"n": 9}}, headers=headers)
        problem(refused, 412, "PRECONDITION_FAILED")
    problem(change(client, path, {"n": 9}, '"1", "2"'), 422, "VALIDATION_ERROR")
    assert client.get(path).json() == {"state": {"n": 1}}
    assert change(client, path, {"n": 2}, "*").headers["etag"] == '"2"'
    assert change(client, path, {"n": 3}).json() == {"state": {"n": 3}}


@pytest.mark.parametrize("path", SCOPES)
def test_secrets_are_not_stored_in_states(client: httpx2.Client, path: str) -> None:
    """At every depth; null still takes the key away."""
    patched = change(client, path, {"login": {"password": "p", "name": "n"}, "api_key": "k"})
    assert patched.json()["state"] == {
        "login": {"password": "[redacted]", "name": "n"},
        "api_key": "[redacted]",
    }
    assert change(client, path, {"login": {"password": None}, "api_key": None}).json() == {
        "state": {"login": {"name": "n"}}
    }


def test_redaction_can_be_switched_off() -> None:
    """With ``REDACT_KEYS=false`` states, checkpoints, forks and templates keep what they are given."""
    with HttpServer(redact_keys=False) as server:
        client = server.client
        client.post("/sessions", json={"session_id": "s", "state": {"token": "t"}})
        assert client.get("/sessions/s/state").json() == {"state": {"token": "t"}}
        assert change(client, "/apps/a/state", {"token": "t"}).json() == {"state": {"token": "t"}}
        made = client.post("/sessions/s/checkpoints", json={"data": {"token": "t"}}).json()
        assert made["data"] == {"token": "t"}
        fork = client.post("/sessions/s/fork", json={"metadata": {"token": "t"}}).json()
        assert fork["metadata"] == {"token": "t"}


@pytest.mark.parametrize("path", SCOPES)
@pytest.mark.parametrize("prefix", ["temp:", "app:", "user:"])
def test_reserved_keys(client: httpx2.Client, path: str, prefix: str) -> None:
    """Refused with the path of the key, also to take one away; nothing of the patch happens."""
    for value in (1, None):
        refused = change(client, path, {"fine": 1, prefix + "x": value})
        document = problem(refused, 422, "VALIDATION_ERROR")
        assert [error["field"] for error in document["errors"]] == [f"state.{prefix}x"]
    assert client.get(path).json() == {"state": {}}
    assert change(client, path, {"a": {prefix + "x": 1}, "temporary": 1}).status_code == 200


def nested(depth: int) -> Json:
    value: Json = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize("path", SCOPES)
def test_a_states_limits(client: httpx2.Client, path: str) -> None:
    """A patch over a limit is refused, with the path of what is too deep; the limits themselves pass."""
    for patch, field in (
        ({"a": "x" * 65_530}, "state"),
        ({str(n): n for n in range(1001)}, "state"),
        (nested(33), "state" + ".a" * 32),
    ):
        document = problem(change(client, path, patch), 422, "VALIDATION_ERROR")
        assert [error["field"] for error in document["errors"]] == [field]
    nan = client.patch(path, content=b'{"state":{"a":NaN}}', headers={"Content-Type": "application/json"})
    problem(nan, 400, "MALFORMED_JSON")
    assert client.get(path).headers["etag"] == '"0"'
    for patch in (nested(32), {"a": "x" * (65_536 - len('{"a":""}'))}, {str(n): n for n in range(1000)}):
        change(client, path, dict.fromkeys(client.get(path).json()["state"]))
        assert change(client, path, patch).json() == {"state": patch}


@pytest.mark.parametrize("path", SCOPES)
def test_what_comes_of_a_patch_has_limits(client: httpx2.Client, path: str) -> None:
    """Two patches that fit alone and not together: the second is refused and changes nothing."""
    first = change(client, path, {"a": "x" * 40_000})
    document = problem(change(client, path, {"b": "y" * 40_000}), 422, "VALIDATION_ERROR")
    assert document["errors"][0]["field"] == "state"
    assert client.get(path).json() == first.json()
    assert client.get(path).headers["etag"] == first.headers["etag"]


@pytest.mark.parametrize("path", SCOPES)
@pytest.mark.parametrize(
    "body", [None, [], {}, {"state": None}, {"state": []}, {"state": {}, "x": 1}, {"a": 1}]
)
def test_bodies_that_are_no_change(client: httpx2.Client, path: str, body: object) -> None:
    """Only ``{"state": {…}}`` is a change."""
    problem(client.patch(path, json=body), 422, "VALIDATION_ERROR")


def test_users_and_applications_are_told_apart(client: httpx2.Client) -> None:
    """A user has a state in each application; left out, it is the server's own."""
    change(client, "/users/alice/state", {"in": "default"})
    change(client, "/users/alice/state?app_name=shop", {"in": "shop"})
    change(client, "/apps/shop/state", {"in": "app"})
    assert client.get("/users/alice/state?app_name=default").json() == {"state": {"in": "default"}}
    assert client.get("/users/alice/state?app_name=shop").json() == {"state": {"in": "shop"}}
    assert client.get("/users/bob/state?app_name=shop").json() == {"state": {}}
    assert client.get("/apps/default/state").json() == {"state": {}}
    with HttpServer(app_name="shop") as server:
        change(server.client, "/users/alice/state", {"in": "shop"})
        read = server.client.get("/users/alice/state?app_name=shop").json()
    assert read == {"state": {"in": "shop"}}


def test_a_state_outlives_its_sessions(client: httpx2.Client) -> None:
    """That of the user and the application; the session's goes with it."""
    for path in SCOPES:
        change(client, path, {"kept": True})
    client.delete("/sessions/s")
    client.post("/sessions", json={"session_id": "s", "user_id": "alice"})
    assert [client.get(path).json()["state"] for path in SCOPES] == [{"kept": True}, {"kept": True}, {}]


def test_all_three_in_one(client: httpx2.Client) -> None:
    """``include=state`` adds the merged view, with the session's own tag; nothing else is known."""
    for path in SCOPES:
        change(client, path, {"at": path})
    response = client.get("/sessions/s?include=state")
    session = response.json()
    assert list(session) == [*FIELDS, "state"]
    assert session["state"] == {"app:at": SCOPES[0], "user:at": SCOPES[1], "at": SCOPES[2]}
    plain = client.get("/sessions/s")
    assert (response.headers["etag"], plain.headers["etag"]) == ('"0.2"', '"0.2"')
    assert list(plain.json()) == FIELDS
    assert client.head("/sessions/s?include=state").status_code == 200
    for query in ("include=", "include=metadata", "include=state&include=state"):
        problem(client.get(f"/sessions/s?{query}"), 422, "VALIDATION_ERROR")
    problem(client.get("/sessions/s?include=state&user_id=bob"), 404, "SESSION_NOT_FOUND")


def test_an_initial_state(client: httpx2.Client) -> None:
    """It is there at once, in batches too; rules and redaction are those of a change."""
    client.post("/sessions", json={"session_id": "t", "state": {"a": 1, "token": "t"}})
    assert client.get("/sessions/t/state").json() == {"state": {"a": 1, "token": "[redacted]"}}
    client.post("/sessions/batch", json={"sessions": [{"session_id": "b", "state": {"b": 2}}]})
    assert client.get("/sessions/b/state").json() == {"state": {"b": 2}}
    document = problem(client.post("/sessions", json={"state": {"app:x": 1}}), 422, "VALIDATION_ERROR")
    assert document["errors"][0]["field"] == "state.app:x"
    batch = client.post("/sessions/batch", json={"sessions": [{}, {"state": {"user:x": 1}}]})
    good, bad = batch.json()["results"]
    assert good["session_id"]
    assert bad["error"]["errors"][0]["field"] == "state.user:x"


def test_counting_together(client: httpx2.Client) -> None:
    """Increments through ``If-Match`` and retries: none is lost."""

    def count(_: int) -> None:
        while True:
            read = client.get("/apps/default/state")
            n = read.json()["state"].get("n", 0)
            if change(client, "/apps/default/state", {"n": n + 1}, read.headers["etag"]).status_code == 200:
                return

    with ThreadPoolExecutor(8) as people:
        list(people.map(count, range(40)))
    assert client.get("/apps/default/state").json() == {"state": {"n": 40}}


def test_changing_different_keys_at_once(client: httpx2.Client) -> None:
    """Without ``If-Match`` a change is atomic per key: all of them are there."""
    with ThreadPoolExecutor(8) as people:
        list(people.map(lambda n: change(client, "/sessions/s/state", {f"k{n}": n}), range(40)))
    assert client.get("/sessions/s/state").json() == {"state": {f"k{n}": n for n in range(40)}}


def test_another_users_state(client: httpx2.Client) -> None:
    """A session's state belongs to its user; a missing session has none."""
    problem(client.get("/sessions/s/state?user_id=bob"), 404, "SESSION_NOT_FOUND")
    problem(change(client, "/sessions/s/state?user_id=bob", {"a": 1}), 404, "SESSION_NOT_FOUND")
    problem(client.get("/sessions/none/state"), 404, "SESSION_NOT_FOUND")
    problem(change(client, "/sessions/none/state", {"a": 1}), 404, "SESSION_NOT_FOUND")
    assert change(client, "/sessions/s/state?user_id=alice", {"a": 1}).status_code == 200


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture
def chat(models: ModelServer) -> Iterator[Chat]:
    models.reset()
    settings = {"model_provider": "openai", "openai_api_key": "k", "openai_base_url": models.base_url}
    with HttpServer(**settings) as server:
        moves = Chat(server, models)
        yield moves
        moves.close()


def prompt(chat: Chat) -> str:
    """Return the system prompt that the model of session ``s`` is sent."""
    told: str = json.loads(chat.say().json()["reply"])["texts"][0]
    return told


def test_a_template(chat: Chat) -> None:
    """Prompt and context are the session's own; null takes a part, or all of it, away."""
    usual = json.loads(chat.say(session_id="other").json()["reply"])["texts"][0]
    template = {"system_prompt": "Help {name} in {city}.", "context": {"name": "张三", "password": "p"}}
    body = {"session_id": "s", "state": {"city": "北京"}, "template": {**template, "capabilities": None}}
    assert chat.client.post("/sessions", json=body).status_code == 201
    assert prompt(chat) == "Help 张三 in 北京."
    patch = {"template": {"system_prompt": "Hello {name}, {password}."}}
    assert chat.client.patch("/sessions/s", json=patch).headers["etag"].endswith('.2"')
    assert prompt(chat) == "Hello 张三, [redacted]."
    chat.client.patch("/sessions/s", json={"template": {"context": None}})
    assert prompt(chat) == "Hello , ."
    chat.client.patch("/sessions/s", json={"template": None})
    assert prompt(chat) == usual


def test_what_a_prompt_may_name(chat: Chat) -> None:
    """State of all three scopes, as it is when a turn starts; what people wrote is text."""
    template = {"system_prompt": "{tone}|{user:name}|{app:rule}"}
    chat.client.post("/sessions", json={"session_id": "s", "user_id": "alice", "template": template})
    assert prompt(chat) == "||"
    change(chat.client, "/sessions/s/state", {"tone": "{user:name}"})
    change(chat.client, "/users/alice/state", {"name": "Alice"})
    change(chat.client, "/apps/default/state", {"rule": "be brief"})
    assert prompt(chat) == "{user:name}|Alice|be brief"


@pytest.mark.parametrize(
    ("template", "field"),
    [
        ([], "template"),
        ({"prompt": "x"}, "template.prompt"),
        ({"system_prompt": 1}, "template.system_prompt"),
        ({"system_prompt": "x" * 32_001}, "template.system_prompt"),
        ({"context": []}, "template.context"),
        ({"context": nested(33)}, "template.context" + ".a" * 32),
        ({"capabilities": "x"}, "template.capabilities"),
        ({"capabilities": ["x"] * 101}, "template.capabilities"),
        ({"capabilities": ["a/b"]}, "template.capabilities.0"),
        ({"capabilities": ["unknown"]}, "template.capabilities"),
    ],
)
def test_templates_that_do_not_fit(client: httpx2.Client, template: object, field: str) -> None:
    """Refused at the field, to create and to change alike; an unknown capability, too."""
    for response in (
        client.post("/sessions", json={"session_id": "new", "template": template}),
        client.patch("/sessions/s", json={"template": template}),
    ):
        document = problem(response, 422, "VALIDATION_ERROR")
        assert [error["field"] for error in document["errors"]] == [field]
    problem(client.get("/sessions/new"), 404, "SESSION_NOT_FOUND")
    assert client.get("/sessions/s").headers["etag"] == '"0.1"'


def test_one_bad_template_of_a_batch(client: httpx2.Client) -> None:
    """A capability that the agent has not fails alone."""
    sessions = [{"session_id": "a"}, {"template": {"capabilities": ["unknown"]}}, {"session_id": "b"}]
    results = client.post("/sessions/batch", json={"sessions": sessions}).json()["results"]
    assert [result.get("session_id") for result in results] == ["a", None, "b"]
    assert results[1]["error"]["code"] == "VALIDATION_ERROR"


STATS = [
    "total_sessions",
    "active_sessions",
    "idle_sessions",
    "archived_sessions",
    "expired_sessions",
    "avg_session_duration_s",
    "avg_turns",
    "turns_total",
    "turns_failed",
    "error_rate",
    "avg_response_ms",
    "p95_response_ms",
    "tokens_total",
]


def test_statistics_of_nothing() -> None:
    """Every member is there and is zero."""
    with HttpServer() as server:
        stats = server.client.get("/sessions/stats").json()
    assert list(stats) == STATS
    assert set(stats.values()) == {0}


def test_statistics(chat: Chat) -> None:
    """They count sessions by status, turns, failures and tokens; deleted sessions' turns stay."""
    chat.client.post("/sessions", json={"session_id": "archived"})
    chat.client.patch("/sessions/archived", json={"status": "archived"})
    tokens = sum(chat.say().json()["usage"]["total_tokens"] for _ in range(2))
    chat.models.script({"mode": "status", "status": 400})
    problem(chat.say(), 502, "MODEL_ERROR")
    chat.say(session_id="gone")
    tokens += chat.client.get("/sessions/gone/turns").json()["turns"][0]["usage"]["total_tokens"]
    chat.client.delete("/sessions/gone")
    stats = chat.client.get("/api/sessions/stats").json()
    assert (stats["total_sessions"], stats["active_sessions"], stats["archived_sessions"]) == (2, 1, 1)
    assert (stats["turns_total"], stats["turns_failed"], stats["error_rate"]) == (4, 1, 0.25)
    assert (stats["tokens_total"], stats["avg_turns"]) == (tokens, 1.33)
    assert 0 < stats["avg_response_ms"] <= 2 * stats["p95_response_ms"]
