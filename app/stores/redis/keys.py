"""How what people call things becomes a part of a key, from which no text can get out.

Everything but letters, digits and ``_.-~`` is percent-encoded, so that no name holds a brace, a
colon, a slash, a line break or a byte that is no ASCII.
"""

from urllib.parse import quote, unquote

from app.domain.ids import SessionKey, to_id_bytes
from app.domain.session import Session
from app.domain.state import StateScope


def tag_of(key: SessionKey) -> str:
    """Return the hash tag of a session: what stands between the braces in each of its keys."""
    return f"{_encoded(key.owner)}/{_encoded(key.session_id)}"


def key_of(tag: str) -> SessionKey:
    """Return what ``tag_of`` was given."""
    owner, _, session_id = tag.partition("/")
    return SessionKey(_decoded(owner), _decoded(session_id))


def member_of(session: Session) -> bytes:
    """Return what stands for this incarnation in the indexes: equal times are in the order of uids."""
    return to_id_bytes(session.uid) + tag_of(session.key).encode()


def key_of_member(member: bytes) -> SessionKey:
    return key_of(member[16:].decode())


def order_of(key: SessionKey) -> bytes:
    """Return what sorts sessions by (owner, session id)."""
    return f"{key.owner}\0{key.session_id}".encode("utf-8", "surrogatepass")


def user_of(owner: str, user_id: str) -> str:
    return f"{_encoded(owner)}/{_encoded(user_id)}"


def of_user(name: str) -> tuple[str, str]:
    """Return what ``user_of`` was given."""
    owner, _, user_id = name.partition("/")
    return _decoded(owner), _decoded(user_id)


def bound_name(owner: str, key: str) -> str:
    """Return the name of an idempotency key."""
    return f"{_encoded(owner)}/{_encoded(key)}"


def scope_name(scope: StateScope) -> str:
    user = "" if scope.user_id is None else f"{_encoded(scope.owner)}/{_encoded(scope.user_id)}"
    return f"{_encoded(scope.app_name)}/{user}"


def of_scope(name: str) -> StateScope:
    """Return what ``scope_name`` was given."""
    app_name, _, user = name.partition("/")
    if not user:
        return StateScope(_decoded(app_name))
    owner, _, user_id = user.partition("/")
    return StateScope(_decoded(app_name), _decoded(owner), _decoded(user_id))


def indexes_of(session: Session) -> list[str]:
    """Return the indexes that the session is listed in."""
    owner, agent = _encoded(session.key.owner), _encoded(session.agent_id)
    names = ["all", f"o:{owner}", f"a:{owner}/{agent}", f"A:{agent}"]
    if session.user_id is not None:
        names += [f"u:{user_of(session.key.owner, session.user_id)}", f"U:{_encoded(session.user_id)}"]
    return names


def index_for(owner: str | None, user_id: str | None, agent_id: str | None) -> str:
    """Return the narrowest index with every session of these."""
    if user_id is not None:
        return f"U:{_encoded(user_id)}" if owner is None else f"u:{user_of(owner, user_id)}"
    if agent_id is not None:
        agent = _encoded(agent_id)
        return f"A:{agent}" if owner is None else f"a:{_encoded(owner)}/{agent}"
    return "all" if owner is None else f"o:{_encoded(owner)}"


def _encoded(text: str) -> str:
    return quote(text, safe="", errors="surrogatepass")


def _decoded(text: str) -> str:
    return unquote(text, errors="surrogatepass")
