"""Telling a model's reasoning from its answer in the text that streams past.

AutoGen passes reasoning on as text between ``<think>`` and ``</think>``, whether the
model sent the tags or a ``reasoning_content`` of its own; a tag may be cut anywhere.
"""

from enum import Enum, auto
from typing import Final

_OPEN: Final = "<think>"
_CLOSE: Final = "</think>"


class _At(Enum):
    START = auto()  # nothing but white space so far
    THINK = auto()
    AFTER = auto()  # reasoning is over, nothing but white space since
    TEXT = auto()


class ThinkSplitter:
    """Splits the text of one model call into (text, reasoning), piece by piece.

    Reasoning begins with a tag at the beginning of the call. Later a tag counts only
    in a call that has reasoned already, at the beginning of a piece, which is where the
    client puts it: an answer that talks about ``<think>`` stays whole. White space
    around the reasoning belongs to neither.
    """

    __slots__ = ("_at", "_held", "_reasoned")

    def __init__(self) -> None:
        self._at = _At.START
        self._held = ""
        self._reasoned = False

    def feed(self, piece: str) -> tuple[str, str]:
        """Return what ``piece`` adds to the text and to the reasoning."""
        if self._at is _At.TEXT and not (self._reasoned and piece.startswith(_OPEN)):
            return piece, ""
        rest, self._held = self._held + piece, ""
        text = reasoning = ""
        while rest:
            if self._at is _At.THINK:
                thought, rest = self._think(rest)
                reasoning += thought
            else:
                said, rest = self._say(rest)
                text += said
        return text, reasoning

    def end(self) -> tuple[str, str]:
        """Return what was held back because more might have followed."""
        held, self._held = self._held, ""
        return ("", held) if self._at is _At.THINK else (held, "")

    def _think(self, rest: str) -> tuple[str, str]:
        thought, tag, after = rest.partition(_CLOSE)
        if tag:
            self._at = _At.AFTER
            return thought, after
        keep = _overlap(rest, _CLOSE)
        self._held = rest[len(rest) - keep :]
        return rest[: len(rest) - keep], ""

    def _say(self, rest: str) -> tuple[str, str]:
        trimmed = rest.lstrip()
        if trimmed.startswith(_OPEN):
            self._at, self._reasoned = _At.THINK, True
            return "", trimmed.removeprefix(_OPEN)
        if self._at is _At.START and _OPEN.startswith(trimmed):
            self._held = rest
            return "", ""
        if self._at is _At.AFTER:
            rest = trimmed
        if rest:
            self._at = _At.TEXT
        return rest, ""


def _overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of ``text`` could be the beginning of ``tag``."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
