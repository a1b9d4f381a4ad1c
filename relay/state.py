"""The parts of the daemon that config.toml determines: sources, routes, worker rules, lanes.

A reload prepares new parts beside the current ones and adopts them in one step of the event loop.
"""

from collections.abc import Iterable

import msgspec

from relay.base.clock import Clock
from relay.config.schema import Config
from relay.delivery.dispatcher import Dispatcher, DispatchPlan
from relay.ingest.body import Patience
from relay.ingest.handler import Ingest
from relay.ingest.refused import Explain
from relay.ingest.routes import Mount, mounts_of
from relay.ingest.sender_address import SenderAddress
from relay.ingest.token_use import TokenUses
from relay.jobs.retention import Upkeep
from relay.metrics import Metrics
from relay.plugin_loading.loader import Setup
from relay.routing.router import Router
from relay.store import Store
from relay.store.retention_policy import Policy
from relay.workers.watch import SWEEP, Rulebook, Watch


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """A new configuration with everything that adopting it needs, so that adopting it cannot fail."""

    setup: Setup
    mounts: tuple[Mount, ...]
    router: Router
    rules: Rulebook
    policy: Policy
    lanes: DispatchPlan


class State:
    """The parts that depend on the configuration. A reload changes them, but never replaces the objects."""

    def __init__(
        self,
        setup: Setup,
        *,
        router: Router,
        rulebook: Rulebook,
        store: Store,
        clock: Clock,
        metrics: Metrics,
        explain: Explain | None = None,
    ) -> None:
        config = setup.config
        self.setup = setup
        self._store = store
        self._metrics = metrics
        self.ingest = Ingest(
            mounts=mounts_of(config.sources),
            store=store,
            clock=clock,
            metrics=metrics,
            sender_address=_sender_address_of(config),
            patience=_patience_of(config),
            token_uses=TokenUses(metrics, clock, config.admin.tokens),
            refused=config.refused,
            explain=explain,
        )
        self.dispatcher = Dispatcher(
            config.destinations, formats=setup.formats, store=store, clock=clock, metrics=metrics
        )
        self.router = router
        self.rulebook = rulebook
        self.watch = Watch(store, clock, rulebook.shortest_interval)
        self.upkeep = Upkeep(store, self.dispatcher, Policy.of_config(config))
        self._count(config)

    @property
    def config(self) -> Config:
        """The current configuration."""
        return self.setup.config

    async def start(self, own: Iterable[tuple[str, int]]) -> None:
        """Restore stored pauses and start the lanes; see `Dispatcher.start` for `own`."""
        for name in await self._store.queries.paused_sources() & self.ingest.mounts.keys():
            self.ingest.mounts[name].paused = True
        await self.dispatcher.start(tuple(own))

    async def refresh(self) -> None:
        """Read again which sources are paused, because an operator may have used another node.

        The number of live nodes determines this node's share of the rate limits of senders.
        """
        self.ingest.admission.nodes = max(1, int(self._store.nodes.figures().get("nodes", 1)))
        before = {name: mount.paused for name, mount in self.ingest.mounts.items()}
        paused = await self._store.queries.paused_sources()
        for name, mount in self.ingest.mounts.items():
            if mount.paused == before.get(name):  # else an operator has changed it here meanwhile
                mount.paused = name in paused

    async def prepare(self, setup: Setup) -> Draft:
        """Prepare another configuration beside the current one.

        Raises:
            RelayError: a part cannot be made; nothing has changed and nothing is left open.
        """
        config, paused = setup.config, await self._store.queries.paused_sources()
        mounts = mounts_of(config.sources)
        for mount in mounts:
            mount.paused = mount.name in paused
        return Draft(
            setup=setup,
            mounts=mounts,
            router=Router.of(config.destinations),
            rules=Rulebook.of_config(config),
            policy=Policy.of_config(config),
            lanes=await self.dispatcher.plan(config.destinations),
        )

    def adopt(self, draft: Draft) -> None:
        """Adopt a prepared configuration. Requests and attempts in progress end under the old one."""
        config = draft.setup.config
        self.setup = draft.setup
        self._count(config)
        self.ingest.mount(draft.mounts, _sender_address_of(config), _patience_of(config), config.refused)
        self.rulebook.adopt(draft.rules)
        if draft.rules.shortest_interval != self.watch.interval:
            self.watch.change_interval(draft.rules.shortest_interval)
        self.upkeep.policy = draft.policy
        self.router.adopt(draft.router)
        self.dispatcher.adopt(draft.lanes)

    def _census(self, source: str, status: str) -> int:
        """Count workers for the metrics; in a cluster, on the node that marks the silent ones."""
        return self._store.workers.count(source, status) if self._store.nodes.lead(SWEEP) else 0

    def _count(self, config: Config) -> None:
        """Create the metrics of every source and destination, exported as 0 from the start."""
        for name, source in config.sources.items():
            self._metrics.add_source(name)
            self._metrics.plugin_errors.labels(source.plugin)
            self._metrics.count_workers(name, self._census)
        for name in config.destinations:
            self._metrics.add_destination(name)


def _patience_of(config: Config) -> Patience:
    return Patience(config.server.body_timeout, config.server.min_body_rate)


def _sender_address_of(config: Config) -> SenderAddress:
    return SenderAddress(config.server.trusted_proxies, config.server.forwarded_header)
