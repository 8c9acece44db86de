"""A query for sessions as SQL has it."""

from typing import Any

from app.domain.session import LifeSpan, SessionQuery, SessionStatus
from app.stores import rules

EVER = 2**62

_ALIVE = "NOT archived AND (expires_at IS NULL OR expires_at > {now})"
_IDLE = "(marked_idle OR last_accessed <= {idle_line})"
_STATUS_TERMS = {
    SessionStatus.ARCHIVED: "archived",
    SessionStatus.EXPIRED: "NOT archived AND expires_at <= {now}",
    SessionStatus.IDLE: f"{_ALIVE} AND {_IDLE}",
    SessionStatus.ACTIVE: f"{_ALIVE} AND NOT {_IDLE}",
}


class Conditions:
    """A query's conditions, and their values in the order of the placeholders."""

    def __init__(self, query: SessionQuery, life: LifeSpan) -> None:
        self.values: list[Any] = []
        self.terms = ["true"]
        for name in ("owner", "user_id", "agent_id", "window_id"):
            value = getattr(query, name)
            if value is not None:
                self.terms.append(f"{name} = {self.mark(value.encode())}")
        if query.status is not None:
            line = rules.idle_line(query.now, life)
            marks = {"now": "", "idle_line": ""}
            for name, value in (("now", query.now), ("idle_line", -EVER if line is None else line)):
                if f"{{{name}}}" in _STATUS_TERMS[query.status]:
                    marks[name] = f"{self.mark(value)}::bigint"
            self.terms.append(_STATUS_TERMS[query.status].format(**marks))
        if query.text is not None:
            folded, begin = self.mark(query.text.casefold().encode()), self.mark(query.text.encode())
            self.terms.append(
                f"(position({folded}::bytea IN coalesce(title_folded, title)) > 0"
                f" OR substring(session_id FROM 1 FOR length({begin}::bytea)) = {begin}::bytea)"
            )

    def mark(self, value: Any) -> str:
        self.values.append(value)
        return f"${len(self.values)}"

    @property
    def where(self) -> str:
        return " AND ".join(self.terms)
