"""In whose name a request acts. ``namespace_of`` decides it, and nothing else does."""

from dataclasses import dataclass

from app.domain.errors import Forbidden, Unauthenticated
from app.domain.ids import SessionKey, parse_name
from app.domain.principal import Principal


@dataclass(frozen=True, slots=True)
class Namespace:
    """The sessions that a request can name.

    ``owner`` is the first part of their addresses, ``user_id`` whose a session is that is made there.
    ``listed`` is whose sessions lists show, ``None``: those of all owners. ``is_admin``: what is the
    operator's to say may be said.
    """

    owner: str
    user_id: str | None
    listed: str | None
    is_admin: bool

    @property
    def user_to_check(self) -> str | None:
        """Whose a session must be beyond its address: that says it all where there are owners."""
        return None if self.owner else self.user_id

    def key(self, session_id: str) -> SessionKey:
        return SessionKey(self.owner, session_id)


def namespace_of(caller: Principal, user_id: str | None) -> Namespace:
    """Return in whose name ``caller`` acts, who has named the user ``user_id``, or nobody.

    Where there are credentials, that is their user; only an admin may name another. Whether the
    user that is named exists makes no difference.

    Raises:
        Forbidden: it names somebody else, and is no admin's.
        InvalidInput: nobody can be called so.
        Unauthenticated: nobody is known to make it.
    """
    if caller.user_id is None:
        if not caller.is_admin:
            raise Unauthenticated
        return Namespace(caller.owner, user_id, caller.owner, is_admin=True)
    if user_id is None:
        listed = None if caller.is_admin else caller.owner
        return Namespace(caller.owner, caller.user_id, listed, caller.is_admin)
    if user_id != caller.user_id:
        if not caller.is_admin:
            raise Forbidden
        parse_name(user_id, "user_id")
    return Namespace(user_id, user_id, user_id, caller.is_admin)


def require_operator(namespace: Namespace) -> None:
    """Refuse what is the operator's to say.

    Raises:
        Forbidden
    """
    if not namespace.is_admin:
        raise Forbidden
