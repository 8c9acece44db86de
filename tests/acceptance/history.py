"""What clients saw, and whether what the server kept agrees with it.

Every request is one ``Op``, written as one line of JSON when it is over. ``check`` compares
them afterwards with the histories that the server shows and names every fault that it finds:

    lost         a message that was answered is not there
    doubled      a message is there twice, or one key made two turns
    undead       a message that was refused is there
    invented     a message is there that nobody sent
    torn         a question without its answer, or with another answer than its client got
    interleaved  the messages of two turns are mixed
    reordered    a message stands before one that had been answered when it was sent
    foreign      a text names a message of another session
    trace        an answer knows a message that is not on the path to it

Texts are made by ``text_of``, so that each names its session and is the only one of its kind.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

MARK = re.compile(r"<([^<>#]+)#(\d+)>")

Outcome = Literal["ok", "fail", "unknown"]


@dataclass(frozen=True)
class Op:
    """One request and what its client knows of it; times are seconds of one clock.

    Requests with one ``key`` and ``text`` are repeats of one message. ``turn_id`` and
    ``reply`` are set as far as the client heard of them, ``code`` is that of an error.
    """

    t0: float
    t1: float
    session: str
    text: str
    outcome: Outcome
    key: str | None = None
    turn_id: str | None = None
    reply: str | None = None
    code: str | None = None


class Message(NamedTuple):
    role: str
    content: str
    turn_id: str


class Fault(NamedTuple):
    kind: str
    session: str
    what: str


def text_of(session: str, number: int, more: str = "") -> str:
    """Return the ``number``-th message that is sent to ``session``."""
    return f"<{session}#{number}> {more}".rstrip()


class Log:
    """The requests in a file, one line each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, op: Op) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(op)) + "\n")

    def read(self) -> list[Op]:
        return [Op(**json.loads(line)) for line in self._path.read_text().splitlines()]


def messages_of(history: Iterable[dict[str, Any]]) -> list[Message]:
    """Return the messages of a session as its history shows them."""
    return [Message(shown["role"], shown["content"], shown["turn_id"]) for shown in history]


def check(ops: Iterable[Op], histories: dict[str, list[Message]]) -> list[Fault]:
    """Return every fault of the histories, ``[]`` if they agree with what the clients saw."""
    sent: dict[str, dict[str, list[Op]]] = defaultdict(lambda: defaultdict(list))
    for op in ops:
        sent[op.session][op.text].append(op)
    faults: list[Fault] = []
    for session in sorted(sent.keys() | histories.keys()):
        kept = histories.get(session, [])
        found = _check_session(session, sent.get(session, {}), kept)
        faults += [Fault(kind, session, what) for kind, what in found]
    return faults


def _check_session(
    session: str, sent: dict[str, list[Op]], kept: Sequence[Message]
) -> Iterator[tuple[str, str]]:
    yield from _check_shape(kept)
    yield from _check_presence(sent, kept)
    yield from _check_answers(sent, kept)
    yield from _check_order(sent, kept)
    yield from _check_marks(session, kept)


def _check_shape(kept: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """Each question is followed by the answer of its own turn, and by nothing else."""
    for position, message in enumerate(kept):
        partner = position + 1 if message.role == "user" else position - 1
        if not 0 <= partner < len(kept) or kept[partner].role == message.role:
            yield "torn", message.content
        elif kept[partner].turn_id != message.turn_id:
            yield "interleaved", message.content


def _check_presence(sent: dict[str, list[Op]], kept: Sequence[Message]) -> Iterator[tuple[str, str]]:
    count = Counter(message.content for message in kept if message.role == "user")
    for text, ops in sent.items():
        outcomes = {op.outcome for op in ops}
        if len({op.turn_id for op in ops if op.outcome == "ok"}) > 1 or count[text] > 1:
            yield "doubled", text
        if "ok" in outcomes and count[text] == 0:
            yield "lost", text
        if outcomes == {"fail"} and count[text] > 0:
            yield "undead", text
    for text in count.keys() - sent.keys():
        yield "invented", text


def _check_answers(sent: dict[str, list[Op]], kept: Sequence[Message]) -> Iterator[tuple[str, str]]:
    answers = {message.turn_id: message.content for message in kept if message.role == "assistant"}
    turns = {message.content: message.turn_id for message in kept if message.role == "user"}
    for text, ops in sent.items():
        turn_id = turns.get(text)
        heard = {(op.turn_id, op.reply) for op in ops if op.outcome == "ok"}
        if turn_id is not None and heard - {(turn_id, answers.get(turn_id))}:
            yield "torn", text


def _check_order(sent: dict[str, list[Op]], kept: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """Nothing stands before a message that had been answered before it was sent."""
    first_sent = {text: min(op.t0 for op in ops) for text, ops in sent.items()}
    first_answer = {
        text: min(op.t1 for op in ops if op.outcome == "ok")
        for text, ops in sent.items()
        if any(op.outcome == "ok" for op in ops)
    }
    latest_sent, latest_text = float("-inf"), ""
    for message in kept:
        if message.role != "user" or message.content not in first_sent:
            continue
        if first_answer.get(message.content, float("inf")) < latest_sent:
            yield "reordered", f"{latest_text} before {message.content}"
        if first_sent[message.content] > latest_sent:
            latest_sent, latest_text = first_sent[message.content], message.content


def _check_marks(session: str, kept: Sequence[Message]) -> Iterator[tuple[str, str]]:
    on_path: set[str] = set()
    for message in kept:
        marks = {mark.group(): mark.group(1) for mark in MARK.finditer(message.content)}
        if message.role == "user":
            on_path |= marks.keys()
        for mark, owner in marks.items():
            if owner != session:
                yield "foreign", message.content
            elif mark not in on_path:
                yield "trace", message.content
