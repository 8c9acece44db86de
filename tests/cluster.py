"""Several real server processes over one store, and what to do to them.

with ModelServer() as model, Cluster(folder, urls, model) as cluster:     # a URL of the store for each node
    cluster.nodes[0].request("POST", "/chat", {"session_id": "s", "message": says("hi")})
    cluster.pause(0); cluster.resume(0)          # SIGSTOP, SIGCONT
    cluster.kill(1); cluster.nodes[1].start()    # kill -9, and again

Whatever happens in the block, no process is left behind it.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

from tests.modelserver import ModelServer
from tests.serverprocess import ServerProcess

LEASE_S = 2.0
SOON_S = 20.0
_POLL_S = 0.02

T = TypeVar("T")


def says(text: str, **step: Any) -> str:
    """Return a message that makes the model say ``text``."""
    return f"[[{json.dumps({'mode': 'text', 'text': text, **step})}]]"


def until(condition: Callable[[], T], within_s: float = SOON_S) -> T:
    """Ask until the answer is true, and return it; fail when that takes longer."""
    give_up_at = time.monotonic() + within_s
    never = threading.Event()
    while not (answer := condition()):
        assert time.monotonic() < give_up_at, "it never happened"
        never.wait(_POLL_S)
    return answer


class Cluster:
    """Nodes that differ in nothing but the way to their store: ``store_urls`` has one for each."""

    def __init__(
        self, folder: Path, store_urls: Sequence[str], model: ModelServer | None = None, **settings: str
    ) -> None:
        common = {
            "LEASE_S": str(LEASE_S),
            "ACCEPT_VOLATILE": "true",
            "LOG_LEVEL": "warning",
            # Compiled modules are kept, as an installation keeps them: half of a start is compiling.
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(folder.parent / "compiled"),
        }
        if model is not None:
            common |= {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": model.base_url, "OPENAI_MODEL": "m"}
        else:
            common |= {"MODEL_PROVIDER": "demo"}
        self.nodes: list[ServerProcess] = []
        for number, url in enumerate(store_urls):
            place = folder / f"node{number}"
            place.mkdir()
            self.nodes.append(ServerProcess(place, **(common | {"STORE_URL": url} | settings)))
        self._paused: set[int] = set()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._end)
            with ThreadPoolExecutor(len(self.nodes)) as threads:
                list(threads.map(ServerProcess.start, self.nodes))
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def urls(self) -> list[str]:
        """Where the nodes are now; a node that was started again is elsewhere."""
        return [node.url for node in self.nodes if node.url]

    def pause(self, number: int) -> None:
        """Stop a node as a frozen machine is stopped: nothing is closed."""
        os.kill(self.nodes[number].pid, signal.SIGSTOP)
        self._paused.add(number)

    def resume(self, number: int) -> None:
        os.kill(self.nodes[number].pid, signal.SIGCONT)
        self._paused.discard(number)

    def kill(self, number: int) -> None:
        self.nodes[number].kill()
        self._paused.discard(number)

    def logs(self) -> str:
        """Return what all nodes have logged."""
        return "\n".join(node.log() for node in self.nodes if node.log_path.exists())

    def turns(self, session_id: str, node: int = 0) -> list[dict[str, Any]]:
        """Return all turns of the session, oldest first."""
        turns: list[dict[str, Any]] = []
        cursor = ""
        while cursor is not None:
            page = self._get(node, f"/sessions/{session_id}/turns?limit=200{cursor and f'&cursor={cursor}'}")
            turns += page.get("turns", [])
            cursor = page.get("next_cursor")
        return turns[::-1]

    def history(self, session_id: str, node: int = 0) -> list[dict[str, Any]]:
        """Return all messages of the session, oldest first."""
        messages: list[dict[str, Any]] = []
        before = ""
        while before is not None:
            page = self._get(
                node, f"/sessions/{session_id}/history?limit=200{before and f'&before={before}'}"
            )
            messages = page.get("messages", []) + messages
            before = page.get("next_before")
        return messages

    def _get(self, node: int, path: str) -> dict[str, Any]:
        reply = self.nodes[node].request("GET", path)
        assert reply.status in (200, 404), reply.raw
        return dict(reply.body)

    def _end(self) -> None:
        for number in list(self._paused):
            self.resume(number)
        for node in self.nodes:
            if node.has_started:
                node.kill()
