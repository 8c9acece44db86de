"""Who makes a request."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever a credential stands for.

    ``owner`` is the first part of the address of every session that is theirs; ``""`` is the one
    namespace of a server that asks for no credential. ``user_id`` is the user, ``None`` where there
    is none to know. ``credential`` names, for the audit log, by what they came in; it is no secret.
    """

    owner: str
    is_admin: bool
    user_id: str | None = None
    credential: str = ""


ANYONE = Principal(owner="", is_admin=True, credential="none")
"""Everybody, where nobody is asked for a credential."""

NOBODY = Principal(owner="", is_admin=False)
"""Whoever asks, without a credential, for what is there for everybody where others need one."""

NODE = Principal(owner="", is_admin=True, credential="node")
"""Another node of the same store that asks on its own account."""


def principal_of(user_id: str, *, is_admin: bool, credential: str) -> Principal:
    """Return the principal of a credential that belongs to a user, who owns their sessions."""
    return Principal(owner=user_id, is_admin=is_admin, user_id=user_id, credential=credential)
