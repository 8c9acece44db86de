"""Every store against a plain model of the tree, along random walks through all that changes it."""

from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest

from app.domain.branch import Back, HeadTarget, ToCheckpoint, ToTurn
from app.domain.checkpoint import AutoCheckpoint
from app.domain.compaction import Note
from app.domain.session import Session
from app.domain.turn import Turn, Usage
from app.ports import SessionStore

from .builders import (
    T0,
    current,
    failed,
    make_checkpoint,
    make_note,
    make_session,
    make_turn,
    new_id,
    stored_session,
)
from .checks import said
from .conftest import Place

KEEP = 3


@dataclass
class Model:
    """What a session should be: its turns, and what was so at each place."""

    states: dict[str | None, dict[str, Any]]
    state: dict[str, Any]
    turns: dict[str, Turn] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)
    named: dict[str, tuple[str | None, dict[str, Any]]] = field(default_factory=dict)
    automatic: list[str] = field(default_factory=list)
    head: str | None = None

    def path(self, turn_id: str | None) -> list[Turn]:
        turns: list[Turn] = []
        while turn_id is not None:
            turns.append(self.turns[turn_id])
            turn_id = turns[-1].parent
        return turns[::-1]

    def sent(self, turn_id: str | None) -> tuple[Note | None, list[Turn]]:
        """Return the newest note on the path and the turns behind it."""
        path = self.path(turn_id)
        for position in reversed(range(len(path))):
            if path[position].turn_id in self.notes:
                return self.notes[path[position].turn_id], path[position + 1 :]
        return None, path


class Walk:
    """One session, and the forks that it goes on as, each beside its model."""

    def __init__(self, store: SessionStore, random: Random) -> None:
        self.store = store
        self.random = random
        self.model = Model({None: {"n": 0}}, {"n": 0})
        self.left: list[tuple[Session, Model]] = []
        self.now = T0

    async def begin(self) -> None:
        self.session = await stored_session(self.store, state={"n": 0})

    async def step(self) -> None:
        self.now += 1000
        acts = (self.commit, self.commit, self.patch, self.edit, self.regenerate, self.move, self.back)
        await self.random.choice((*acts, self.name, self.restore, self.note, self.fail, self.fork))()
        await self.check(self.session, self.model)

    def turn(self, parent: str | None) -> Turn:
        depth = len(self.model.path(parent)) + 1
        text = f"at {self.now}"
        return make_turn(self.session, text, text, parent=parent, depth=depth, started_at=self.now)

    async def commit(self) -> None:
        await self.commit_at(self.model.head)

    async def commit_at(self, parent: str | None, *, resets_state: bool = False) -> None:
        turn = self.turn(parent)
        wanted = AutoCheckpoint(new_id(), KEEP) if self.random.random() < 0.3 else None
        self.session = await self.store.commit_turn(
            self.session, turn, resets_state=resets_state, checkpoint=wanted
        )
        model = self.model
        if resets_state:
            model.state = model.states[turn.parent]
        model.turns[turn.turn_id] = turn
        model.states[turn.turn_id] = model.state
        model.head = turn.turn_id
        if wanted is not None:
            model.named[wanted.checkpoint_id] = model.head, model.state
            model.automatic.append(wanted.checkpoint_id)
            for gone in model.automatic[:-KEEP]:
                model.named.pop(gone, None)

    def any_place(self) -> str | None:
        return self.random.choice([None, *self.model.turns])

    async def edit(self) -> None:
        await self.commit_at(self.any_place(), resets_state=True)

    async def regenerate(self) -> None:
        if self.model.head is not None:
            await self.commit_at(self.model.turns[self.model.head].parent)

    async def patch(self) -> None:
        patch = {f"k{self.random.randrange(4)}": self.random.choice((None, self.now))}
        self.session = await self.store.patch_state(self.session.key, patch, self.now)
        kept = {**self.model.state, **patch}
        self.model.state = {key: value for key, value in kept.items() if value is not None}

    async def go(self, target: HeadTarget, head: str | None, state: dict[str, Any]) -> None:
        self.session = await self.store.move_head(self.session, target, self.now)
        self.model.head, self.model.state = head, state

    async def move(self) -> None:
        turn_id = self.any_place()
        await self.go(ToTurn(turn_id), turn_id, self.model.states[turn_id])

    async def back(self) -> None:
        path = [None, *(turn.turn_id for turn in self.model.path(self.model.head))]
        turns = self.random.randrange(len(path))
        if turns:
            await self.go(Back(turns), path[-1 - turns], self.model.states[path[-1 - turns]])

    async def name(self) -> None:
        made = await self.store.add_checkpoint(self.session, make_checkpoint(created_at=self.now))
        assert made.turn_id == self.model.head
        self.model.named[made.checkpoint_id] = self.model.head, self.model.state

    async def restore(self) -> None:
        if self.model.named:
            checkpoint_id = self.random.choice(sorted(self.model.named))
            await self.go(ToCheckpoint(checkpoint_id), *self.model.named[checkpoint_id])

    async def note(self) -> None:
        turn_id = self.any_place()
        if turn_id is not None:
            note = make_note(turn_id, f"noted at {self.now}", created_at=self.now)
            self.session = await self.store.add_note(self.session, note, Usage(1, 1))
            self.model.notes[turn_id] = note

    async def fail(self) -> None:
        await self.store.record_turn(self.session, failed(self.turn(self.model.head)))
        self.session = await current(self.store, self.session)

    async def fork(self) -> None:
        """Go on as a fork; the origin is left as it is, or deleted."""
        turn_id = self.any_place()
        new = make_session(f"fork-{self.now}", now=self.now)
        fork = await self.store.fork_session(self.session, ToTurn(turn_id), new)
        old = self.model
        path = {turn.turn_id: turn for turn in old.path(turn_id)}
        self.model = Model({one: old.states[one] for one in (None, *path)}, old.states[turn_id], path)
        self.model.notes = {one: note for one, note in old.notes.items() if one in path}
        self.model.head = turn_id
        if self.random.random() < 0.5:
            await self.store.delete_session(self.session.key)
        else:
            self.left.append((self.session, old))
        self.session = fork

    async def check(self, session: Session, model: Model) -> None:
        store = self.store
        assert await current(store, session) == session
        assert (session.head, session.state) == (model.head, model.state)
        assert await store.list_branch(session, 999) == tuple(
            replace(turn, on_branch=True) for turn in model.path(model.head)
        )
        elsewhere = await store.at_turn(session, self.random.choice([None, *model.turns]))
        assert elsewhere.state == model.states[elsewhere.head]
        for place in (session, elsewhere):
            note, rest = model.sent(place.head)
            path = await store.load_path(place)
            assert (path.summary, path.messages) == (note and note.summary, said(rest))
            assert (place.note, path.note) == (note and note.note_id,) * 2
            assert await store.get_note(place) == note
            assert place.depth == len(model.path(place.head))
        named = await store.list_checkpoints(session, 999)
        assert {one.checkpoint_id: one.turn_id for one in named.checkpoints} == {
            checkpoint_id: head for checkpoint_id, (head, _) in model.named.items()
        }


@pytest.mark.parametrize("seed", range(8))
async def test_every_step_of_a_random_walk_is_as_the_model_says(place: Place, seed: int) -> None:
    """Path, note, state, depth and checkpoints, here and at any other place; forks that were left stay so."""
    walk = Walk(place.store, Random(seed))
    await walk.begin()
    for number in range(150):
        await walk.step()
        if number % 50 == 49:
            walk.store = await place.restart(f"boot-{number}")
            for session, model in (*walk.left, (walk.session, walk.model)):
                await walk.check(session, model)
