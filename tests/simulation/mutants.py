"""Turn engines and tables with one mistake each, each one that a known system, or this one, has made.

A ``Mutant`` replaces methods while it is in force; nothing else of the services changes.
"""

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from app.domain.chat import OnBusy
from app.domain.errors import AgentPoolError, SessionNotFound, StoreUnavailable
from app.domain.events import TurnFinished
from app.domain.stats import DiscardCause, EvictionCause
from app.domain.turn import CancelReason
from app.pool.live import Activator
from app.pool.manager import AgentManager
from app.pool.slot import SlotState, TicketKind
from app.pool.table import PoolTable
from app.services.chat import ChatService
from app.services.conductor import Conductor
from app.services.holds import Holds
from app.services.landing import Landing
from app.services.turns import Claim, Flight, FlightState, Turns
from tests.fakes import new_ids

# -- tables


class KeepsLateIdlers(PoolTable):
    """An agent whose turn ends during the drain stays live."""

    def _rest(self, slot):
        draining, self.is_draining = self.is_draining, False
        try:
            return super()._rest(slot)
        finally:
            self.is_draining = draining


class LeaksThePlaceOfAFailedLoad(PoolTable):
    """Those who waited are told, and the slot stays as if it were still loading."""

    def load_failed(self, slot, error):
        return self._refuse_turns(slot, error) if self._is_loading(slot) else []


class ForgetsALoad(PoolTable):
    """When the last who waits for a load leaves, its slot goes, too: the next turn loads a second time."""

    def leave(self, ticket, now):
        slot = ticket.slot
        effects = super().leave(ticket, now)
        if slot is not None and slot.state is SlotState.LOADING and not slot.waiters:
            self._remove(slot)
        return effects


TABLES = (KeepsLateIdlers, LeaksThePlaceOfAFailedLoad, ForgetsALoad)


# -- turns


@dataclass(frozen=True)
class Mutant:
    """``changes`` are (class, name of its method, what stands in for it)."""

    name: str
    changes: tuple[tuple[type, str, Any], ...]

    @contextmanager
    def in_force(self):
        patches = [patch.object(*change) for change in self.changes]
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in patches:
                each.stop()


MUTANTS: list[Mutant] = []


def mutant(*places: tuple[type, str]) -> Callable[[Any], Any]:
    """Make a mutant of a function that gets the methods it replaces and returns the new ones."""

    def register(make: Callable[..., Any]) -> Any:
        originals = [getattr(owner, name) for owner, name in places]
        made = make(*originals)
        methods = made if isinstance(made, tuple) else (made,)
        changes = tuple((*place, method) for place, method in zip(places, methods, strict=True))
        MUTANTS.append(Mutant(make.__name__, changes))
        return make

    return register


@mutant((Landing, "_let_go"))
def keeps_the_agent_of_a_turn_that_went_wrong(let_go):
    return lambda self, air, cause: air.lease.give_back()


@mutant((Landing, "_commit"))
def says_finished_before_the_commit(commit):
    async def early(self, air, turn):
        if not turn.kept:
            end = TurnFinished(turn.reply, "stop", turn.usage, turn.turn_id, 2 * turn.depth, turn.depth, 0, 0)
            air.flight.log.close(end)
        return await commit(self, air, turn)

    return early


@mutant((Landing, "_commit"))
def gives_the_lease_back_before_the_commit(commit):
    async def early(self, air, turn):
        agent = air.lease.agent
        agent.stamp = replace(agent.stamp, head=turn.turn_id)
        air.lease.give_back()
        air.lease._agent = agent
        return await commit(self, air, turn)

    return early


@mutant((Landing, "_commit_surely"))
def repeats_a_commit_in_doubt_under_a_new_id(commit):
    make = new_ids(1_000_000)

    async def again(self, air, turn):
        while True:
            try:
                return await self._store.commit_turn(air.session, turn)
            except StoreUnavailable as error:
                if not error.outcome_unknown:
                    raise
                turn = replace(turn, turn_id=make())

    return again


@mutant((Landing, "_commit_surely"))
def calls_a_commit_in_doubt_failed(commit):
    async def sure(self, session, turn):
        try:
            return await self._store.commit_turn(session, turn)
        except StoreUnavailable as error:
            error.outcome_unknown = False
            raise

    return sure


@mutant((Landing, "record_failed"))
def records_no_failure(record_failed):
    async def nothing(self, air, error):
        pass

    return nothing


@mutant((Landing, "_record_later"))
def gives_up_a_record_when_the_store_is_away(record_later):
    async def nothing(self, session, turn, pauses_s):
        pass

    return nothing


@mutant((Flight, "cancel"))
def cancels_a_turn_that_is_being_stored(cancel):
    def too_late(self, reason, *, keep_partial):
        if self.state is FlightState.COMMITTING and self.cancel_reason is None:
            self.cancel_reason = reason
            self.task.cancel()
            return True
        return cancel(self, reason, keep_partial=keep_partial)

    return too_late


@mutant((Flight, "cancel"))
def keeps_the_text_of_every_cancelled_turn(cancel):
    return lambda self, reason, *, keep_partial: cancel(self, reason, keep_partial=True)


@mutant((AgentManager, "_wait"))
def loses_the_grant_of_a_waiter_that_leaves(wait):
    async def forgetful(self, ticket, *, has_limit):
        future = self._futures[ticket] = asyncio.get_running_loop().create_future()
        timer = asyncio.get_running_loop().call_later(self.limits.queue_wait_s, self._queue_wait_over, ticket)
        try:
            await future
        except BaseException:
            if not future.done() or future.cancelled():
                self._carry_out(self._table.leave(ticket, self._clock.monotonic()))
            raise
        finally:
            timer.cancel()
            del self._futures[ticket]

    return forgetful


@mutant((Holds, "make_way"))
def interrupts_the_last_instead_of_the_running_turn(make_way):
    def wrong(self, key, reason, turn_id=None):
        others = [f for f in self.turns.of_session(key) if f.turn_id != turn_id]
        if reason is not None and others:
            others[-1].cancel(reason, keep_partial=reason is CancelReason.INTERRUPT)

    return wrong


@mutant((Holds, "make_way"))
def interrupts_nobody(make_way):
    return lambda self, key, reason, turn_id=None: None


@mutant((AgentManager, "_claim"))
def lets_interrupters_queue_at_the_back(claim):
    async def modest(self, ticket, *, front=False, **how):
        await claim(self, ticket, front=front and ticket.kind is TicketKind.HOLD, **how)

    return modest


@mutant((AgentManager, "_is_hold_next"))
def lets_interrupters_overtake_a_delete(is_hold_next):
    return lambda self, key: False


@mutant((Conductor, "_look_up"))
def runs_in_a_session_that_was_made_anew(look_up):
    async def trusting(self, flight, lease):
        session = lease.record or await self._store.find_session(flight.key)
        if session is None:
            raise SessionNotFound
        return session, True

    return trusting


@mutant((Holds, "hold"))
def moves_a_head_under_a_running_turn(hold):
    @asynccontextmanager
    async def at_once(self, key, on_busy=OnBusy.QUEUE):
        yield

    return at_once


@mutant((Conductor, "_find_place"))
def edits_behind_the_head(find_place):
    async def wrong(self, session, departure):
        boarding = await find_place(self, session, departure)
        return replace(boarding, place=session) if departure.parent is not None else boarding

    return wrong


@mutant((Conductor, "_find_place"))
def asks_again_behind_the_turn_instead_of_beside_it(find_place):
    async def wrong(self, session, departure):
        boarding = await find_place(self, session, departure)
        return replace(boarding, place=session) if departure.message is None else boarding

    return wrong


@mutant((Activator, "fit"))
def uses_an_agent_whose_head_was_moved(fit):
    async def trusting(self, agent, session):
        return agent if agent.stamp.head is not None else await fit(self, agent, session)

    return trusting


@mutant((Claim, "decide"))
def tells_nobody_that_a_request_came_to_nothing(decide):
    return lambda self, flight: decide(self, flight) if flight is not None else None


@mutant((Flight, "join"))
def does_not_count_watchers_that_come(join):
    return lambda self: None


@mutant((Flight, "leave"))
def ends_a_turn_with_the_first_watcher_that_leaves(leave):
    def hasty(self):
        self._watchers -= 1
        if self.state is not FlightState.ENDED:
            self.cancel(CancelReason.DISCONNECT, keep_partial=True)

    return hasty


@mutant((Turns, "end"))
def forgets_to_end_a_turn(end):
    def forgetful(self, flight):
        end(self, flight)
        self._by_session.setdefault(flight.key, []).append(flight)

    return forgetful


@mutant((Landing, "_let_go"))
def gives_a_zombies_place_back_at_once(let_go):
    return lambda self, air, cause: air.lease.discard(DiscardCause.CANCEL)


@mutant((AgentManager, "_load"), (AgentManager, "close"))
def forgets_a_load_that_was_cancelled(load, close):
    async def unreported(self, slot):
        try:
            async with asyncio.timeout(self.limits.activation_timeout_s):
                agent, record = await self._activator.activate(slot.key)
        except (AgentPoolError, TimeoutError):
            self._carry_out(self._table.load_failed(slot, StoreUnavailable()))
        else:
            self._carry_out(self._table.loaded(slot, agent, record, self._clock.monotonic()))

    async def trusting(self):
        self.begin_drain()
        await self._tasks.close()
        self._carry_out(self._table.evict(list(self._table.idle.values()), EvictionCause.DRAIN))

    return unreported, trusting


@mutant((Turns, "release"), (Turns, "find_claim"))
def never_releases_a_key(release, find_claim):
    asked = 0

    def keep(self, claim):
        claim.decide(claim.flight)

    def find(self, binding):
        nonlocal asked
        asked += 1
        assert asked < 10_000, "requests go round in circles"
        return find_claim(self, binding)

    return keep, find


@mutant((ChatService, "_accept"))
def releases_a_key_when_its_turn_is_accepted(accept):
    async def early(self, *request, **asked):
        flight = await accept(self, *request, **asked)
        self._turns._claims.clear()
        return flight

    return early
