"""The parts of the daemon that operators ask about and steer."""

import msgspec
from prometheus_client import CollectorRegistry

from relay.backups import Backups
from relay.clock import Clock
from relay.delivery.engine import Engine
from relay.filters import Router
from relay.health import Health
from relay.ingest.receive import Ingest
from relay.jobs import Jobs
from relay.metrics import Metrics
from relay.reload import Reloads
from relay.replay import Replays
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
    def engine(self) -> Engine:
        """Where deliveries go out."""
        return self.state.engine

    @property
    def router(self) -> Router:
        """What says which event goes where."""
        return self.state.router
