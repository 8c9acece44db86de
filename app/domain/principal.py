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
