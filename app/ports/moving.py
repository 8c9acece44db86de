"""How a store's whole content moves to another."""

from typing import NamedTuple, Protocol

from app.domain.dump import RestDump, SessionDump
from app.domain.ids import SessionKey
from app.domain.session import Session
from app.ports.store import SessionStore


class Resealed(NamedTuple):
    """How many states of users and applications were stored anew, and how many are broken."""

    states: int
    broken: int


class MovableStore(SessionStore, Protocol):
    """A store that can be copied. Nobody else uses it meanwhile."""

    async def list_after(self, key: SessionKey | None, limit: int) -> tuple[SessionKey, ...]:
        """Return up to ``limit`` sessions behind ``key``, ascending by (owner, session id)."""

    async def dump_session(self, key: SessionKey) -> SessionDump | None:
        """Return the session with all that belongs to it.

        Raises:
            SnapshotUnreadable: something of it is broken.
        """

    async def load_session(self, dump: SessionDump, *, over: Session | None = None) -> None:
        """Store it as it is, in the place of what is there under its key; no usage is counted.

        What was there counts as never created: a session that is stored twice was created once.
        Who has its lease keeps it.

        A turn that runs in the dump is stored as failed (``SessionDump.settled``). The idempotency
        keys are its turns' from now on, whatever other turn of the store had them.

        Raises:
            PreconditionFailed: what is there is not ``over``; nothing is stored.
        """

    async def dump_rest(self) -> RestDump:
        """Return what belongs to no session."""

    async def load_rest(self, rest: RestDump) -> None:
        """Store it in the place of what is there, after the last ``load_session``."""

    async def reseal_rest(self) -> Resealed:
        """Store what belongs to no session as a new write would, each part of it in one step and unchanged.

        What cannot be read stays as it is.
        """

    async def scrub(self) -> None:
        """Remove from the database's files what was replaced or deleted, as far as it lets one.

        It takes as long as writing everything anew, and as much room.

        Raises:
            StoreUnavailable: it cannot; nothing is lost.
        """
