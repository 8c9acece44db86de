"""A scripted OpenAI-compatible model server in a process of its own.

From a test (everything here is synchronous and short, so it serves async tests too)::

    with ModelServer() as server:                      # or start() and stop()
        server.base_url                                # http://127.0.0.1:<port>/v1
        server.script({"mode": "status", "status": 500, "repeat": 2}, {"mode": "text", "text": "fine"})
        ...                                            # the next three completions get these answers
        server.requests()                              # bodies received, oldest first (last 1,000)
        server.bodies()                                # the same as they were sent, text
        server.calls()                                 # how often each last user message came, all of them
        server.stats()                                 # {"requests", "open", "streaming", "aborted"}
        server.reset()                                 # forget bodies, counters and script

``open`` counts TCP connections (keep-alive ones too, the asking one not), ``streaming`` the answers
that are being produced, ``aborted`` the answers that the client gave up before their end.

On the command line: ``python -m tests.modelserver [--port 0]`` prints its port as one line.

What a completion answers is a *step*, a JSON object. In order of precedence: a directive
``[[{...}]]`` in the last user message; the next step of the script; else ``{"mode": "echo"}``.

    echo           says JSON ``{"n", "roles", "texts", "model"}``: what the model was sent
    text           says ``text``, in ``chunks`` (4), after ``first_s`` (0), ``delay_s`` (0) between chunks;
                   ``usage`` (true), ``finish`` ("stop"; null: none), ``done`` (true: sends ``[DONE]``),
                   ``burst`` (false: all in one write)
    reasoning      ``reasoning`` in ``reasoning_content``, then as text
    think          ``<think>`` ``reasoning`` ``</think>`` in the content, then as text
    tools          asks for ``calls`` [{"name", "arguments", "id"}], having said ``say``, ``reasoning``; for
                   ``rounds`` (1), then echoes, or does the step ``next``; only when tools are offered,
                   unless ``force``
    never_headers  reads and stays silent; ``drop``: closes without answering
    stall_first    headers, then silence; ``comments`` (false): a comment every 50 ms
    stall_mid      ``text``, then the same
    cut            ``text``, then a clean end without finish_reason
    drip           ``text`` (may be ""), then one byte every ``delay_s`` (0.02), which never make an event
    endless        ``text`` every ``delay_s`` (0.02), for ever; with ``finish``: once, and its end, and then
                   chunks without choices for ever
    flood          ``text`` (may be ""), then ``bytes`` (50,000,000) as one delta, or, with ``line`` false,
                   without any newline
    rst, fin       ``text``, then a reset, or a close, inside a chunk; ``after`` (1): texts before it
    html           200 with a web page
    bad_json       ``text``, then a chunk that is not JSON
    error_event    ``text`` (may be ""), then ``{"error": ...}``
    empty_choices  only chunks without choices; ``empty_text``: finish_reason stop without text
    status         HTTP ``status`` (500), ``retry_after``, ``code``; its body echoes the Authorization header;
                   ``times``: only the first so many requests of one body, the next does the step ``next``
    redirect       307 to ``location``
    raw            ``data`` as it is, cut into ``pieces`` (1); ``then`` ("rst" or "fin"): breaks off after it;
                   ``hold`` (false): is silent after it

``repeat`` (1) on a scripted step: serve it that many times. ``n`` in a body is not supported.
"""

import argparse
import asyncio
import json
import re
import socket
import struct
import subprocess
import sys
import urllib.request
from collections import Counter, deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

Json = dict[str, Any]

_DIRECTIVE = re.compile(r"\[\[(\{.*?\})\]\]", re.DOTALL)
_FIN, _RST = b"\0fin", b"\0rst"
_SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class ModelServer:
    """The server process, seen from a test."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    def start(self) -> Self:
        """Start the process and return when it listens; again after ``stop`` on the same port."""
        command = [sys.executable, "-m", "tests.modelserver", "--port", str(self.port)]
        root = Path(__file__).resolve().parent.parent
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        return self

    def stop(self) -> None:
        """End the process; may be called twice."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def script(self, *steps: Json) -> None:
        """Add steps, each for one completion to come (``repeat``: several)."""
        self._ask("POST", "/script", list(steps))

    def requests(self) -> list[Json]:
        """Return the bodies of the completions asked for, oldest first."""
        return list(self._ask("GET", "/requests")["requests"])

    def bodies(self) -> list[str]:
        """Return the bodies of ``requests()`` byte by byte as they came."""
        return list(self._ask("GET", "/requests")["raw"])

    def headers(self) -> list[dict[str, str]]:
        """Return the headers that came with ``requests()``, names in lower case."""
        return list(self._ask("GET", "/requests")["headers"])

    def calls(self) -> dict[str, int]:
        """Return how often the model was called with each last user message."""
        return dict(self._ask("GET", "/calls"))

    def stats(self) -> dict[str, int]:
        """Return the counters ``requests``, ``open``, ``streaming``, ``aborted``."""
        return dict(self._ask("GET", "/stats"))

    def reset(self) -> None:
        """Forget recorded bodies, counters and what is left of the script."""
        self._ask("POST", "/reset", {})

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, method=method)
        request.add_header("Connection", "close")
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read())


class _Book:
    """What the server remembers."""

    def __init__(self) -> None:
        self.bodies: deque[Json] = deque(maxlen=1000)
        self.headers: deque[dict[str, str]] = deque(maxlen=1000)
        self.raw: deque[str] = deque(maxlen=1000)
        self.times: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.script: deque[Json] = deque()
        self.open = 0
        self.clear()

    def clear(self) -> None:
        self.bodies.clear()
        self.headers.clear()
        self.raw.clear()
        self.times.clear()
        self.calls.clear()
        self.script.clear()
        self.requests = self.streaming = self.aborted = 0

    def next_step(self, messages: list[Json]) -> Json:
        last_user = next((_text(m) for m in reversed(messages) if m.get("role") == "user"), "")
        self.calls[last_user] += 1
        if found := _DIRECTIVE.search(last_user):
            return dict(json.loads(found.group(1)))
        if not self.script:
            return {"mode": "echo"}
        step = self.script[0]
        step["repeat"] = step.get("repeat", 1) - 1
        if step["repeat"] < 1:
            self.script.popleft()
        return step


def _text(message: Json) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content or ""


def _echo(body: Json) -> str:
    messages = body["messages"]
    seen = {
        "n": len(messages),
        "roles": [m["role"] for m in messages],
        "texts": [_text(m) for m in messages],
        "model": body.get("model"),
    }
    return json.dumps(seen, ensure_ascii=False)


def _split(text: str, pieces: int) -> list[str]:
    size = max(1, -(-len(text) // max(1, pieces)))
    return [text[i : i + size] for i in range(0, len(text), size)]


class _Cut(Exception):
    """The connection is to be closed here; ``reset``: with a RST."""

    def __init__(self, reset: bool = False) -> None:
        self.reset = reset


class _Connection(asyncio.Protocol):
    """One client connection: requests one after another, each answered by a task."""

    def __init__(self, book: _Book) -> None:
        self.book = book
        self.buffer = b""
        self.answering: asyncio.Task[None] | None = None
        self.counted = True
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.book.open += 1
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.counted:
            self.book.open -= 1
        if self.answering is not None:
            self.answering.cancel()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self._begin()

    def _begin(self) -> None:
        if self.answering is not None or b"\r\n\r\n" not in self.buffer:
            return
        head, rest = self.buffer.split(b"\r\n\r\n", 1)
        lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines[1:])}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        method, path, _ = lines[0].split(" ", 2)
        body = json.loads(rest[:length]) if length else {}
        self.raw = rest[:length].decode()
        answer = self._answer(method, path.partition("?")[0], headers, body)
        self.answering = asyncio.get_running_loop().create_task(answer)

    async def _answer(self, method: str, path: str, headers: dict[str, str], body: Any) -> None:
        keep = headers.get("connection", "").lower() != "close"
        try:
            if path.endswith("/chat/completions") and method == "POST":
                await self._complete(headers, body)
            else:
                self._control(path, body)
        except _Cut as cut:
            self._close(cut.reset)
            return
        if keep:
            self.answering = None
            self._begin()
        else:
            self.transport.close()

    def _close(self, reset: bool) -> None:
        if reset:
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self.transport.close()

    def _control(self, path: str, body: Any) -> None:
        book = self.book
        if path == "/script":
            book.script.extend(body)
        elif path == "/reset":
            book.clear()
        if path == "/requests":
            self._json(
                200, {"requests": list(book.bodies), "headers": list(book.headers), "raw": list(book.raw)}
            )
        elif path == "/calls":
            self._json(200, dict(book.calls))
        elif path.endswith("/models"):
            self._json(200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})
        elif path in {"/script", "/reset", "/stats"}:
            self.counted, book.open = False, book.open - 1
            names = ("requests", "open", "streaming", "aborted")
            self._json(200, {name: getattr(book, name) for name in names})
        else:
            self._json(404, {"error": {"message": "no such path"}})

    def _json(self, status: int, value: Any, *more: str) -> None:
        self._whole(status, "application/json", json.dumps(value).encode(), *more)

    def _whole(self, status: int, kind: str, body: bytes, *more: str) -> None:
        lines = (f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(body)}", *more)
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def _complete(self, headers: dict[str, str], body: Json) -> None:
        book = self.book
        book.requests += 1
        book.bodies.append(body)
        book.headers.append(headers)
        book.raw.append(self.raw)
        book.times[self.raw] += 1
        book.streaming += 1
        try:
            step = book.next_step(body["messages"])
            await self._perform(_due(step, body, book.times[self.raw]), headers, body)
        except asyncio.CancelledError:
            book.aborted += 1
            raise
        finally:
            book.streaming -= 1

    async def _perform(self, step: Json, headers: dict[str, str], body: Json) -> None:
        mode = step["mode"]
        if mode == "never_headers":
            await asyncio.Event().wait()
        elif mode == "drop":
            raise _Cut
        elif mode == "html":
            self._whole(200, "text/html", b"<html><body>captive portal</body></html>")
        elif mode == "redirect":
            self._whole(307, "text/plain", b"", f"location: {step.get('location', '/elsewhere')}")
        elif mode == "status":
            self._refuse(step, headers)
        elif not body.get("stream"):
            self._json(200, _completion(step, body))
        else:
            await self._stream(step, body)

    def _refuse(self, step: Json, headers: dict[str, str]) -> None:
        said = f"refused; you sent {headers.get('authorization')}"
        more = [f"retry-after: {step['retry_after']}"] if "retry_after" in step else []
        error = {"message": said, "type": "scripted", "code": step.get("code")}
        self._json(step.get("status", 500), {"error": error}, *more)

    async def _stream(self, step: Json, body: Json) -> None:
        self.transport.write(_SSE_HEAD)
        pending = b""
        async for data in _events(step, body):
            if step.get("burst"):
                pending += data
            else:
                self._chunk(data)
                await self.writable.wait()
        if pending:
            self._chunk(pending)
        self.transport.write(b"0\r\n\r\n")

    def _chunk(self, data: bytes) -> None:
        if data in {_FIN, _RST}:
            self.transport.write(b"40\r\ndata: {")  # announces more than it sends
            raise _Cut(reset=data == _RST)
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _delta(body: Json, delta: Json, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return _event(_frame(body) | {"choices": [choice]})


def _frame(body: Json) -> Json:
    frame = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "usage": None}
    return frame | {"model": body.get("model")}


def _usage(step: Json, body: Json, text: str) -> Json:
    prompt = sum(max(1, len(_text(m)) // 4) for m in body["messages"])
    used = max(1, len(text) // 4)
    return {"prompt_tokens": prompt, "completion_tokens": used, "total_tokens": prompt + used}


def _awaits_tools(step: Json, body: Json) -> bool:
    """Say whether a ``tools`` step still has a round to ask for after the last user message."""
    roles = [m["role"] for m in body["messages"]]
    last_user = len(roles) - 1 - roles[::-1].index("user") if "user" in roles else -1
    asked = sum(1 for m in body["messages"][last_user + 1 :] if m.get("tool_calls"))
    offered = bool(body.get("tools")) or step.get("force", False)
    return bool(step["mode"] == "tools" and offered and asked < step.get("rounds", 1))


def _due(step: Json, body: Json, time: int) -> Json:
    """Return ``step``, or what comes after it; ``time``: how often this body has been sent by now."""
    if "next" not in step:
        return step
    is_over = time > step["times"] if "times" in step else not _awaits_tools(step, body)
    return _due(step["next"], body, time) if is_over else step


def _calls(step: Json) -> list[Json]:
    calls = step.get("calls") or [{"name": "clock", "arguments": "{}"}]
    return [
        {"id": c.get("id", f"call_{i}"), "name": c["name"], "arguments": c.get("arguments", "{}")}
        for i, c in enumerate(calls)
    ]


def _completion(step: Json, body: Json) -> Json:
    message: Json = {"role": "assistant", "content": _said(step, body)}
    finish = step.get("finish", "stop")
    if _awaits_tools(step, body):
        functions = [(c["id"], {"name": c["name"], "arguments": c["arguments"]}) for c in _calls(step)]
        message["tool_calls"] = [{"id": i, "type": "function", "function": f} for i, f in functions]
        message["content"], finish = step.get("say") or None, "tool_calls"
    choice = {"index": 0, "message": message, "finish_reason": finish}
    frame = _frame(body) | {"object": "chat.completion", "choices": [choice]}
    return frame | {"usage": _usage(step, body, message["content"] or "")}


def _said(step: Json, body: Json) -> str:
    if step["mode"] == "empty_text":
        return ""
    if step["mode"] in {"echo", "tools"}:
        return _echo(body)
    return str(step.get("text", "Hello from the scripted model."))


async def _events(step: Json, body: Json) -> AsyncIterator[bytes]:
    mode = step["mode"]
    if mode == "raw":
        data = step["data"].encode()
        size = -(-len(data) // step.get("pieces", len(data)))
        for i in range(0, len(data), size):
            yield data[i : i + size]
            await asyncio.sleep(0)
        if step.get("hold"):
            await asyncio.Event().wait()
        if "then" in step:
            await asyncio.sleep(0.05)
            yield _RST if step["then"] == "rst" else _FIN
    elif mode in _ENDLESS:
        async for event in _ENDLESS[mode](step, body):
            yield event
    elif mode in _BROKEN:
        async for event in _broken(step, body):
            yield event
    elif _awaits_tools(step, body):
        for event in _tool_events(step, body):
            yield event
    else:
        async for event in _answer_events(step, body):
            yield event


async def _answer_events(step: Json, body: Json) -> AsyncIterator[bytes]:
    mode, text = step["mode"], _said(step, body)
    await asyncio.sleep(step.get("first_s", 0))
    yield _delta(body, {"role": "assistant", "content": ""})
    reasoning = step.get("reasoning", "Let me think about it.")
    pieces = step.get("chunks", 4)
    deltas = [{"content": part} for part in _split(text, pieces)]
    if mode == "reasoning":
        deltas = [{"reasoning_content": part} for part in _split(reasoning, pieces)] + deltas
    elif mode == "think":
        deltas = [{"content": part} for part in _split(f"<think>{reasoning}</think>{text}", pieces)]
    for i, delta in enumerate(deltas):
        if i and step.get("delay_s"):
            await asyncio.sleep(step["delay_s"])
        yield _delta(body, delta)
    if (finish := step.get("finish", "stop")) is not None:
        yield _delta(body, {}, finish)
    if step.get("usage", True) and (body.get("stream_options") or {}).get("include_usage"):
        yield _event(_frame(body) | {"choices": [], "usage": _usage(step, body, text)})
    if step.get("done", True):
        yield b"data: [DONE]\n\n"


def _tool_events(step: Json, body: Json) -> list[bytes]:
    events = [_delta(body, {"role": "assistant", "content": None})]
    if step.get("reasoning"):
        events += [_delta(body, {"reasoning_content": part}) for part in _split(step["reasoning"], 3)]
    events += [_delta(body, {"content": part}) for part in _split(step.get("say", ""), 2)]
    for i, call in enumerate(_calls(step)):
        first = {"index": i, "id": call["id"], "type": "function"}
        first |= {"function": {"name": call["name"], "arguments": ""}}
        events.append(_delta(body, {"tool_calls": [first]}))
        for part in _split(call["arguments"], step.get("pieces", 3)):
            events.append(_delta(body, {"tool_calls": [{"index": i, "function": {"arguments": part}}]}))
    events.append(_delta(body, {}, "tool_calls"))
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append(_event(_frame(body) | {"choices": [], "usage": _usage(step, body, "")}))
    return [*events, b"data: [DONE]\n\n"]


_BROKEN = frozenset(
    {"stall_first", "stall_mid", "cut", "rst", "fin", "bad_json", "error_event", "empty_choices"}
)


async def _broken(step: Json, body: Json) -> AsyncIterator[bytes]:
    mode = step["mode"]
    if mode == "empty_choices":
        for _ in range(3):
            yield _event(_frame(body) | {"choices": []})
        yield b"data: [DONE]\n\n"
        return
    text = step.get("text", "Half of an answer")
    if mode != "stall_first" and text:
        for _ in range(step.get("after", 1)):
            yield _delta(body, {"role": "assistant", "content": text})
    if mode in {"stall_first", "stall_mid"}:
        async for comment in _silence(step):
            yield comment
    elif mode == "bad_json":
        yield b'data: {"choices": [{"delta": {"conte\n\n'
    elif mode == "error_event":
        yield _event({"error": {"message": "upstream fell over: Bearer sk-echoed", "type": "server_error"}})
    elif mode in {"rst", "fin"}:
        await asyncio.sleep(0.05)  # so that what was sent is on its way before the connection breaks
        yield _RST if mode == "rst" else _FIN


async def _silence(step: Json) -> AsyncIterator[bytes]:
    while step.get("comments"):
        yield b": still here\n\n"
        await asyncio.sleep(0.05)
    await asyncio.Event().wait()


async def _drip(step: Json, body: Json) -> AsyncIterator[bytes]:
    if text := step.get("text", "Half of an answer"):
        yield _delta(body, {"role": "assistant", "content": text})
    yield b'data: {"choices": [{"delta": {"content": "'
    while True:
        yield b"x"
        await asyncio.sleep(step.get("delay_s", 0.02))


async def _endless(step: Json, body: Json) -> AsyncIterator[bytes]:
    text, finish = step.get("text", "word "), step.get("finish")
    if finish is not None:
        yield _delta(body, {"role": "assistant", "content": text})
        yield _delta(body, {}, finish)
    while True:
        yield _event(_frame(body) | {"choices": []}) if finish else _delta(body, {"content": text})
        await asyncio.sleep(step.get("delay_s", 0.02))


async def _flood(step: Json, body: Json) -> AsyncIterator[bytes]:
    if text := step.get("text", "Half of an answer"):
        yield _delta(body, {"role": "assistant", "content": text})
    is_line, part = step.get("line", True), b"x" * 65_536
    if is_line:
        yield b'data: {"choices": [{"index": 0, "delta": {"content": "'
    for _ in range(step.get("bytes", 50_000_000) // len(part)):
        yield part
        await asyncio.sleep(0)
    if is_line:
        yield b'"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


_ENDLESS = {"drip": _drip, "endless": _endless, "flood": _flood}


async def _serve(port: int) -> None:
    book = _Book()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(book), "127.0.0.1", port, backlog=2048)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A scripted OpenAI-compatible model server.")
    parser.add_argument("--port", type=int, default=0)
    asyncio.run(_serve(parser.parse_args().port))
