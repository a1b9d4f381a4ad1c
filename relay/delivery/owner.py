"""Ownership of lanes: once a second, the node renews its lanes, takes free ones and hands over others."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from relay.base.shards import Shards, destination_of
from relay.delivery.destination_health import DISABLE
from relay.delivery.dispatcher import Dispatcher
from relay.delivery.lane import Lane, ShardElsewhere
from relay.errors import StorageError, UnknownError
from relay.model import DestinationState
from relay.process.logs import fields
from relay.store import Ownership, Standing, Store

log = logging.getLogger("relay.delivery")

RENEW_EVERY = 1.0  # seconds

STEER, CLOSE_CIRCUIT = "pause or resume", "close the circuit"
"""Requests of operators to the owner of a lane."""

CLOSE_SHARDS = "close the circuits of shards"
"""Request of an operator to all nodes."""

PATIENCE = 5.0  # seconds within which the other nodes must answer


class Owner:
    """Sets for each lane of a dispatcher whether this node owns it. A node that is alone owns every lane."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        store: Store,
        jobs: Callable[[], Collection[str]],
        refresh: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Take functions.

        `jobs` returns the jobs that run on one node of the cluster; `refresh` reads the changes of other
        nodes; it is called once a second.
        """
        self._refresh = refresh
        self._dispatcher = dispatcher
        self._store = store
        self._jobs = jobs
        self._task: asyncio.Task[None] | None = None
        self._hand_overs: dict[str, asyncio.Task[None]] = {}  # by destination
        self._due = asyncio.Event()  # set: renew at once
        self._failing = False
        self._has_lanes = False  # the first renewal has ended
        self._leaves_alone = False  # this node stops, and no other one is live

    async def start(self) -> None:
        """Take lanes now, and then regularly; returns after the first try."""
        if not self._store.nodes.alone:
            self._store.nodes.attend(self)
            self._store.nodes.handle(CLOSE_SHARDS, self._close_shards)
            await self._try_to_renew()
            self._task = asyncio.create_task(self._renew_for_ever())

    def wake(self, lanes: Collection[str] | None, *, retries: bool = False) -> None:
        """See `Attendant.wake`."""
        for name in self._dispatcher.lanes if lanes is None else lanes:
            lane = self._dispatcher.lanes.get(name)
            if lane is not None and lane.is_owned:
                lane.wake()
                if retries:
                    lane.wake(retries=True)

    def renew_soon(self) -> None:
        """See `Attendant.renew_soon`."""
        self._due.set()

    async def answer(self, lane: str, verb: str, argument: Any) -> Any:
        """See `Attendant.answer`."""
        found = self._dispatcher.lanes.get(lane)
        if found is None or not found.is_keeper:
            raise UnknownError(f"{lane}: another node delivers to it now", hint="try again")
        if verb == STEER:
            return await self.steer(found, argument)
        if verb == CLOSE_CIRCUIT:
            return await self.close_circuit(found, argument)
        if verb == DISABLE:
            if found.health.state.disabled_at is None:
                await found.health.disable(argument["reason"], is_quiet=argument["is_quiet"])
                found.apply_hold()
            return None
        raise UnknownError(
            f'{lane}: its node does not support "{verb}"', hint="upgrade hookferry on that node"
        )

    async def steer(self, lane: Lane, change: Mapping[str, Any]) -> dict[str, Any]:
        """Change the state of a destination for an operator, on the node that owns its lane.

        `change` has the new values of fields of `DestinationState`. Returns the destination's new fields.

        Raises:
            StorageError: the state could not be stored, or the node that owns the lane does not answer.
        """
        if not lane.is_keeper:
            shown: dict[str, Any] = await self._store.nodes.ask(lane.name, STEER, change)
            return {**shown, "node": lane.node} if lane.node else shown
        state = msgspec.structs.replace(lane.health.state, **change)
        if lane.health.state.disabled_at is not None and state.disabled_at is not None:
            state = msgspec.structs.replace(state, disabled_at=lane.health.state.disabled_at)
        await lane.set_state(state)
        if lane.shards is not None:
            await self._store.nodes.give(())  # the nodes with its other shards read the state at once
        health = lane.health
        return {
            "held": lane.held,
            "paused_by": health.paused_by,
            "paused_until": health.paused_until,
            "in_flight": lane.in_flight_everywhere,
        }

    async def close_circuit(self, lane: Lane, reason: str) -> bool:
        """Close an open circuit on the nodes that own the lane or its shards; see `Lane.close_circuit`."""
        if lane.shards is not None:
            argument = {"destination": lane.name, "reason": reason}
            answers = await self._store.nodes.ask_others(CLOSE_SHARDS, argument, PATIENCE)
            here = await lane.close_circuit(reason)
            return here or any(answer for _, answer in answers.given)
        if not lane.is_owned:
            return bool(await self._store.nodes.ask(lane.name, CLOSE_CIRCUIT, reason))
        return await lane.close_circuit(reason)

    async def _close_shards(self, _to: str, argument: Mapping[str, str]) -> bool:
        """Close the circuit of this node's shards, for an operator on another node."""
        lane = self._dispatcher.lanes.get(argument["destination"])
        return lane is not None and await lane.close_circuit(argument["reason"])

    async def leave(self) -> None:
        """Hand over every lane once its attempts in flight have ended; renew until `stop`."""
        if self._task is None:
            return
        self._leaves_alone = not self._has_company
        with suppress(StorageError):  # the other nodes notice it later
            await self._store.nodes.leave()
        for lane in self._dispatcher.lanes.values():
            for name in lane.leases:
                self._begin_to_hand_over(name)

    async def stop(self) -> None:
        """Stop renewing, after the attempts have ended."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, *self._hand_overs.values(), return_exceptions=True)
        self._task = None

    async def renew(self) -> None:
        """Renew once, and update the lanes.

        Raises:
            StorageError: the database does not answer; the lanes stay owned until their times.
        """
        store, lanes = self._store, self._dispatcher.lanes
        wanted = {name: lane.config.timeout for name, lane in lanes.items()}
        shards = {name: lane.config.shards for name, lane in lanes.items() if lane.config.shards > 1}
        standing = {
            name: each
            for lane in lanes.values()
            if lane.health.has_news or lane.shards is not None
            for name, each in lane.standing.items()
        }
        owned = await store.nodes.own(wanted, self._jobs(), shards, standing)
        if any(name in lanes and lanes[name].config.timeout > timeout for name, timeout in wanted.items()):
            await self.renew()  # a reload meanwhile: the leases are too short for the new timeout
            return
        gained = {name for name in owned.until if name in lanes and not lanes[name].is_owned}
        # The states of all other lanes are only shown.
        is_needed = gained or owned.shards or len(owned.until) < len(lanes)
        states = await store.queries.destination_states() if is_needed else {}
        self._apply(owned, gained, states)
        if self._refresh is not None:
            await self._refresh()

    def _apply(self, owned: Ownership, gained: Collection[str], states: dict[str, DestinationState]) -> None:
        for name, lane in self._dispatcher.lanes.items():
            until = owned.until.get(name)
            state = states.get(name) or DestinationState(name=name)
            if name in owned.shards:
                self._apply_shards(lane, owned, state)
            elif until is None:
                if lane.is_owned:
                    extra = fields(destination=name)
                    log.warning("%s: lost the lane to another node", name, extra=extra)
                lane.disown(owned.elsewhere.get(name, ""))
                lane.health.note(state)
            elif name in self._hand_overs or name in owned.hand_over:
                pass
            elif name in gained:
                # A single daemon always gets its lanes when it starts: not worth a line at INFO.
                level = logging.INFO if self._has_lanes or self._has_company else logging.DEBUG
                log.log(level, "%s: this node runs the lane", name, extra=fields(destination=name))
                lane.own(until, state, owned.standing.get(name))
            else:
                lane.own(until, None)
        for name in owned.hand_over:
            self._begin_to_hand_over(name)
        self._has_lanes = True

    @property
    def _has_company(self) -> bool:
        return self._store.nodes.figures().get("nodes", 1) > 1

    def _apply_shards(self, lane: Lane, owned: Ownership, state: DestinationState) -> None:
        count, leaving = owned.shards[lane.name], self._hand_overs.keys() | owned.hand_over
        names = {f"{lane.name}/{number}": number for number in range(count)}
        mine = {number: name for name, number in names.items() if name in owned.until and name not in leaving}
        before = frozenset() if lane.shards is None else lane.shards.numbers
        if gained := sorted(mine.keys() - before):
            shown = ("shard " if len(gained) == 1 else "shards ") + ", ".join(map(str, gained))
            log.info("%s: this node runs %s", lane.name, shown, extra=fields(destination=lane.name))
        lane.own_shards(
            Shards(count, frozenset(mine)),
            min((owned.until[name] for name in mine.values()), default=0),
            state,
            _joined([owned.standing.get(name) for name in mine.values()]),
            is_keeper=lane.name in owned.until and lane.name not in leaving,
            node=owned.elsewhere.get(lane.name, ""),
        )
        none = Standing()
        lane.others = tuple(
            ShardElsewhere(
                number,
                owned.elsewhere.get(name, ""),
                standing.in_flight,
                standing.circuit,
                standing.is_quiet,
            )
            for name, number in names.items()
            if number not in mine
            for standing in (owned.standing.get(name, none),)
        )
        stored = [owned.standing.get(name, none) for name in names]
        lane.report_shards(
            next((each.circuit for each in stored if each.circuit is not None and not each.is_quiet), None)
        )

    def _begin_to_hand_over(self, name: str) -> None:
        if name in self._hand_overs:
            return
        lane = self._dispatcher.lanes.get(destination_of(name))
        if lane is None:
            pass
        elif lane.shards is None:
            lane.disown()
        elif name == lane.name:
            lane.health.divide(is_divided=True, is_keeper=False)
        else:
            lane.release_shard(int(name.partition("/")[2]))
        task = self._hand_overs[name] = asyncio.create_task(self._hand_over(name, lane))
        task.add_done_callback(lambda _: self._hand_overs.pop(name, None))

    async def _hand_over(self, name: str, lane: Lane | None) -> None:
        """Release a lane after its last outcome. If that fails, the next renewal requests it again."""
        if lane is None or lane.shards is None:
            await self._dispatcher.drained(destination_of(name))
        elif name != lane.name:
            await lane.released()
        try:
            await self._store.nodes.give((name,), {} if lane is None else lane.final_standing(name))
        except StorageError as error:
            extra = fields(destination=name)
            log.warning("%s: cannot hand over the lane: %s", name, error.message, extra=extra)
        else:
            level = logging.DEBUG if self._leaves_alone else logging.INFO
            log.log(level, "%s: handed over the lane", name, extra=fields(destination=name))

    async def _renew_for_ever(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_EVERY):
                    await self._due.wait()
            self._due.clear()
            await self._try_to_renew()

    async def _try_to_renew(self) -> None:
        try:
            await self.renew()
            self._failing = False
        except StorageError as error:
            if not self._failing:
                log.warning("cannot renew the leases of lanes: %s", error.message)
            self._failing = True
        except Exception:
            log.exception("cannot renew the leases of lanes")


def _joined(shards: Collection[Standing | None]) -> Standing | None:
    """Return the reports of several shards as one; None: no node has owned one of them yet."""
    known = [each for each in shards if each is not None]
    if len(known) < len(shards):
        return None
    opened = next((each for each in known if each.circuit is not None), Standing())
    return msgspec.structs.replace(opened, rest_until=max((each.rest_until for each in known), default=0))
