"""The parts of the daemon that the admin API reads and controls."""

import msgspec
from prometheus_client import CollectorRegistry

from relay.api.query_params import HistoryQuery, TailQuery, WorkersQuery
from relay.api.views import check_names
from relay.base.clock import Clock
from relay.delivery.dispatcher import Dispatcher
from relay.delivery.owner import Owner
from relay.ingest.handler import Ingest
from relay.jobs.activity import Activity
from relay.jobs.backups import Backups
from relay.jobs.database_watch import DatabaseWatch
from relay.jobs.disk_forecast import DiskForecast
from relay.jobs.history import History
from relay.jobs.ledger_check import LedgerCheck
from relay.jobs.replay import Replays
from relay.jobs.scheduler import Jobs
from relay.metrics import Metrics
from relay.model import Selection
from relay.process.health import Health
from relay.reload import Reloads
from relay.state import State
from relay.store import Listener, Store


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of the daemon; each group of endpoints takes the parts that it needs."""

    store: Store
    state: State
    health: Health
    clock: Clock
    registry: CollectorRegistry
    metrics: Metrics
    replays: Replays
    reloads: Reloads
    jobs: Jobs
    owner: Owner
    backups: Backups
    activity: Activity
    history: History
    disk: DiskForecast
    ledger_check: LedgerCheck
    database_watch: DatabaseWatch
    addresses: dict[str, str]  # URLs of the open listeners, "public" and "admin"; filled at the start
    listeners: list[Listener]  # called after each commit (`relay.store.Listener`); streams join and leave

    async def check_names(self, filter_: Selection | WorkersQuery | HistoryQuery | TailQuery) -> None:
        """Check the names of source and destination in a filter.

        Raises:
            UnknownError: a name is neither in config.toml nor in the store.
        """
        await check_names(
            self.store,
            source=filter_.source,
            type_=getattr(filter_, "type", None),
            destination=getattr(filter_, "destination", None),
            sources=self.ingest.mounts,
            destinations=self.dispatcher.lanes,
        )

    @property
    def ingest(self) -> Ingest:
        """Handles requests of senders."""
        return self.state.ingest

    @property
    def dispatcher(self) -> Dispatcher:
        """Sends deliveries."""
        return self.state.dispatcher
