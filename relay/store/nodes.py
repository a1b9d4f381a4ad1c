"""Nodes: the daemons that share stored data. One node alone owns every lane and every job."""

import socket
from collections.abc import Collection, Mapping

from relay import __version__
from relay.base.clock import Clock
from relay.model import Node
from relay.store import FOREVER, Ownership


class OneNode:
    """`relay.store.Nodes` for data that only one daemon can open."""

    alone = True

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_at = clock.wall()

    async def own(self, lanes: Mapping[str, float], jobs: Collection[str]) -> Ownership:
        """See `Nodes.own`; every lane is owned for ever."""
        _ = jobs
        return Ownership(until=dict.fromkeys(lanes, FOREVER))

    async def give(self, lanes: Collection[str]) -> None:
        """See `Nodes.give`; no other node takes lanes."""

    def lead(self, job: str) -> bool:
        """See `Nodes.lead`; always True."""
        _ = job
        return True

    async def all(self) -> tuple[Node, ...]:
        """See `Nodes.all`."""
        name = socket.gethostname()
        now = self._clock.wall()
        node = Node(name=name, version=__version__, started_at=self._started_at, seen_at=now, is_self=True)
        return (node,)

    async def leave(self) -> None:
        """See `Nodes.leave`; no other node waits for that."""
