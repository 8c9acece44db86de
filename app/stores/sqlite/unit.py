"""What the writer's works share: the connection, and what is remembered between them."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from zlib import crc32

from app.domain.ids import SessionKey
from app.domain.session import LifeSpan
from app.stores.sealing import Sealer
from app.stores.sqlite.cache import Changes, Saved
from app.stores.sqlite.connection import Connection

ADD_TO_COUNTERS = (
    "INSERT INTO counters (name, value) VALUES {rows}"
    " ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
)


@dataclass(slots=True)
class Unit:
    """What a work gets: the connection, how long sessions live, and what the writer remembers between works.

    ``count`` notes changes of counters; they are written once per group and count
    in ``totals`` only after the commit. ``note`` notes what became of a record. ``owes_cut``: the WAL may
    hold what was deleted.
    """

    connection: Connection
    life: LifeSpan
    totals: Counter[str] = field(default_factory=Counter)
    owes_cut: bool = True  # a process that died may have left it so
    _names: dict[str, int] = field(default_factory=dict)
    _of_group: Counter[str] = field(default_factory=Counter)
    _of_work: list[tuple[str, int]] = field(default_factory=list)  # to take back what the work counted
    _noted_by_work: Changes = field(default_factory=dict)
    _noted: Changes = field(default_factory=dict)

    @property
    def sealer(self) -> Sealer:
        return self.connection.sealer

    def intern(self, text: str) -> int:
        """Return the number that stands for ``text``; it is stored with this work if it is new."""
        number = self._names.get(text)
        if number is None:
            found = self.connection.execute("SELECT id FROM names WHERE text = ?", (text,)).get
            number = self._store_name(text) if found is None else found
            self._names[text] = number
        return number

    def count(self, name: str, change: int) -> None:
        if change:
            self._of_group[name] += change
            self._of_work.append((name, change))

    def note(self, key: SessionKey, saved: Saved | None) -> None:
        self._noted_by_work[key] = saved

    def value(self, name: str) -> int:
        """Return the counter as this work sees it."""
        return self.totals[name] + self._of_group[name]

    def end_work(self) -> None:
        self._of_work.clear()
        self._noted.update(self._noted_by_work)
        self._noted_by_work.clear()

    def forget_work(self) -> None:
        """Forget what the work did that has just been rolled back."""
        for name, change in self._of_work:
            self._of_group[name] -= change
        self._of_work.clear()
        self._noted_by_work.clear()
        self._names.clear()  # it may have stored one that is gone now

    def write_counts(self) -> None:
        changes = [(name, change) for name, change in self._of_group.items() if change]
        if changes:
            # One statement, since each is a chance for another thread to take the interpreter.
            rows = ", ".join(["(?, ?)"] * len(changes))
            self.connection.execute(ADD_TO_COUNTERS.format(rows=rows), list(chain.from_iterable(changes)))

    def take_notes(self) -> Changes:
        """Return what the works of this group noted, to the cache of records."""
        noted, self._noted = self._noted, {}
        return noted

    def end_group(self) -> None:
        self.totals.update(self._of_group)
        self._of_group.clear()

    def forget_group(self) -> None:
        self.forget_work()
        self._of_group.clear()
        self._noted.clear()

    def _store_name(self, text: str) -> int:
        self.connection.execute("INSERT INTO names (text, seal) VALUES (?, ?)", (text, crc32(text.encode())))
        return self.connection.last_insert_rowid()
