"""The parts of the daemon that operators ask about and steer."""

import msgspec
from prometheus_client import CollectorRegistry

from relay.base.clock import Clock
from relay.delivery.dispatcher import Dispatcher
from relay.ingest.handler import Ingest
from relay.jobs.backups import Backups
from relay.jobs.replay import Replays
from relay.jobs.scheduler import Jobs
from relay.metrics import Metrics
from relay.process.health import Health
from relay.reload import Reloads
from relay.routing.filters import Router
from relay.state import State
from relay.store import Store


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """All that the API speaks for; every resource takes the ones that it is about."""

    store: Store
    state: State
    health: Health
    clock: Clock
    registry: CollectorRegistry
    metrics: Metrics
    replays: Replays
    reloads: Reloads
    jobs: Jobs
    backups: Backups

    @property
    def ingest(self) -> Ingest:
        """Where requests come in."""
        return self.state.ingest

    @property
    def engine(self) -> Dispatcher:
        """Where deliveries go out."""
        return self.state.engine

    @property
    def router(self) -> Router:
        """What says which event goes where."""
        return self.state.router
