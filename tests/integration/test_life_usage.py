"""A user's usage over HTTP."""

import re

from tests.integration.test_http_server import HttpServer, problem


def test_usage() -> None:
    """Turns and tokens in total and per day, as the turns themselves tell; a stranger has none."""
    with HttpServer() as server:
        client = server.client
        answers = [
            client.post("/chat", json={"session_id": name, "user_id": "张 三", "message": "hi"}).json()
            for name in ("a", "b", "a")
        ]
        client.delete("/sessions/b")
        usage = client.get("/api/users/%E5%BC%A0%20%E4%B8%89/usage").json()
        days = usage.pop("days")
        assert usage == {
            "turns": 3,
            "prompt_tokens": sum(answer["usage"]["prompt_tokens"] for answer in answers),
            "completion_tokens": sum(answer["usage"]["completion_tokens"] for answer in answers),
        }
        assert usage["completion_tokens"] > 0
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", day["date"]) for day in days)
        assert sum(day["turns"] for day in days) == 3
        nothing = {"turns": 0, "prompt_tokens": 0, "completion_tokens": 0, "days": []}
        assert client.get("/users/nobody/usage").json() == nothing
        problem(client.get("/users/nobody/usage?limit=1"), 422, "VALIDATION_ERROR")
