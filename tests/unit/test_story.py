"""A session's events, page by page, against all of them in a row."""

import random
from dataclasses import replace
from typing import Any

import pytest

from app.domain.errors import InvalidInput, TurnNotFound
from app.domain.events import TurnFailed, TurnFinished, TurnStarted
from app.domain.ids import SessionKey
from app.domain.journal import StateChanged
from app.domain.session import LifeSpan, Session
from app.domain.turn import Activation, AssistantText, Turn, TurnError, TurnStatus, UserText
from app.services.story import Asked, StoryEvent, find_key, tell_backwards, tell_forwards
from app.stores.memory.store import MemoryStore
from tests.fakes import EPOCH_MS, make_session, new_ids

EVERYTHING = 10_000


class Teller:
    """Makes a session of turns and facts, some within turns, many in one millisecond."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.store = MemoryStore(LifeSpan())
        self.now = EPOCH_MS
        self.new_id = new_ids()
        self.key = SessionKey("", "s1")

    async def play(self, steps: int = 25) -> Session:
        await self.store.open("boot-1")
        await self.store.create_session(make_session("s1"))
        for number in range(steps):
            if self.dice.random() < 0.4:
                await self._log(number)
            else:
                await self._take_turn(number)
        return await self.session()

    async def session(self) -> Session:
        found = await self.store.find_session(self.key)
        assert found is not None
        return found

    def _tick(self) -> int:
        self.now += self.dice.choice((0, 0, 1, 5))
        return self.now

    async def _log(self, number: int) -> None:
        await self.store.patch_state(self.key, {"step": f"{number}.{self.dice.random()}"}, self._tick())

    async def _take_turn(self, number: int) -> None:
        session = await self.session()
        turn = self._make_turn(session, number)
        await self.store.start_turn(session, turn)
        if self.dice.random() < 0.3:
            await self._log(number)
        ended: dict[str, Any] = {"finished_at": self._tick(), "last_seq": self.dice.choice((4, 9))}
        if self.dice.random() < 0.3:
            error = TurnError("MODEL_ERROR", "It failed.")
            await self.store.record_turn(
                session, replace(turn, status=TurnStatus.FAILED, error=error, **ended)
            )
            return
        said = (UserText(turn.input), AssistantText("fine"))
        finished = replace(turn, status=TurnStatus.FINISHED, messages=said, reply="fine", **ended)
        await self.store.commit_turn(session, finished)

    def _make_turn(self, session: Session, number: int) -> Turn:
        return Turn(
            turn_id=self.new_id(),
            parent=session.head,
            depth=session.depth + 1,
            status=TurnStatus.RUNNING,
            input=f"message {number}",
            agent_id="assistant",
            provider="demo",
            model="demo",
            activation=Activation.WARM,
            started_at=self._tick(),
            boot_id="boot-1",
        )


async def _all(teller: Teller, session: Session) -> list[StoryEvent]:
    return [e for _, e in await tell_backwards(teller.store, session, Asked(), EVERYTHING)]


@pytest.mark.parametrize("seed", range(12))
async def test_pages_join_to_the_whole_story(seed: int):
    """Whatever the page, forwards and backwards each event comes once, and times never go back."""
    teller = Teller(seed)
    session = await teller.play()
    whole = await _all(teller, session)
    times = [event.created_at for event in whole]
    assert times == sorted(times)
    assert len({event.id for event in whole}) == len(whole) > 50
    limit = teller.dice.choice((1, 3, 10))
    forwards, position = [whole[0]], whole[0].id
    while True:
        key = await find_key(teller.store, session, position, "after")
        page = [e for _, e in await tell_forwards(teller.store, session, Asked(), limit, key)]
        if not page:
            break
        forwards += page
        position = page[-1].id
    assert forwards == whole
    backwards, page = (
        list[StoryEvent](),
        [e for _, e in await tell_backwards(teller.store, session, Asked(), limit)],
    )
    while page:
        assert len(page) == limit or page[0] is whole[0] or page[0] == whole[0]
        backwards = page + backwards
        key = await find_key(teller.store, session, page[0].id, "before")
        page = [e for _, e in await tell_backwards(teller.store, session, Asked(), limit, key)]
    assert backwards == whole


@pytest.mark.parametrize("seed", range(4))
async def test_filters_leave_out_the_rest(seed: int):
    """By kind and by time exactly those that fit are told, as many as asked for."""
    teller = Teller(100 + seed)
    session = await teller.play()
    whole = await _all(teller, session)
    middle = whole[len(whole) // 2].created_at
    for kinds in (frozenset([StateChanged]), frozenset([TurnFailed, TurnFinished]), None):
        for since in (None, middle):
            wanted = [
                event
                for event in whole
                if (kinds is None or type(event.event) in kinds)
                and (since is None or event.created_at >= since)
            ]
            told = await tell_backwards(teller.store, session, Asked(since, kinds), 5)
            assert [event for _, event in told] == wanted[-5:]
            key = await find_key(teller.store, session, whole[0].id, "after")
            told = await tell_forwards(teller.store, session, Asked(since, kinds), 5, key)
            assert [event for _, event in told] == [event for event in wanted if event != whole[0]][:5]


async def test_a_running_turn_shows_its_start_and_later_the_rest():
    """Who has read up to the start of a turn that runs gets the rest when it has ended, once."""
    teller = Teller(7)
    session = await teller.play(5)
    turn = teller._make_turn(session, 99)
    await teller.store.start_turn(session, turn)
    last = (await _all(teller, session))[-1]
    assert (last.turn_id, last.seq, type(last.event)) == (turn.turn_id, 1, TurnStarted)
    said = (UserText("x"), AssistantText("y"))
    ended = replace(
        turn, status=TurnStatus.FINISHED, messages=said, reply="y", finished_at=turn.started_at, last_seq=4
    )
    await teller.store.commit_turn(session, ended)
    key = await find_key(teller.store, session, last.id, "after")
    rest = await tell_forwards(teller.store, session, Asked(), 10, key)
    assert [event.seq for _, event in rest] == [2, 3, 4]


async def test_a_position_must_be_an_event_of_this_session():
    """What has not the form of an id is refused, and one of another session's turn is not found."""
    teller = Teller(1)
    session = await teller.play(3)
    for nonsense in ("", "fact:1", "x:1", "fact:-1:2", f"{session.head}", f"{session.head}:x"):
        with pytest.raises(InvalidInput):
            await find_key(teller.store, session, nonsense, "after")
    with pytest.raises(TurnNotFound):
        await find_key(teller.store, session, f"{teller.new_id()}:1", "after")


async def test_a_floor_hides_what_is_older():
    """Below the floor nothing is told, in neither direction."""
    teller = Teller(3)
    session = await teller.play()
    whole = await _all(teller, session)
    floor = (await tell_backwards(teller.store, session, Asked(), 10))[0][0]
    asked = Asked(floor=floor)
    assert [e for _, e in await tell_backwards(teller.store, session, asked, EVERYTHING)] == whole[-10:]
    key = await find_key(teller.store, session, whole[0].id, "after")
    assert [e for _, e in await tell_forwards(teller.store, session, asked, 4, key)] == whole[-10:][:4]
