"""What the load test's clients say, and what must be true of every answer.

Each session first says its own name, in English or Chinese, and later asks for it. With the
built-in demo model every reply must hold that name, and with any model no other session's;
``turn_count`` and ``message_count`` must grow with each answer as the session's history does.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou")
CHARACTERS = "明远山川海林森江河湖星云雨雪风霜松柏竹梅兰菊桂莲峰岩泉溪波涛洋月华光辉晨曦阳春"
MAX_SESSIONS = 100_000
# Every name has this shape and nothing else does, so one search finds all names in a reply.
ANY_NAME = re.compile(rf"Q(?:{'|'.join(SYLLABLES)}){{4}}|亓[{CHARACTERS}]{{3}}")

# Nothing in these sounds like a name, or like asking for one.
ENGLISH = "Please look at the old mill by the river, where every boat turns before the long rain comes. "
CHINESE = "请看河边那座旧磨坊，每条船都在那里掉头，然后才下起长长的雨。"
MAX_LENGTH = 20_000

Filler = Callable[[bool], str]


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished turn, from either route, as the server tells it."""

    reply: str
    provider: str
    activation: str
    turn_count: int
    message_count: int


@dataclass(slots=True)
class Session:
    """One conversation as the client knows it; ``turns`` are those that were answered."""

    session_id: str
    name: str
    is_chinese: bool
    turns: int = 0
    is_demo: bool = False

    def next_message(self, filler: Filler) -> str:
        return self._next_sentence() + filler(self.is_chinese)

    def _next_sentence(self) -> str:
        if self.turns == 0:
            return f"你好，我叫{self.name}。" if self.is_chinese else f"My name is {self.name}."
        if self.is_demo:
            return "我叫什么名字？" if self.is_chinese else "What is my name?"
        return f"{self.name}: {self.turns + 1}"

    def take(self, answer: Answer, expect_echo: bool) -> str | None:
        """Count the answer to the latest message; return what is wrong with it."""
        self.turns += 1
        self.is_demo = answer.provider == "demo"
        named = set(ANY_NAME.findall(answer.reply))
        if named - {self.name}:
            return f"{self.session_id} ({self.name}) was told {', '.join(sorted(named))}"
        if (self.is_demo or expect_echo) and not named:
            return f"{self.session_id} ({self.name}) was not recognised: {answer.reply[:80]!r}"
        expected = (self.turns, 2 * self.turns)
        if (answer.turn_count, answer.message_count) != expected:
            counts = f"turn_count and message_count {answer.turn_count}, {answer.message_count}"
            return f"{self.session_id} has {counts} instead of {expected[0]}, {expected[1]}"
        return None


class SessionMaker:
    """Makes sessions with names of their own; another ``run`` has other names."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._offset = random.Random(run).randrange(len(CHARACTERS) ** 3)
        self._made = 0

    def make(self, count: int) -> list[Session]:
        """Return new sessions, every other one Chinese."""
        numbers = range(self._made, self._made + count)
        self._made += count
        return [self._make(number, number % 2 == 1) for number in numbers]

    def _make(self, number: int, is_chinese: bool) -> Session:
        name = make_name(number // 2 + self._offset, is_chinese)
        return Session(f"load-{self._run}-{number}", name, is_chinese)


def make_name(number: int, is_chinese: bool) -> str:
    parts, length = (CHARACTERS, 3) if is_chinese else (SYLLABLES, 4)
    digits = (number // len(parts) ** place % len(parts) for place in range(length))
    return ("亓" if is_chinese else "Q") + "".join(parts[digit] for digit in digits)


def no_filler(is_chinese: bool) -> str:
    return ""


def log_normal_filler(source: random.Random, median: float, sigma: float) -> Filler:
    """Return what draws the rest of a message: log-normal lengths, as those of people's messages are."""

    def draw(is_chinese: bool) -> str:
        text = CHINESE if is_chinese else " " + ENGLISH
        length = min(MAX_LENGTH, round(exp(source.gauss(log(median), sigma))))
        return (text * (length // len(text) + 1))[:length]

    return draw
