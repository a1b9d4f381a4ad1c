"""The parts of the daemon that operators ask about and steer."""

import msgspec
from prometheus_client import CollectorRegistry

from relay.clock import Clock
from relay.delivery.engine import Engine
from relay.filters import Router
from relay.health import Health
from relay.ingest.receive import Ingest
from relay.jobs import Jobs
from relay.reload import Reloads
from relay.replay import Replays
from relay.store import Store


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """All that the API speaks for; every resource takes the ones that it is about."""

    store: Store
    ingest: Ingest
    engine: Engine
    health: Health
    clock: Clock
    registry: CollectorRegistry
    replays: Replays
    router: Router
    reloads: Reloads
    jobs: Jobs
