"""Erasing a user over HTTP: all that is theirs goes, wherever it is, and a receipt says so."""

import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from app.config import Settings
from app.domain.erasure import Erased, ErasureNotice
from app.domain.errors import AgentPoolError, RateLimited, SessionBusy, SnapshotUnreadable, StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.session import LifeSpan, Session
from app.runtime import Runtime
from app.services import erasure
from app.services.records import DELETE_PAGE
from app.services.sessions import NewSession, SessionView
from app.stores.memory.store import MemoryStore
from tests.contract.builders import make_session
from tests.contract.test_sqlite_erasure import MARK, back_up, found_in
from tests.integration.test_http_chat import STALL, Chat, Stream, says
from tests.integration.test_http_server import HttpServer, Json, problem
from tests.integration.test_policies import settings_for
from tests.modelserver import ModelServer
from tests.people import bearer, make_keys

SETTINGS = Settings(_env_file=None, store_url="memory://", model_provider="demo")
NOTHING = {"sessions": 0, "turns": 0, "checkpoints": 0, "events": 0, "states": 0, "usage_days": 0}


@pytest.fixture
def chat() -> Iterator[Chat]:
    with ModelServer() as models, HttpServer(**settings_for(models)) as server:
        moves = Chat(server, models)
        yield moves
        moves.close()


def fill(chat: Chat, user_id: str, *names: str) -> None:
    """Give a user sessions with a turn, a checkpoint and state each, and state of their own."""
    for name in names:
        chat.say("hi", name, user_id=user_id).raise_for_status()
        chat.client.post(f"/sessions/{name}/checkpoints", json={"label": "here"}).raise_for_status()
        chat.client.patch(f"/sessions/{name}/state", json={"state": {"n": 1}}).raise_for_status()
    for app in ("default", "other"):
        path = f"/users/{user_id}/state?app_name={app}"
        chat.client.patch(path, json={"state": {"name": user_id}}).raise_for_status()


def test_all_that_is_a_users_goes_and_nobody_elses(chat: Chat) -> None:
    """Sessions, state, usage and live agents; the totals of all users stay; erasing again finds nothing."""
    fill(chat, "alice", "a", "b")
    fill(chat, "bob", "c")
    before = chat.client.get("/sessions/stats").json()
    receipt = chat.client.delete("/users/alice").json()
    assert set(receipt) == {"receipt_id", "user_id", "erased_at", "erased"}
    assert receipt["user_id"] == "alice"
    assert receipt["erased"] == {
        "sessions": 2,
        "turns": 2,
        "checkpoints": 2,
        "events": 2,
        "states": 2,
        "usage_days": 1,
    }
    assert chat.client.get("/users/alice/sessions").json() == []
    assert chat.client.get("/users/alice/usage").json()["turns"] == 0
    assert chat.client.get("/users/alice/state?app_name=other").json() == {"state": {}}
    problem(chat.client.get("/sessions/a/history"), 404, "SESSION_NOT_FOUND")
    live = chat.client.get("/agent-sessions").json()["sessions"]
    assert [one["session_id"] for one in live] == ["c"]
    after = chat.client.get("/sessions/stats").json()
    assert (after["turns_total"], after["tokens_total"]) == (before["turns_total"], before["tokens_total"])
    assert chat.client.get("/users/bob/usage").json()["turns"] == 1
    assert chat.client.get("/users/bob/state").json() == {"state": {"name": "bob"}}
    again = chat.client.delete("/api/users/alice").json()
    assert again["erased"] == NOTHING
    assert again["receipt_id"] != receipt["receipt_id"]


def test_running_and_waiting_turns_end_and_bring_nothing_back(chat: Chat) -> None:
    """The running turn ends as ``deleted``, who waited is told 404, and no replay is kept of either."""
    fill(chat, "alice", "s")
    with chat.stream(STALL, user_id="alice") as response:
        stream = Stream(response)
        turn_id = stream.next()["turn_id"]
        waiting = chat.saying(says("waiting"), user_id="alice")
        chat.until_waiting(1)
        assert chat.client.delete("/users/alice").json()["erased"]["sessions"] == 1
        last = stream.rest()[-1]
    assert (last["type"], last["reason"]) == ("turn.cancelled", "deleted")
    problem(waiting.result(), 404, "SESSION_NOT_FOUND")
    assert chat.client.get("/users/alice/usage").json()["turns"] == 0
    assert chat.client.get("/health").json()["session_count"] == 0
    fill(chat, "alice", "s")
    problem(chat.client.get(f"/sessions/s/turns/{turn_id}/stream"), 404, "TURN_NOT_FOUND")


def test_an_idempotency_key_is_forgotten(chat: Chat) -> None:
    """The key of an erased turn begins a new one: nothing of the old answer is handed out."""
    headers = {"Idempotency-Key": "once"}
    body: Json = {"session_id": "s", "user_id": "alice", "message": says("first")}
    first = chat.client.post("/chat", json=body, headers=headers).json()
    chat.client.delete("/users/alice").raise_for_status()
    second = chat.client.post("/chat", json=body, headers=headers).json()
    assert second["turn_id"] != first["turn_id"]
    assert second["turn_count"] == 1


def test_a_receipt_is_in_the_audit_log(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    """One line that says who, what and which receipt."""
    fill(chat, "alice", "s")
    with caplog.at_level(logging.INFO, "agentpool.audit"):
        receipt = chat.client.delete("/users/alice").json()
    (line,) = [json.loads(one.getMessage()) for one in caplog.records if one.name == "agentpool.audit"]
    assert line["receipt_id"] == receipt["receipt_id"]
    assert (line["action"], line["owner"], line["status"]) == ("DELETE /users/{user_id}", "alice", 200)


def test_a_backup_holds_no_byte_of_who_was_erased(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """When the receipt is there, neither name nor words are in its rows or in the WAL; others' are."""
    with ModelServer() as models:
        store = {"store_url": f"sqlite:///{tmp_path}/agentpool.db"}
        with HttpServer(**{**settings_for(models), **store}) as server:
            chat = Chat(server, models)
            for user_id, name in ((MARK, "a"), ("Somebody-Else", "b")):
                fill(chat, user_id, name)
                chat.say(f"my name is {user_id}", name, user_id=user_id).raise_for_status()
            assert found_in(tmp_path)
            chat.client.delete(f"/users/{MARK}").raise_for_status()
            assert (tmp_path / "agentpool.db-wal").stat().st_size == 0
            chat.close()
        copies = back_up(tmp_path / "agentpool.db", tmp_path_factory.mktemp("copies"))
        assert found_in(copies) == {}
        assert found_in(copies, "Somebody-Else")


def test_names_that_a_user_may_have(chat: Chat) -> None:
    """Any name is erased as it was given; what is no name is refused."""
    fill(chat, "алиса-🦊", "s")
    assert chat.client.delete("/users/алиса-🦊").json()["erased"]["states"] == 2
    problem(chat.client.delete("/users/a%00b"), 404, "NOT_FOUND")
    problem(chat.client.delete("/users/alice?force=true"), 422, "VALIDATION_ERROR")


async def test_sessions_that_come_meanwhile_go_too() -> None:
    """Those made while others go, and while the state goes: at the receipt there is none."""

    class Late(MemoryStore):
        names = iter(["late", "later"])

        async def forget_user(self, owner: str, user_id: str) -> Erased:
            if (name := next(self.names, None)) is not None:
                await self.create_session(make_session(name, user_id=user_id))
            return await super().forget_user(owner, user_id)

    async with Runtime(SETTINGS, store=Late(LifeSpan())) as runtime:
        for number in range(DELETE_PAGE + 1):
            await runtime.sessions.create(session_id=f"s{number}", user_id="u")
        receipt = await runtime.sessions.erase_user("", "u")
        assert receipt.erased.sessions == DELETE_PAGE + 3
        assert runtime.admin.session_count() == 0


async def test_an_erasure_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who makes sessions as fast as they go is told to stop, and gets no receipt."""
    monkeypatch.setattr(erasure, "SPARE_PAGES", 3)

    class Busy(MemoryStore):
        made = 0

        async def delete_sessions(self, keys: Sequence[SessionKey]) -> Erased:
            self.made += 1
            await self.create_session(make_session(f"s{self.made}", user_id="u"))
            return await super().delete_sessions(keys)

    busy = Busy(LifeSpan())
    async with Runtime(SETTINGS, store=busy) as runtime:
        await runtime.sessions.create(session_id="first", user_id="u")
        with pytest.raises(SessionBusy):
            await runtime.sessions.erase_user("", "u")
    assert busy.made == 3


class Hooked(MemoryStore):
    """Calls ``meanwhile`` once, when sessions have gone and the user is about to be forgotten."""

    meanwhile: Callable[[], Awaitable[None]] | None = None

    async def forget_user(self, owner: str, user_id: str) -> Erased:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            await meanwhile()
        return await super().forget_user(owner, user_id)


@pytest.mark.parametrize("owner", ["", "u"])
async def test_no_session_is_made_of_a_user_who_is_being_erased(owner: str) -> None:
    """By no way, and who asks is told when to come back; others are not disturbed, and then it goes again."""
    store = Hooked(LifeSpan())
    async with Runtime(SETTINGS, store=store) as runtime:
        sessions, mine = runtime.sessions, NewSession(owner=owner, user_id="u")
        origin = await store.ensure_session(make_session("origin", owner=owner, user_id="u"))
        refusals: list[AgentPoolError | SessionView] = []

        async def make_some() -> None:
            for making in (
                sessions.create(mine),
                sessions.resume(mine),
                runtime.chat.chat(session_id="s", message="hi", owner=owner, user_id="u"),
                sessions._admission.fork(origin, None, "fork", None),
            ):
                with pytest.raises(SessionBusy) as refusal:
                    await making
                refusals.append(refusal.value)
            refusals.extend(await sessions.create_many([mine]))
            await sessions.create(owner="other", user_id="u")

        store.meanwhile = make_some
        assert (await sessions.erase_user(owner, "u")).erased.sessions == 1
        assert [getattr(refusal, "retry_after_s", None) for refusal in refusals] == [1] * 5
        assert runtime.admin.session_count() == 1
        await sessions.create(mine)


async def test_an_erasure_that_fails_bars_nobody_and_begins_no_day_anew() -> None:
    """Whether the store had forgotten the user's usage by then or not: the limit is that of before."""
    store, settings = Hooked(LifeSpan()), SETTINGS.model_copy(update={"user_tokens_per_day": 5})

    async def fail() -> None:
        raise StoreUnavailable

    async def forget_and_fail() -> None:
        await store.forget_user("", "u")
        raise StoreUnavailable

    async with Runtime(settings, store=store) as runtime:
        await runtime.chat.chat(session_id="s", message="tell me a long story", user_id="u")
        for store.meanwhile in (fail, forget_and_fail):
            with pytest.raises(StoreUnavailable):
                await runtime.sessions.erase_user("", "u")
            with pytest.raises(RateLimited):
                await runtime.chat.chat(session_id="s", message="again", user_id="u")
            await runtime.sessions.create(session_id="s", user_id="u")
        await runtime.sessions.erase_user("", "u")
        with pytest.raises(RateLimited):
            await runtime.chat.chat(session_id="s", message="again", user_id="u")


async def test_a_session_that_cannot_be_read_is_there() -> None:
    """Before it is deleted it stops no node from dropping what it has of those that are gone."""

    class Broken(MemoryStore):
        async def find_session(self, key: SessionKey) -> Session | None:
            if key.session_id == "broken":
                raise SnapshotUnreadable
            return await super().find_session(key)

    store = Broken(LifeSpan())
    async with Runtime(SETTINGS, store=store) as runtime:
        gone = SessionKey("", "gone")
        await runtime.chat.chat(session_id="gone", message="hi", user_id="u")
        await store.delete_session(gone)
        assert runtime.agents.is_live(gone)
        notice = ErasureNotice(owner="", user_id="u", lasts_s=0)
        await runtime.sessions.forget_here([SessionKey("", "broken"), gone], notice)
        assert not runtime.agents.is_live(gone)


def test_what_was_stored_without_credentials_is_the_admins_to_erase(tmp_path: Path) -> None:
    """Under the same name: an admin has it exported and erased, the user who is called so now does not."""
    path, keys = make_keys(tmp_path)
    store = {"store_url": f"sqlite:///{tmp_path}/agentpool.db"}
    with HttpServer(**store) as server:
        server.client.post("/chat", json={"session_id": "s", "user_id": "alice", "message": "hi"})
        server.client.patch("/users/alice/state", json={"state": {"n": 1}})
    with HttpServer(auth_mode="api_key", api_keys_file=path, **store) as server:
        alice, chief = bearer(keys["alice"]), bearer(keys["chief"])
        assert '"input":"hi"' not in server.client.get("/users/alice/export", headers=alice).text
        exported = server.client.get("/users/alice/export", headers=chief).text
        assert '"input":"hi"' in exported
        assert '"state":{"n":1}' in exported
        assert server.client.delete("/users/alice", headers=alice).json()["erased"] == NOTHING
        erased = server.client.delete("/users/alice", headers=chief).json()["erased"]
        assert (erased["sessions"], erased["turns"], erased["states"], erased["usage_days"]) == (1, 1, 1, 1)
        assert '"input":"hi"' not in server.client.get("/users/alice/export", headers=chief).text


async def test_an_owner_who_is_the_user_is_erased_whole() -> None:
    """Where sessions are owned, all of the owner's go, also such as say no user; others' stay."""
    store = MemoryStore(LifeSpan())
    async with Runtime(SETTINGS, store=store) as runtime:
        sessions = runtime.sessions
        await sessions.create(owner="alice", session_id="a", user_id="alice")
        await sessions.create(owner="alice", session_id="b")
        await sessions.create(owner="bob", session_id="a", user_id="alice")
        receipt = await sessions.erase_user("alice", "alice")
        assert receipt.erased.sessions == 2
        assert await store.list_keys(None, limit=9) == (SessionKey("bob", "a"),)
