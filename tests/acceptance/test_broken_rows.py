"""Rows that a disk or a stray hand has changed: the sessions concerned are set aside, the server goes on."""

from pathlib import Path
from random import Random

import apsw

from tests.serverprocess import Reply, ServerProcess

SESSIONS = 200
BROKEN = 20
TURNS = 2
WRONG_TYPES = ("body = 'text'", "status = 'finished'", "depth = x'01'", "agent = 'assistant'", "parent = 7")


def say(server: ServerProcess, session: str, message: str) -> Reply:
    return server.request("POST", "/chat", {"session_id": session, "message": message})


def damage(path: Path, sessions: list[str]) -> None:
    """Break the newest turn of each session, in one of four ways in turn."""
    chance = Random(20)
    connection = apsw.Connection(str(path))
    for number, session in enumerate(sessions):
        where = "WHERE depth = ? AND session = (SELECT id FROM sessions WHERE session_id = ?)"
        body = bytearray(connection.execute(f"SELECT body FROM turns {where}", (TURNS, session)).get)
        change, value = "body = ?", bytes(body[: chance.randrange(len(body))])  # cut off
        if number % 4 == 1:
            body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
            value = bytes(body)
        elif number % 4 == 2:
            value = bytes([200]) + bytes(body[1:])  # the format of a later version
        elif number % 4 == 3:
            change, value = f"{WRONG_TYPES[number // 4]}, provider = coalesce(?, provider)", None  # type: ignore[assignment]
        connection.execute(f"UPDATE turns SET {change} {where}", (value, TURNS, session))
        assert connection.changes() == 1
    connection.close()


def test_broken_rows_set_aside_their_sessions_and_nothing_else(tmp_path: Path) -> None:
    """Of 200 sessions 20 are broken: these say so, can be looked at and deleted; 180 go on as they were."""
    sessions = [f"s{number}" for number in range(SESSIONS)]
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        for session in sessions:
            for number in range(TURNS):
                assert say(server, session, f"{session} says {number}").status == 200
        server.stop()
        broken = Random(200).sample(sessions, BROKEN)
        damage(tmp_path / "pool.db", broken)
        server.start()
        assert server.request("GET", "/ready").status == 200
        assert server.request("GET", "/sessions?limit=1").body["total"] == SESSIONS
        for session in broken:
            check_broken(server, session)
        for session in sorted(set(sessions) - set(broken)):
            answer = say(server, session, "again")
            assert (answer.status, answer.body["turn_count"]) == (200, TURNS + 1)
            assert answer.body["activation"] == "restored"
        assert "Traceback" not in server.log()
        assert server.request("GET", "/sessions?limit=1").body["total"] == SESSIONS - BROKEN


def test_broken_record_sets_its_session_aside(tmp_path: Path) -> None:
    """A session whose very record is broken says so, is left out of lists, and can be deleted."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        for session in ("whole", "broken"):
            assert say(server, session, "hello").status == 200
        server.stop()
        connection = apsw.Connection(str(tmp_path / "pool.db"))
        connection.execute("UPDATE sessions SET depth = depth + 1 WHERE session_id = 'broken'")
        connection.close()
        server.start()
        for refused in (server.request("GET", "/sessions/broken"), say(server, "broken", "again")):
            assert (refused.status, refused.body["code"]) == (500, "SNAPSHOT_UNREADABLE")
        assert [s["session_id"] for s in server.request("GET", "/sessions").body["sessions"]] == ["whole"]
        assert server.request("DELETE", "/sessions/broken").status == 200
        assert server.request("DELETE", "/sessions/broken").status == 404
        assert say(server, "broken", "anew").body["turn_count"] == 1
        assert say(server, "whole", "again").body["turn_count"] == 2


def check_broken(server: ServerProcess, session: str) -> None:
    """The session refuses to chat, shows what is whole, and can be deleted."""
    for path in ("/chat", "/chat/stream"):
        refused = server.request("POST", path, {"session_id": session, "message": "again"})
        assert (refused.status, refused.body["code"]) == (500, "SNAPSHOT_UNREADABLE")
        assert refused.body["session_id"] == session
    shown = server.request("GET", f"/sessions/{session}")
    assert (shown.status, shown.body["turn_count"]) == (200, TURNS)
    history = server.request("GET", f"/sessions/{session}/history")
    assert (history.status, history.body["code"]) == (500, "SNAPSHOT_UNREADABLE")
    turns = server.request("GET", f"/sessions/{session}/turns").body
    assert turns["total"] == TURNS
    newest, *others = turns["turns"]
    assert (newest["status"], newest["error"]["code"]) == ("failed", "SNAPSHOT_UNREADABLE")
    assert [turn["input"] for turn in others] == [f"{session} says {n}" for n in range(TURNS - 1)]
    one = server.request("GET", f"/sessions/{session}/turns/{newest['turn_id']}")
    assert (one.status, one.body["code"]) == (500, "SNAPSHOT_UNREADABLE")
    assert server.request("DELETE", f"/sessions/{session}").status == 200
    assert server.request("GET", f"/sessions/{session}").status == 404
