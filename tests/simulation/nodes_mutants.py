"""What keeps two nodes apart, with one mistake each; some of it stands twice, and is wrong twice here."""

from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from app.services.ownership import Ownership
from app.stores import rules
from app.stores.memory import shared as memory_shared
from app.stores.memory.shared import MemoryLeases, SharedMemoryStore
from app.stores.memory.store import MemoryStore


async def _commit_whatever_others_said(self: SharedMemoryStore, session: Any, turn: Any, **how: Any) -> Any:
    record = self._records.get(session.key)
    known = record.turns.get(turn.turn_id) if record is not None else None
    if record is not None and known is not None and not known.is_committed:
        del record.turns[turn.turn_id]
    committed = await MemoryStore.commit_turn(self, session, turn, **how)
    self._leases.give_back_now(session.key, turn.turn_id)
    return committed


async def _forget(self: Ownership, key: Any, nonce: str) -> None:
    self.forget(key, nonce)


async def _reap_nothing(self: MemoryLeases, limit: int) -> int:
    return 0


Change = tuple[Any, str, Any]

MUTANTS: dict[str, tuple[Change, ...]] = {
    "starts from whatever it remembers": ((memory_shared, "_version", lambda session: 0),),
    "lets two turns have one key": ((SharedMemoryStore, "_check_key", lambda self, turn, record: None),),
    "commits behind any head, also a turn that was ended": (
        (rules, "check_unmoved", lambda *args: None),
        (SharedMemoryStore, "commit_turn", _commit_whatever_others_said),
    ),
    "gives nothing back": ((Ownership, "give_back", _forget),),
    "ends nothing that was abandoned": ((MemoryLeases, "reap", _reap_nothing),),
    "keeps nobody away": ((MemoryLeases, "take_now", lambda self, key, wanted: None),),
}


@contextmanager
def in_force(name: str) -> Any:
    with ExitStack() as stack:
        for change in MUTANTS[name]:
            stack.enter_context(patch.object(*change))
        yield
