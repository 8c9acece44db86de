"""The ways in which a call of the store has its work done: in one statement or many, soon or in patience."""

from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from app.domain.session import LifeSpan
from app.stores.postgres.link import TOTAL_S, Connection, Link
from app.stores.postgres.refusal import TookTooLong
from app.stores.postgres.unit import RecordCache, Unit, View
from app.stores.sealing import Sealer

MOVE_S = 600.0
"""How long a step of a move may take: a session may be large, and nobody waits."""
REMOVE_S = 10.0
"""How long the removal of sessions may take where it is seen to be going on."""

_WAIT = "SET LOCAL lock_timeout = 0"

P = ParamSpec("P")
T = TypeVar("T")
Reading = Callable[Concatenate[View, P], Coroutine[Any, Any, T]]
Writing = Callable[Concatenate[Unit, P], Coroutine[Any, Any, T]]


class Calls:
    """What every call needs; what a write notes of records counts once it has succeeded."""

    def __init__(self, link: Link, life: LifeSpan, sealer: Sealer) -> None:
        self._link = link
        self._life = life
        self._sealer = sealer
        self._records = RecordCache()
        self._count: int | None = None  # of sessions

    async def _read(self, work: Reading[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Have one statement done that changes nothing."""
        return await self._link.run(lambda connection: work(self._view(connection), *args, **kwargs))

    async def _look(self, work: Reading[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Have several statements done that change nothing and see one moment."""
        return await self._link.transact(
            lambda connection: work(self._view(connection), *args, **kwargs), writes=False
        )

    async def _write(self, work: Writing[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Have a transaction done that must not be done twice."""
        return await self._transact(lambda unit: work(unit, *args, **kwargs), False, TOTAL_S)

    async def _repeat(self, work: Writing[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As ``_write``, for what changes nothing when it is done again."""
        return await self._transact(lambda unit: work(unit, *args, **kwargs), True, TOTAL_S)

    async def _remove(self, work: Writing[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As ``_write``; but where the server works on it for too long, once more with the time that large
        sessions take. One that does not answer is given up as soon as ever.
        """

        async def patient(unit: Unit) -> T:
            await unit.connection.execute(_time_of(REMOVE_S))
            return await work(unit, *args, **kwargs)

        try:
            return await self._write(work, *args, **kwargs)
        except TookTooLong:
            return await self._transact(patient, False, REMOVE_S)

    async def _move_out(self, work: Reading[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        async def patient(connection: Connection) -> T:
            await connection.execute(f"{_time_of(MOVE_S)}; {_WAIT}")
            return await work(self._view(connection), *args, **kwargs)

        return await self._link.transact(patient, writes=False, limit_s=MOVE_S)

    async def _move_in(self, work: Writing[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        async def patient(unit: Unit) -> T:
            await unit.connection.execute(f"{_time_of(MOVE_S)}; {_WAIT}")
            return await work(unit, *args, **kwargs)

        return await self._transact(patient, True, MOVE_S)

    def _view(self, connection: Connection) -> View:
        return View(connection, self._sealer)

    async def _transact(
        self, work: Callable[[Unit], Coroutine[Any, Any, T]], repeats: bool, limit_s: float
    ) -> T:
        async def bound(connection: Connection) -> tuple[T, Unit]:
            unit = Unit(connection, self._sealer, self._life)
            return await work(unit), unit

        result, unit = await self._link.transact(bound, repeats=repeats, limit_s=limit_s)
        self._records.settle(unit)
        if self._count is not None:
            self._count += unit.added
        return result


def _time_of(limit_s: float) -> str:
    """Return what lets the server work on a statement for so long."""
    return f"SET LOCAL statement_timeout = {round(limit_s * 1000)}"
