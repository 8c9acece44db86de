"""What clients of a simulated world do with branches, and what a turn's context must be there."""

import random
from typing import Any

from app.domain.branch import ROOT, Back, ToTurn
from app.domain.chat import OnBusy, RegenerateRequest
from app.domain.compaction import summary_messages
from app.domain.ids import SessionKey
from app.domain.turn import ContextMessage, Turn
from app.services.chat import ChatService
from app.services.sessions import SessionManager
from app.stores.memory.store import MemoryStore
from tests.simulation.turn_book import Book, path_of

MOST_FORKS = 2


class Branching:
    """Moves heads, names turns, copies sessions and has them summed up, as the dice say.

    ``names`` are the ids of the sessions, to which those of forks are added.
    """

    def __init__(
        self,
        dice: random.Random,
        names: list[str],
        chat: ChatService,
        sessions: SessionManager,
        store: MemoryStore,
        book: Book,
    ) -> None:
        self._dice = dice
        self._names = names
        self._chat = chat
        self._sessions = sessions
        self._store = store
        self._book = book
        self._forks = 0

    async def act(self, key: SessionKey, on_busy: OnBusy) -> None:
        """Do one thing with the session."""
        dice = self._dice
        match dice.randrange(8):
            case 0 | 6 | 7:
                self._book.may_interrupt(key, on_busy)
                await self._sessions.rewind(key, self._pick_target(key), on_busy=on_busy)
            case 1:
                await self._sessions.create_checkpoint(key, label=f"{dice.random()}")
            case 2:
                latest = await self._sessions.latest_checkpoint(key)
                self._book.may_interrupt(key, on_busy)
                await self._sessions.restore(key, latest.checkpoint_id, on_busy=on_busy)
            case 3:
                await self._fork(key)
            case 4:
                self._book.may_interrupt(key, on_busy)
                await self._chat.compact(key, on_busy=on_busy)
            case 5:
                await self._sessions.patch_state(key, {"dice": dice.random()})

    def pick_parent(self, key: SessionKey) -> str | None:
        """Return where the next turn is to continue, most often at the head."""
        turns = self._committed(key)
        if self._dice.random() < 0.8 or not turns:
            return None
        return ROOT if self._dice.random() < 0.2 else self._dice.choice(turns).turn_id

    def _pick_target(self, key: SessionKey) -> ToTurn | Back:
        turns = self._committed(key)
        if self._dice.random() < 0.4 or not turns:
            return Back(self._dice.choice((1, 1, 2)))
        return ToTurn(self._dice.choice([None, *(turn.turn_id for turn in turns)]))

    def _committed(self, key: SessionKey) -> list[Turn]:
        record = self._store._records.get(key)
        return [turn for turn in record.turns.values() if turn.is_committed] if record else []

    async def _fork(self, key: SessionKey) -> None:
        if self._forks == MOST_FORKS:
            return
        self._forks += 1
        turns = self._committed(key)
        target = ToTurn(self._dice.choice(turns).turn_id) if turns and self._dice.random() < 0.5 else None
        made = (await self._sessions.fork(key, target, session_id=f"fork-{self._forks}")).session
        if target is not None:
            assert made.head == target.turn_id, "a fork that goes on from somewhere else"
        self._names.append(made.key.session_id)


def check_place(record: Any, turn: Turn, request: Any) -> None:
    """The turn continues what its request said, or the head."""
    head = record.session.head
    if isinstance(request, RegenerateRequest):
        beside = record.turns[head]
        assert (turn.parent, turn.input) == (beside.parent, beside.input), "asks something else"
    elif request.parent is None:
        assert turn.parent == head, "continues another turn than the head"
    else:
        assert turn.parent == (None if request.parent == ROOT else request.parent), "continues another turn"


def contexts_at(record: Any, turn_id: str | None) -> list[tuple[ContextMessage, ...]]:
    """Return what the model may be sent of the path to ``turn_id``: all, or a summary and the rest."""
    path = path_of(record, turn_id)
    contexts = [tuple(message for turn in path for message in turn.messages)]
    ids = [turn.turn_id for turn in path]
    for note in record.notes.values():
        if note.turn_id in ids:
            rest = path[ids.index(note.turn_id) + 1 :]
            after = (message for turn in rest for message in turn.messages)
            contexts.append((*summary_messages(note.summary), *after))
    return contexts
