"""Nodes: the daemons that share stored data. One node alone owns every lane and every job."""

import socket
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from relay import __version__
from relay.base.clock import Clock
from relay.config.effective import Digests
from relay.errors import UnknownError
from relay.model import Caution, Node
from relay.store import FOREVER, Answers, Attendant, Ownership


class OneNode:
    """`relay.store.Nodes` for data that only one daemon can open."""

    alone = True
    replies = None
    incarnation = ""

    def __init__(self, clock: Clock, name: str = "", digests: Callable[[], Digests] = Digests) -> None:
        self._clock = clock
        self._name = name or socket.gethostname()
        self._digests = digests  # of the config
        self._started_at = clock.wall()

    async def own(
        self,
        lanes: Mapping[str, float],
        jobs: Collection[str],
        shards: Mapping[str, int] = {},
        standing: Mapping[str, Mapping[str, Any]] = {},
    ) -> Ownership:
        """See `Nodes.own`; every lane is owned for ever, with all its shards."""
        _ = jobs, shards, standing
        return Ownership(until=dict.fromkeys(lanes, FOREVER))

    def attend(self, attendant: Attendant) -> None:
        """See `Nodes.attend`; there is no other node."""

    async def ask(self, lane: str, verb: str, argument: Any) -> Any:
        """See `Nodes.ask`; this node owns every lane of its config."""
        _ = argument
        raise UnknownError(f"{lane}: no node delivers to it; cannot {verb}")

    async def ask_leader(self, job: str, verb: str, argument: Any) -> Any:
        """See `Nodes.ask_leader`; this node leads every job."""
        _ = argument
        raise UnknownError(f"job {job}: no other node leads it; cannot {verb}")

    async def ask_node(self, incarnation: str, verb: str, argument: Any, patience: float) -> Any:
        """See `Nodes.ask_node`; there is no other node."""
        _ = argument, patience
        raise UnknownError(f"node {incarnation} does not exist; cannot {verb}")

    async def ask_others(self, verb: str, argument: Any, patience: float) -> Answers:
        """See `Nodes.ask_others`; there is no other node."""
        _ = verb, argument, patience
        return Answers()

    def handle(self, verb: str, handle: Callable[[str, Any], Awaitable[Any]]) -> None:
        """See `Nodes.handle`; no other node sends requests."""

    async def give(self, lanes: Collection[str], standing: Mapping[str, Mapping[str, Any]] = {}) -> None:
        """See `Nodes.give`; no other node takes lanes."""

    def report_soon(self) -> None:
        """See `Nodes.report_soon`; no other node takes lanes."""

    def lead(self, job: str) -> bool:
        """See `Nodes.lead`; always True."""
        _ = job
        return True

    async def all(self) -> tuple[Node, ...]:
        """See `Nodes.all`."""
        return (
            Node(
                name=self._name,
                version=__version__,
                started_at=self._started_at,
                seen_at=self._clock.wall(),
                is_self=True,
                config=self._digests().whole,
            ),
        )

    def figures(self) -> Mapping[str, float]:
        """See `Nodes.figures`; there is no cluster."""
        return {}

    def cautions(self) -> tuple[Caution, ...]:
        """See `Nodes.cautions`; there is no cluster."""
        return ()

    async def leave(self) -> None:
        """See `Nodes.leave`; no other node waits for that."""
