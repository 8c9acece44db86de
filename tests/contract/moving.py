"""Stores that have some of everything, and all that the port lets one read of them."""

from dataclasses import dataclass, field, replace
from typing import Any

from app.domain.branch import Back, ToCheckpoint, ToTurn
from app.domain.checkpoint import AutoCheckpoint
from app.domain.dump import SessionDump, canonical
from app.domain.errors import AgentPoolError
from app.domain.idempotency import Binding, fingerprint
from app.domain.ids import SessionKey
from app.domain.journal import Entry
from app.domain.session import Session, SessionChange, SessionQuery, SessionStatus
from app.domain.state import StateScope
from app.domain.turn import (
    AssistantText,
    CancelReason,
    ToolCall,
    ToolCalls,
    ToolResult,
    ToolResults,
    Turn,
    TurnStatus,
    Usage,
    UserText,
)
from app.ports import MovableStore

from .builders import (
    T0,
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

WEIRD = "NUL \x00, lone \ud800 half, \u2028, 🤦🏽‍♂️ 您好, ' \" \\ {} %s"
ODD: dict[str, Any] = {"": [None, {"x": WEIRD}], "🦊": {"a": 2**70, "b": 1.5, "c": 1.0}, "t": True, "n": 1}
LATER = T0 + 50_000
SCOPES = [
    StateScope("default"),
    StateScope("default", "", "u"),
    StateScope("default", "bob", "u"),
    StateScope("über"),
]
OWNERS = ["", "alice", "bob", "Ömer 您"]


@dataclass
class Full:
    """What ``fill`` made: each session's key, and every idempotency key with its owner."""

    keys: list[SessionKey] = field(default_factory=list)
    bound: list[tuple[str, str]] = field(default_factory=list)


async def fill(store: MovableStore) -> Full:
    """Put some of everything into ``store``; nothing of it happens at the same time as anything else."""
    full = Full()
    origin = await _tree(store, full)
    await _kept_and_tools(store, full)
    await _marked(store, full)
    fork = make_session("fork", user_id="u", created_at=LATER, last_accessed=LATER + 7, updated_at=LATER)
    full.keys.append((await store.fork_session(origin, ToTurn(origin.head), fork)).key)
    for number, scope in enumerate(SCOPES):
        for step in range(number + 1):
            await store.patch_shared(scope, {"step": step, "odd": ODD}, LATER)
    gone, _ = await extend(store, await stored_session(store, "gone", user_id="v"), 2)
    await store.delete_session(gone.key)
    return full


async def _tree(store: MovableStore, full: Full) -> Session:
    """Branches, edits, a failed and a dropped turn, notes, checkpoints, facts, a state at each turn."""
    session = make_session("tree", user_id="u", window_id="w", title="Title 您", state={"start": ODD})
    session = replace(session, metadata=ODD, params={"temperature": 0.5}, template={"context": {"a": "b"}})
    await store.create_session(session)
    full.keys.append(session.key)
    for number in range(3):
        bound = Binding("", f"key-{number}", fingerprint(number))
        turn = make_turn(session, f"{number}: {WEIRD}", f"{number}: {WEIRD}", binding=bound)
        full.bound.append(("", bound.key))
        session = await store.commit_turn(session, turn, checkpoint=AutoCheckpoint(new_id(), 2))
        session = await store.patch_state(session.key, {"n": number}, session.updated_at + 1)
    first = (await store.list_branch(session, 9))[0].turn_id
    named = await store.add_checkpoint(session, make_checkpoint(label=WEIRD, data=ODD, created_at=LATER))
    session = await store.add_note(session, make_note(first, WEIRD), Usage(7, 3))
    session = await store.add_note(session, make_note(session.head or "", "Later."), Usage(1, 1))
    at = session.updated_at + 10
    refused = replace(failed(make_turn(session, started_at=at)), binding=Binding("", "released", b"f" * 16))
    await store.record_turn(session, refused)
    await store.record_turn(session, dropped(make_turn(session, started_at=at + 2000)))
    full.bound.append(("", "released"))
    session = await _reread(store, session)
    edit = make_turn(session, "edit", parent=first, depth=2, started_at=at + 4000)
    session = await store.commit_turn(session, edit, resets_state=True)
    session = await store.patch_state(session.key, {"start": None, "edited": True}, session.updated_at + 1)
    session = await store.move_head(session, Back(2), session.updated_at + 10)
    session = await store.commit_turn(session, make_turn(session, "other root", started_at=at + 9000))
    session = await store.move_head(session, ToCheckpoint(named.checkpoint_id), session.updated_at + 10)
    again = make_turn(session, "regenerated", parent=edit.parent, depth=2, started_at=session.updated_at + 10)
    return await store.commit_turn(session, again)


async def _kept_and_tools(store: MovableStore, full: Full) -> None:
    """A turn with every kind of message, one that was cancelled and kept, and a root that is gone back to."""
    session = await stored_session(store, "tools", owner="alice", now=T0 + 1, user_id="u", agent_id="other")
    full.keys.append(session.key)
    calls = ToolCalls((ToolCall("c1", "f", '{"x": 1}'), ToolCall("c2", "g", WEIRD)), "text", "reasoning")
    results = ToolResults((ToolResult("c1", "f", WEIRD), ToolResult("c2", "g", "no", is_error=True)))
    said = (UserText("hi"), calls, results, AssistantText("done", "because"))
    turn = make_turn(session, "hi", messages=said, reply="textdone", tool_seqs=(3, 4, 6, 7), last_seq=9)
    session = await store.commit_turn(session, turn)
    cut = (UserText("hi"), AssistantText("half", interrupted=True))
    kept = make_turn(session, "hi", "half", messages=cut, status=TurnStatus.CANCELLED, kept=True)
    binding = Binding("alice", "key-0", fingerprint("alice"))
    kept = replace(kept, cancel_reason=CancelReason.USER, finish_reason=None, binding=binding)
    full.bound.append(("alice", "key-0"))
    session = await store.commit_turn(session, kept)
    await store.move_head(session, ToTurn(None), session.updated_at + 10)


async def _marked(store: MovableStore, full: Full) -> None:
    """Sessions of every status, of several owners and users, with the same ids."""
    for number, owner in enumerate(OWNERS):
        for name in ("same", "Same", "s:1", "s~1"):
            now = T0 + 100 * number + len(full.keys) + 10
            session = await stored_session(store, name, owner=owner, now=now, user_id=f"u{number % 2}")
            full.keys.append(session.key)
    archived, idle, expired, forever = full.keys[-4:]
    await store.update_session(archived, SessionChange(status=SessionStatus.ARCHIVED), LATER)
    await store.update_session(idle, SessionChange(status=SessionStatus.IDLE, title="idle"), LATER)
    await store.update_session(expired, SessionChange(ttl_s=1), LATER)
    await store.update_session(forever, SessionChange(ttl_s=0, provider="p", model="m"), LATER)


async def start_running(store: MovableStore, session_id: str = "runs") -> tuple[Session, str]:
    """Leave a session with a turn that runs and has a key; return both."""
    session = await stored_session(store, session_id)
    turn = make_turn(session, binding=Binding("", "of-running", b"r" * 16))
    await store.start_turn(session, running(turn))
    await store.ping()
    return await _reread(store, session), turn.turn_id


async def copy_all(source: MovableStore, target: MovableStore) -> None:
    for key in await source.list_after(None, 999):
        await target.load_session(await get_dump(source, key))
    await target.load_rest(await source.dump_rest())


async def get_dump(store: MovableStore, key: SessionKey) -> SessionDump:
    dump = await store.dump_session(key)
    assert dump is not None
    return dump


async def dumped(store: MovableStore) -> dict[str, str]:
    """Return all that a store gives to another, by session."""
    keys = await store.list_after(None, 999)
    found = {f"{key.owner}/{key.session_id}": canonical(await get_dump(store, key)).decode() for key in keys}
    return found | {"": canonical(await store.dump_rest()).decode()}


async def all_reads(store: MovableStore, full: Full) -> dict[str, Any]:
    """Return what every read of the port says, without what differs from store to store (cursors, bytes)."""
    await store.expire_and_purge(LATER, 0)
    found: dict[str, Any] = {"stats": await store.get_session_stats()}
    for key in full.keys:
        session = await store.find_session(key)
        assert session is not None
        found[f"session {key}"] = await _reads_of(store, session)
    found |= {f"bound {one}": await store.find_bound(*one) for one in full.bound}
    found |= {f"shared {scope}": await store.get_shared(scope) for scope in SCOPES}
    for owner in OWNERS:
        found[f"sessions of {owner}"] = await _list(store, SessionQuery(owner=owner, now=LATER))
        for user in ("u", "v", "u0", "u1"):
            name = f"{owner}/{user}"
            query = SessionQuery(owner=owner, now=LATER, user_id=user)
            found[f"usage of {name}"] = await store.get_usage(owner, user, 9)
            found[f"sessions of user {name}"] = await _list(store, query)
            found[f"keys of {name}"] = sorted(await store.list_keys(owner, user_id=user, limit=99))
            found[f"oldest of {name}"] = sorted(s.uid for s in await store.list_oldest(owner, user, 99))
    for status in SessionStatus:
        found[f"sessions {status}"] = await _list(store, SessionQuery(owner=None, now=LATER, status=status))
    for fits in ({"agent_id": "other"}, {"window_id": "w"}, {"text": "title"}, {"text": "s~"}):
        found[f"sessions {fits}"] = await _list(store, SessionQuery(owner=None, now=LATER, **fits))  # type: ignore[arg-type]
    return found


async def _reads_of(store: MovableStore, session: Session) -> dict[str, Any]:
    turns = (await store.list_turns(session, 99)).turns
    committed = [None, *(turn.turn_id for turn in turns if turn.is_committed)]
    places = [await store.at_turn(session, turn_id) for turn_id in committed]
    checkpoints = await store.list_checkpoints(session, 99)
    return {
        "session": session,
        "turns": turns,
        "each turn": [await store.get_turn(session, turn.turn_id) for turn in turns],
        "branch": await store.list_branch(session, 99),
        "places": places,
        "paths": [replace(await store.load_path(place), stored_bytes=0) for place in places],
        "notes": [await store.get_note(place) for place in places],
        "story": _told(await store.list_entries(session, None, 99, newest_first=False)),
        "story, backwards": _told(await store.list_entries(session, None, 99, newest_first=True)),
        "checkpoints": (checkpoints.checkpoints, checkpoints.total),
        "each checkpoint": [
            await store.get_checkpoint(session, one.checkpoint_id) for one in checkpoints.checkpoints
        ],
    }


def _told(entries: tuple[Entry, ...]) -> list[Entry]:
    # Whether a turn is on the branch is not promised here.
    return [replace(entry, on_branch=False) if isinstance(entry, Turn) else entry for entry in entries]


async def _list(store: MovableStore, query: SessionQuery) -> tuple[list[Session], int | None]:
    page = await store.list_sessions(query)
    return sorted(page.sessions, key=lambda session: session.key), page.total


async def _reread(store: MovableStore, session: Session) -> Session:
    found = await store.find_session(session.key)
    assert found is not None
    return found


async def refusal_of(store: MovableStore, session: Session, turn_id: str) -> str:
    """Return the code with which going to a turn is refused."""
    try:
        await store.at_turn(session, turn_id)
    except AgentPoolError as error:
        return error.code
    return ""
