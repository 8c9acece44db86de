"""One thread that writes: what waits together is committed together.

The event loop puts works into a queue; the thread takes up to ``GROUP_LIMIT`` of
them, runs them in one transaction and commits once, so that they share one sync of
the disk. A work that raises before it has written anything fails by itself; of one that
raises later everything is rolled back, and the others run without it: savepoints would
cost each work what so only such a one costs. Always true:

* works run in the order in which they were submitted;
* a caller hears of its work only after the commit, and then all callers of a
  group hear in one call to the event loop;
* a caller that was cancelled does not undo its work, and its result is dropped;
* a work may run twice, but only after everything it did was rolled back;
* if the thread dies, everybody who waits hears it, and nobody waits any more.

While the disk refuses writes (``trouble``), one small write a second finds out
whether it takes them again; any other that succeeds tells as well. ``is_stuck`` is
set by a caller whose patience ended, and ends with the next result of any work.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Protocol, TypeVar

import apsw

from app.domain.errors import AgentPoolError, StoreUnavailable
from app.stores.sqlite.cache import RecordCache
from app.stores.sqlite.file import unavailable
from app.stores.sqlite.unit import ADD_TO_COUNTERS, Unit

GROUP_LIMIT = 64
PROBE_S = 1.0
DISK_ERRORS = (apsw.FullError, apsw.IOError, apsw.ReadOnlyError, apsw.CantOpenError, OSError)
"""What the next write will most likely hear, too, whatever it is."""
READ_ERRORS = (apsw.SQLITE_IOERR_READ, apsw.SQLITE_IOERR_SHORT_READ)
"""But not these: a page that cannot be read says nothing about writing."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Keeper(Protocol):
    """Opens and closes the files, in the writer's thread."""

    def open(self) -> Unit: ...
    def close(self, unit: Unit) -> None: ...
    def give_up(self) -> None:
        """Make a waiting ``open`` fail soon; called in the event loop's thread."""


Work = Callable[[Unit], T]


class _Item(NamedTuple):
    work: Work[Any]
    future: "asyncio.Future[Any] | None"  # None: nobody waits
    label: str  # what the log calls it
    is_posted: bool = False  # it is the log that hears of its failure
    is_alone: bool = False  # it makes a group of its own, outside of any transaction


class _Failed(NamedTuple):
    error: BaseException


class Writer:
    """The thread and its queue. Every method is called on the event loop's thread."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._held: list[_Item | None] = []
        self._is_stopping = False
        self._is_committing = False
        self._has_written = False
        self._done = 0  # works of the group under way
        self._refusal = "The store is closed."
        self._next_probe: asyncio.TimerHandle | None = None
        self.trouble: BaseException | None = None
        self.is_stuck = False
        self.unit: Unit | None = None
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.transactions = 0
        self.cut_line = asyncio.Lock()  # in which those stand who wait for the WAL to be cut
        self.records = RecordCache()
        # A daemon: a store that nobody closed must not keep the interpreter from ending.
        self._thread = Thread(target=self._main, name="sqlite-writer", daemon=True)

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    @property
    def is_open(self) -> bool:
        return self.unit is not None and self.opened.done() and not self._is_stopping

    def start(self) -> None:
        self._thread.start()

    def submit(self, work: Work[T], label: str) -> "asyncio.Future[T]":
        """Queue ``work``; the future ends when its group is committed or rolled back."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._put(_Item(work, future, label))
        return future

    def submit_alone(self, work: Work[T], label: str) -> "asyncio.Future[T]":
        """As ``submit``, for what cannot be done in a transaction: it is called without one, by itself."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._put(_Item(work, future, label, is_alone=True))
        return future

    def post(self, work: Work[Any], label: str) -> "asyncio.Future[None]":
        """Queue ``work`` for which nobody need wait; its failure is logged, and the future has no error."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._put(_Item(work, future, label, is_posted=True))
        return future

    def give_up_on(self, future: "asyncio.Future[Any]") -> None:
        """Let who waits for ``future`` hear that it takes too long; the thread may do the work yet."""
        if not future.done():
            self.is_stuck = True
            _fail(future, StoreUnavailable("The database takes too long to write.", outcome_unknown=True))

    def stop(self) -> None:
        """Let the thread close everything after the last work that was accepted."""
        if not self._is_stopping:
            self._is_stopping = True
            self._keeper.give_up()
            self._queue.put(None)

    def _put(self, item: _Item) -> None:
        # Submitting and stopping happen on one thread, so nothing can follow the end mark.
        if self._is_stopping:
            raise StoreUnavailable(self._refusal)
        self._queue.put(item)

    def _end(self, group: list[_Item], outcomes: list[Any]) -> None:
        self.is_stuck = False
        _end_all(group, outcomes)

    def _end_committed(self, group: list[_Item], outcomes: list[Any]) -> None:
        # The records first: whoever hears of a write finds it done.
        self.records.settle(is_committed=True)
        self._end(group, outcomes)

    def _expect_probe(self) -> None:
        if self._next_probe is None:
            self._next_probe = self._loop.call_later(PROBE_S, self._post_probe)

    def _post_probe(self) -> None:
        self._next_probe = None
        if self.trouble is not None and not self._is_stopping:
            self._put(_Item(_probe, None, ""))

    def _mourn(self, group: list[_Item]) -> None:
        """The thread has died over ``group``: tell all who wait, and accept nothing more."""
        self._is_stopping = True
        self._refusal = "The database's writing thread has died; the log says why."
        _end_all(group, [_Failed(StoreUnavailable(self._refusal, outcome_unknown=True)) for _ in group])
        while not self._queue.empty():  # nobody else takes from it now
            item = self._queue.get_nowait()
            if item is not None:
                _end_all([item], [_Failed(StoreUnavailable(self._refusal))])

    # From here on: the writer's thread.

    def _main(self) -> None:
        try:
            self.unit = unit = self._keeper.open()
        except BaseException as error:
            self._tell(partial(_fail, self.opened, error))
            self._tell(partial(_resolve, self.closed, None))
            return
        self._tell(partial(_resolve, self.opened, None))
        group: list[_Item] | None = []
        try:
            while (group := self._next_group()) is not None:
                self._run(unit, group)
        except BaseException:
            # Not raised again: this is the top of the thread, and whom it concerns is told.
            _log.critical("the writing thread has died", exc_info=True)
            self._tell(partial(self._mourn, group or []))
        finally:
            self._close(unit)

    def _close(self, unit: Unit) -> None:
        try:
            self._keeper.close(unit)
        except Exception:
            _log.exception("closing the database failed")
        finally:
            self._tell(partial(_resolve, self.closed, None))

    def _next_group(self) -> list[_Item] | None:
        """Wait for work and return what waits, ``None`` at the end; some make a group of their own."""
        first = self._held.pop() if self._held else self._queue.get()
        if first is None:
            return None
        group = [first]
        try:
            while len(group) < GROUP_LIMIT and not _is_single(first):
                item = self._queue.get_nowait()
                if item is None or _is_single(item):
                    self._held.append(item)  # for the next call
                    break
                group.append(item)
        except Empty:
            pass
        return group

    def _run(self, unit: Unit, group: list[_Item]) -> None:
        try:
            outcomes = self._transact(unit, group)
            end = self._end_committed
        except Exception as error:
            is_unknown = self._is_committing and isinstance(error, apsw.IOError)
            if self._is_committing:
                self._tell(partial(self.records.settle, is_committed=False))
            self._roll_back(unit)
            if len(group) > 1 and not is_unknown:
                for part in _parts(group, self._done):
                    self._run(unit, part)
                return
            outcomes = [_Failed(_translated(error, is_unknown)) for _ in group]
            end = self._end
        self._judge(outcomes)
        self._log_failures(group, outcomes)
        self._tell(partial(end, group, outcomes))

    def _transact(self, unit: Unit, group: list[_Item]) -> list[Any]:
        self._is_committing = self._has_written = False
        if group[0].is_alone:
            result = group[0].work(unit)
            self.records.expect({})
            return [result]
        before = unit.connection.total_changes()
        unit.connection.execute("BEGIN IMMEDIATE")
        outcomes: list[Any] = []
        for self._done, item in enumerate(group):
            outcomes.append(self._run_item(unit, item))
        self._done = len(group)
        unit.write_counts()
        self.records.expect(unit.take_notes())
        self._is_committing = True
        unit.connection.execute("COMMIT")
        unit.end_group()
        self.transactions += 1
        self._has_written = unit.connection.total_changes() != before
        return outcomes

    def _run_item(self, unit: Unit, item: _Item) -> Any:
        before = unit.connection.total_changes()
        try:
            result = item.work(unit)
        except Exception as error:
            # What it has written can only be undone with the works before it. A full disk
            # may have ended the whole transaction.
            if unit.connection.total_changes() != before or not unit.connection.in_transaction:
                raise
            unit.forget_work()
            return _Failed(_translated(error, False))
        unit.end_work()
        return result

    def _roll_back(self, unit: Unit) -> None:
        unit.forget_group()
        try:
            if unit.connection.in_transaction:
                unit.connection.execute("ROLLBACK")
        except apsw.Error:
            _log.exception("rolling back failed")

    def _judge(self, outcomes: list[Any]) -> None:
        """Note whether the disk takes writes."""
        errors = [outcome.error for outcome in outcomes if isinstance(outcome, _Failed)]
        trouble = next((error for error in errors if _is_of_disk(error.__cause__)), None)
        if trouble is not None:
            if self.trouble is None:
                _log.error("the disk refuses writes; no turn begins until it takes them: %s", trouble)
            self.trouble = trouble
            self._tell(self._expect_probe)
        elif self._has_written and self.trouble is not None:
            self.trouble = None
            _log.warning("the disk takes writes again")

    def _log_failures(self, group: list[_Item], outcomes: list[Any]) -> None:
        for item, outcome in zip(group, outcomes, strict=True):
            if item.is_posted and isinstance(outcome, _Failed):
                _log.error("%s failed: %s", item.label, outcome.error, exc_info=outcome.error)

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            pass  # the event loop is closed, so nobody is left to hear


def _is_single(item: _Item) -> bool:
    return item.is_alone or item.work is _probe


def _parts(group: list[_Item], done: int) -> list[list[_Item]]:
    """Return what a group that was rolled back runs as instead: one by one, or without what broke it."""
    if done == len(group):
        return [[item] for item in group]
    return [part for part in (group[:done], [group[done]], group[done + 1 :]) if part]


def _is_of_disk(cause: BaseException | None) -> bool:
    return isinstance(cause, DISK_ERRORS) and getattr(cause, "extendedresult", None) not in READ_ERRORS


def _probe(unit: Unit) -> None:
    unit.connection.execute(ADD_TO_COUNTERS.format(rows="('probes', 1)"))


def _end_all(group: list[_Item], outcomes: list[Any]) -> None:
    for item, outcome in zip(group, outcomes, strict=True):
        if item.future is None:
            continue
        if isinstance(outcome, _Failed) and not item.is_posted:
            _fail(item.future, outcome.error)
        else:
            _resolve(item.future, None if item.is_posted else outcome)


def _resolve(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():  # done: its caller was cancelled
        future.set_result(result)


def _fail(future: "asyncio.Future[Any]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _translated(error: Exception, is_unknown: bool) -> BaseException:
    if isinstance(error, AgentPoolError) or not isinstance(error, apsw.Error | OSError):
        return error
    failure = unavailable(error, outcome_unknown=is_unknown)
    failure.__cause__ = error
    return failure
