"""How the demo model sums up a conversation, and what it knows of one that was summed up.

A summary is a list of what the demo uses of a conversation: the name, how many messages
there were, and what was said last. Of another model's summary it knows nothing.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from app.models.demo_talk import find_last_name, is_chinese, quote

_NAME: Final = re.compile(r"^- (?:Name: |名字：)(.+)$", re.MULTILINE)
_MESSAGES: Final = re.compile(r"^- (?:Messages: |消息数：)([0-9]{1,9})$", re.MULTILINE)
_LAST: Final = re.compile(r"^- (?:Last said: “|最后说的是：“)(.+)”$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Earlier:
    """What a summary tells: the person's name, how many messages it stands for, the last thing said."""

    name: str | None = None
    messages: int = 0
    last: str | None = None


def summarise(transcript: str) -> str:
    """Return the summary of a transcript: a JSON object a line with its ``role``, as the request says."""
    lines = list(_read(transcript))
    summaries = [text for role, text in lines if role == "summary"]
    before = (read_summary(summaries[0]) if summaries else None) or Earlier()
    texts = [text for role, text in lines if role == "user"]
    spoken = sum(role in ("user", "assistant") for role, _ in lines)
    last = quote(texts[-1]) if texts else before.last
    return _write(Earlier(find_last_name(texts) or before.name, spoken + before.messages, last))


def read_summary(text: str) -> Earlier | None:
    """Return what one of the demo's own summaries says, ``None`` if ``text`` is none."""
    name, messages, last = (pattern.search(text) for pattern in (_NAME, _MESSAGES, _LAST))
    return Earlier(name and name[1], int(messages[1]), last and last[1]) if messages else None


def _write(known: Earlier) -> str:
    zh = is_chinese(known.last or "")
    lines = ["演示模型的摘要：" if zh else "A summary by the demo model:"]
    if known.name:
        lines.append(f"- 名字：{known.name}" if zh else f"- Name: {known.name}")
    lines.append(f"- 消息数：{known.messages}" if zh else f"- Messages: {known.messages}")
    if known.last:
        lines.append(f"- 最后说的是：“{known.last}”" if zh else f"- Last said: “{known.last}”")
    return "\n".join(lines)


def _read(transcript: str) -> Iterator[tuple[str, str]]:
    """Yield role and text of each line that has them."""
    for line in transcript.split("\n"):
        try:
            message = json.loads(line)
        except ValueError:
            continue  # the request itself, which is words
        if isinstance(message, dict):
            yield str(message.get("role", "")), str(message.get("text", ""))
