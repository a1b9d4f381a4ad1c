"""What a config.toml makes of the daemon: sources and their routes, rules, and a lane per destination.

A reload prepares all of it anew beside the old, and takes it on in one step of the loop.
"""

from collections.abc import Iterable

import msgspec

from relay.base.clock import Clock
from relay.config.schema import Config
from relay.delivery.dispatcher import Engine, Plan
from relay.ingest.body import Patience
from relay.ingest.handler import Ingest
from relay.ingest.routes import Mount, mounts_of
from relay.ingest.sender_address import Remote
from relay.jobs.retention import Upkeep
from relay.metrics import Metrics
from relay.plugin_loading.loader import Setup
from relay.routing.filters import Router
from relay.routing.router import router_of
from relay.store import Store
from relay.store.retention_policy import Policy
from relay.workers.watch import Rulebook, Watch


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """A config with everything made that taking it on needs, so that this cannot fail."""

    setup: Setup
    mounts: tuple[Mount, ...]
    router: Router
    rules: Rulebook
    policy: Policy
    lanes: Plan


class State:
    """The parts that depend on the config; they stay the same objects, whatever it says."""

    def __init__(self, setup: Setup, *, store: Store, clock: Clock, metrics: Metrics) -> None:
        config = setup.config
        self.setup = setup
        self._store = store
        self._metrics = metrics
        self.ingest = Ingest(
            mounts=mounts_of(config.sources),
            store=store,
            clock=clock,
            metrics=metrics,
            remote=_remote_of(config),
            patience=_patience_of(config),
        )
        self.engine = Engine(
            config.destinations, formats=setup.formats, store=store, clock=clock, metrics=metrics
        )
        self.router = router_of(config.destinations)
        store.route = self.router.route
        rules = Rulebook.of_config(config)
        store.rules = rules.of
        self.watch = Watch(store, clock, rules.shortest_interval)
        self.upkeep = Upkeep(store, self.engine, Policy.of_config(config))
        self._count(config)

    @property
    def config(self) -> Config:
        """What holds at the moment."""
        return self.setup.config

    async def start(self, own: Iterable[tuple[str, int]]) -> None:
        """Go on with what the store remembers of sources and destinations; see `Engine.start` for `own`."""
        for name in await self._store.paused_sources() & self.ingest.mounts.keys():
            self.ingest.mounts[name].paused = True
        await self.engine.start(tuple(own))

    async def prepare(self, setup: Setup) -> Draft:
        """Make what another config needs, beside the present one.

        Raises:
            RelayError: it cannot be made; nothing has changed, and nothing is left open.
        """
        config, paused = setup.config, await self._store.paused_sources()
        mounts = mounts_of(config.sources)
        for mount in mounts:
            mount.paused = mount.name in paused
        return Draft(
            setup=setup,
            mounts=mounts,
            router=router_of(config.destinations),
            rules=Rulebook.of_config(config),
            policy=Policy.of_config(config),
            lanes=await self.engine.plan(config.destinations),
        )

    def adopt(self, draft: Draft) -> None:
        """Go by another config from now on; what is under way ends as it began."""
        config = draft.setup.config
        self.setup = draft.setup
        self._count(config)
        self.ingest.mount(draft.mounts, _remote_of(config), _patience_of(config))
        self._store.rules = draft.rules.of
        if draft.rules.shortest_interval != self.watch.interval:
            self.watch.go_by(draft.rules.shortest_interval)
        self.upkeep.policy = draft.policy
        self.router.adopt(draft.router)
        self.engine.adopt(draft.lanes)

    def _count(self, config: Config) -> None:
        """Have metrics of every source and destination, from their first zero on."""
        for name in config.sources:
            self._metrics.add_source(name)
            self._metrics.count_workers(name, self._store.census)
        for name in config.destinations:
            self._metrics.add_destination(name)


def _patience_of(config: Config) -> Patience:
    return Patience(config.server.body_timeout, config.server.min_body_rate)


def _remote_of(config: Config) -> Remote:
    return Remote(config.server.trusted_proxies, config.server.forwarded_header)
