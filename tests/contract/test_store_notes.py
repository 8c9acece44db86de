"""What every store promises about compaction notes: a summary that stands for the path up to a turn."""

from dataclasses import replace

import pytest

from app.domain.branch import Back, ToCheckpoint, ToTurn
from app.domain.compaction import Note
from app.domain.errors import SessionNotFound, TurnNotFound
from app.domain.journal import Compacted, LoggedFact
from app.domain.session import Session
from app.domain.turn import Turn, Usage
from app.ports import SessionStore

from .builders import (
    T0,
    current,
    dropped,
    extend,
    failed,
    make_checkpoint,
    make_note,
    make_session,
    make_turn,
    new_id,
    running,
    stored_session,
)
from .checks import said
from .conftest import Place

LATER = T0 + 50_000
SPENT = Usage(700, 50)
TEXTS = ["", "x" * 100_000, "您好 🤦🏽‍♂️ \u2028 \x00 'quotes\" \\", "lone \ud800 half"]


async def noted(store: SessionStore, turns: list[Turn], session: Session, depth: int) -> tuple[Session, Note]:
    """Add a note on the turn at ``depth``; return the session then and the note."""
    note = make_note(turns[depth - 1].turn_id, f"up to {depth}")
    return await store.add_note(session, note, SPENT), note


async def check_path(store: SessionStore, session: Session, note: Note | None, rest: list[Turn]) -> None:
    """Assert that the model is sent ``note`` and then exactly ``rest``, by the record as it is stored."""
    assert await current(store, session) == session
    assert session.note == (note and note.note_id)
    assert await store.get_note(session) == note
    path = await store.load_path(session)
    assert (path.head, path.note) == (session.head, session.note)
    assert path.summary == (note and note.summary)
    assert path.messages == said(rest)


async def test_the_path_begins_at_the_note(place: Place) -> None:
    """The summary stands for all up to its turn; what came after, and what comes, is sent as it is."""
    store = place.store
    session, turns = await extend(store, await stored_session(store), 6)
    whole = await store.load_path(session)
    session, note = await noted(store, turns, session, 4)
    await check_path(store, session, note, turns[4:])
    assert (await store.load_path(session)).stored_bytes < whole.stored_bytes
    session, more = await extend(store, session, 2)
    await check_path(await place.restart("boot-2"), session, note, [*turns[4:], *more])


@pytest.mark.parametrize("summary", TEXTS)
async def test_a_note_comes_back_as_it_was(place: Place, summary: str) -> None:
    """Any text, the numbers and the time survive a restart unchanged."""
    session, turns = await extend(place.store, await stored_session(place.store), 1)
    note = make_note(turns[0].turn_id, summary, tokens_before=123_456, tokens_after=0, created_at=LATER)
    session = await place.store.add_note(session, note, SPENT)
    await check_path(await place.restart("boot-2"), session, note, [])


async def test_without_a_note_the_whole_path_is_sent(store: SessionStore) -> None:
    """No note, no summary: before the first turn and after some."""
    session = await stored_session(store)
    await check_path(store, session, None, [])
    session, turns = await extend(store, session, 3)
    await check_path(store, session, None, turns)


async def test_history_and_counts_stay(store: SessionStore) -> None:
    """Apart from the note the record is the same, ETag and times too, and every turn can be read."""
    session, turns = await extend(store, await stored_session(store), 5)
    before = await store.list_turns(session, 9)
    after, note = await noted(store, turns, session, 5)
    assert after == replace(session, note=note.note_id, updated_at=session.last_accessed + 1)
    assert after.etag == session.etag
    assert await store.list_turns(after, 9) == before
    assert await store.list_branch(after, 9) == tuple(replace(turn, on_branch=True) for turn in turns)


async def test_a_head_from_before_the_note_knows_nothing_of_it(store: SessionStore) -> None:
    """Back to before it and the whole path is sent; on its turn and behind it, the summary again."""
    session, turns = await extend(store, await stored_session(store), 6)
    session, note = await noted(store, turns, session, 4)
    for depth in (3, 6, 4, 1, 5):
        session = await store.move_head(session, ToTurn(turns[depth - 1].turn_id), LATER)
        is_behind = depth >= 4
        await check_path(store, session, note if is_behind else None, turns[4 if is_behind else 0 : depth])
        place = await store.at_turn(session, turns[5].turn_id)
        assert (place.note, await store.get_note(place)) == (note.note_id, note)
    session = await store.move_head(session, ToTurn(None), LATER)
    await check_path(store, session, None, [])


async def test_a_session_value_from_before_loads_the_path_as_it_was(store: SessionStore) -> None:
    """Who read the record before the note was made is sent every turn."""
    old, turns = await extend(store, await stored_session(store), 3)
    await noted(store, turns, old, 2)
    path = await store.load_path(old)
    assert (path.note, path.summary, path.messages) == (None, None, said(turns))


async def test_the_newest_note_on_the_path_counts(store: SessionStore) -> None:
    """Newest is the deepest turn's, whichever was made later; of two on one turn the later one."""
    session, turns = await extend(store, await stored_session(store), 6)
    session, second = await noted(store, turns, session, 2)
    session, fourth = await noted(store, turns, session, 4)
    await check_path(store, session, fourth, turns[4:])
    session, first = await noted(store, turns, session, 1)
    await check_path(store, session, fourth, turns[4:])
    back = await store.move_head(session, ToTurn(turns[2].turn_id), LATER)
    await check_path(store, back, second, turns[2:3])
    back = await store.move_head(back, Back(2), LATER)
    await check_path(store, back, first, [])
    session = await store.move_head(back, ToTurn(turns[5].turn_id), LATER)
    again = make_note(turns[3].turn_id, "said better")
    session = await store.add_note(session, again, SPENT)
    await check_path(store, session, again, turns[4:])


async def test_a_note_may_be_added_while_the_head_is_elsewhere(store: SessionStore) -> None:
    """It is not the session's until the head comes to its branch: no lock is needed to add one."""
    old, turns = await extend(store, await stored_session(store), 4)
    session = await store.move_head(old, Back(3), LATER)
    session, others = await extend(store, session, 2)
    session, note = await noted(store, turns, old, 3)
    assert session.head == others[1].turn_id
    await check_path(store, session, None, [turns[0], *others])
    session = await store.move_head(session, ToTurn(turns[3].turn_id), LATER)
    await check_path(store, session, note, turns[3:])
    shared = make_note(turns[0].turn_id, "both branches have this")
    session = await store.add_note(session, shared, SPENT)
    await check_path(store, session, note, turns[3:])
    session = await store.move_head(session, ToTurn(others[1].turn_id), LATER)
    await check_path(store, session, shared, others)


async def test_a_note_may_be_added_while_turns_are_committed(store: SessionStore) -> None:
    """A note made of a path that has grown since holds for the grown path."""
    old, turns = await extend(store, await stored_session(store), 3)
    session, more = await extend(store, old, 2)
    session, note = await noted(store, turns, old, 3)
    await check_path(store, session, note, more)


async def test_a_commit_has_the_note_of_its_parents_path(store: SessionStore) -> None:
    """An edit from before the note leaves it behind; one from behind it keeps it."""
    session, turns = await extend(store, await stored_session(store), 5)
    session, note = await noted(store, turns, session, 3)
    edit = make_turn(session, parent=turns[1].turn_id, depth=3)
    session = await store.commit_turn(session, edit, resets_state=True)
    await check_path(store, session, None, [*turns[:2], edit])
    edit = make_turn(session, parent=turns[2].turn_id, depth=4)
    session = await store.commit_turn(session, edit)
    await check_path(store, session, note, [edit])
    first = make_turn(session, parent=None, depth=1)
    session = await store.commit_turn(session, first)
    await check_path(store, session, None, [first])


async def test_a_restore_brings_back_the_note(store: SessionStore) -> None:
    """A checkpoint from before a note was made, on a turn behind it, is sent the summary, too."""
    session, turns = await extend(store, await stored_session(store), 4)
    made = await store.add_checkpoint(session, make_checkpoint())
    session, note = await noted(store, turns, session, 3)
    session = await store.move_head(session, ToTurn(None), LATER)
    session = await store.move_head(session, ToCheckpoint(made.checkpoint_id), LATER)
    await check_path(store, session, note, turns[3:])


async def test_a_fork_has_the_notes_of_its_path(place: Place) -> None:
    """All of them, also when it goes back, and also when the origin is gone; later ones are its own."""
    store = place.store
    session, turns = await extend(store, await stored_session(store), 6)
    session, second = await noted(store, turns, session, 2)
    session, fourth = await noted(store, turns, session, 4)
    early = await store.fork_session(session, ToTurn(turns[0].turn_id), make_session("early"))
    await check_path(store, early, None, turns[:1])
    fork = await store.fork_session(session, ToTurn(turns[4].turn_id), make_session("fork"))
    await check_path(store, fork, fourth, turns[4:5])
    session, fifth = await noted(store, turns, session, 5)
    await check_path(store, fork, fourth, turns[4:5])
    await store.delete_session(session.key)
    store = await place.restart("boot-2")
    fork = await store.move_head(fork, Back(2), LATER)
    await check_path(store, fork, second, turns[2:3])
    fork, third = await noted(store, turns, fork, 3)
    await check_path(store, fork, third, [])
    assert fifth.note_id != third.note_id


async def test_only_committed_turns_of_the_session_take_a_note(store: SessionStore) -> None:
    """A failed, dropped, running, foreign or unknown one is TurnNotFound: nothing stored, nothing counted."""
    session, other = await stored_session(store, user_id="u"), await stored_session(store, "s2")
    session, turns = await extend(store, session, 2)
    _, (foreign,) = await extend(store, other, 1)
    bad, lost, busy = make_turn(session), make_turn(session), make_turn(session)
    await store.record_turn(session, failed(bad))
    await store.record_turn(session, dropped(lost))
    await store.start_turn(session, running(busy))
    await store.ping()
    before, usage = await current(store, session), await store.get_usage("", "u", 9)
    for turn_id in (bad.turn_id, lost.turn_id, busy.turn_id, foreign.turn_id, new_id()):
        with pytest.raises(TurnNotFound):
            await store.add_note(session, make_note(turn_id), SPENT)
    await check_path(store, before, None, turns)
    assert await store.get_usage("", "u", 9) == usage
    entries = await store.list_entries(session, None, 99, newest_first=False)
    assert not [entry for entry in entries if isinstance(entry, LoggedFact)]


async def test_an_old_incarnation_takes_no_note(store: SessionStore) -> None:
    """After a delete, also when the key is in use again: SessionNotFound, and the new one has none."""
    old, turns = await extend(store, await stored_session(store), 2)
    old, _ = await noted(store, turns, old, 1)
    await store.delete_session(old.key)
    new = await stored_session(store)
    with pytest.raises(SessionNotFound):
        await noted(store, turns, old, 2)
    assert await store.get_note(old) is None
    await check_path(store, new, None, [])


async def test_what_a_note_took_is_the_users(place: Place) -> None:
    """Its tokens count on the day it was made, as no turn; once, however often it is added."""
    session, turns = await extend(place.store, await stored_session(place.store, user_id="u"), 2)
    before = await place.store.get_usage("", "u", 9)
    note = make_note(turns[1].turn_id, created_at=T0)
    first = await place.store.add_note(session, note, SPENT)
    assert await place.store.add_note(session, note, SPENT) == first
    usage = await (await place.restart("boot-2")).get_usage("", "u", 9)
    assert (usage.turns, len(usage.days)) == (2, 1)
    assert usage.prompt_tokens == before.prompt_tokens + SPENT.prompt_tokens
    assert usage.completion_tokens == usage.days[0].completion_tokens == before.completion_tokens + 50


async def test_a_note_is_logged(store: SessionStore) -> None:
    """Once, with its id and its turn, however often it is added."""
    session, turns = await extend(store, await stored_session(store), 2)
    note = make_note(turns[0].turn_id, created_at=LATER)
    for _ in range(2):
        await store.add_note(session, note, SPENT)
    entries = await store.list_entries(session, None, 99, newest_first=False)
    assert [e for e in entries if isinstance(e, LoggedFact)] == [
        LoggedFact(1, LATER, Compacted(note.note_id, turns[0].turn_id))
    ]


async def test_notes_far_apart_on_a_long_path(place: Place) -> None:
    """Of 300 turns with a note every 50 each head is sent its nearest note and no turn from before it."""
    store = place.store
    session, turns = await extend(store, await stored_session(store), 300)
    notes = {}
    for depth in range(250, 0, -50):
        session, notes[depth] = await noted(store, turns, session, depth)
    await check_path(store, session, notes[250], turns[250:])
    store = await place.restart("boot-2")
    for depth in (249, 101, 100, 99, 50, 49):
        session = await store.move_head(session, ToTurn(turns[depth - 1].turn_id), LATER)
        nearest = depth // 50 * 50
        await check_path(store, session, notes.get(nearest), turns[nearest:depth])
    assert [turn.turn_id for turn in await store.list_branch(session, 99)] == [t.turn_id for t in turns[:49]]
