"""Metrics. Each one is declared once, as a line of `Metrics`.

Labels are names from config.toml or come from closed lists, so their number is bounded. A series with known
label values exists from the start, at 0, so that rates are right from the first change. Counters are kept in
memory; a scrape reads no table of the database.
"""

import asyncio
import platform
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from operator import sub
from pathlib import Path
from typing import Any, TypeAlias, cast, get_args

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)

from relay import __version__
from relay.base.turns import Turns
from relay.errors import REASONS, UNROUTABLE
from relay.model import RESULTS, DeliveryState, Observed, WorkerStatus

disable_created_metrics()  # type: ignore[no-untyped-call]

STATUSES: tuple[str, ...] = get_args(WorkerStatus)
OUTCOMES = tuple(state for state in get_args(DeliveryState) if state != "pending")
PENDING_STATES = ("due", "waiting", "in_flight", "held")
JOB_OUTCOMES = ("ok", "failed")
REPLICATION = ("sync", "async")

NAMES = ("*",)
"""Stands for label values that are not known at import, such as names in config.toml."""

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 3600, 21_600, 86_400)
_SHARED = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Declared(msgspec.Struct, frozen=True):
    """The declaration of one metric."""

    kind: type[Any]
    name: str  # without the `_total` of a counter
    help: str  # one sentence; docs/operating.md repeats it
    labels: Mapping[str, tuple[str, ...]]  # label values by name
    options: Mapping[str, Any]


def _counter(name: str, help_: str, **labels: tuple[str, ...]) -> Counter:
    return cast("Counter", Declared(Counter, name, help_, labels, {}))


def _gauge(name: str, help_: str, **labels: tuple[str, ...]) -> Gauge:
    return cast("Gauge", Declared(Gauge, name, help_, labels, {}))


def _histogram(name: str, help_: str, buckets: tuple[float, ...], **labels: tuple[str, ...]) -> Histogram:
    return cast("Histogram", Declared(Histogram, name, help_, labels, {"buckets": buckets}))


Row: TypeAlias = tuple[float, ...]
"""The values of a metric that belong to one source, destination or job.

A counter has a value for each value of its second label, in the order of their declaration. A histogram has
the number of observations in each bucket, and then the sum of all observations.
"""


class Reading:
    """The values of some metrics at one moment, by attribute of `Metrics` and value of the first label."""

    def __init__(self) -> None:
        self.at = asyncio.get_running_loop().time()
        self.rows: dict[str, dict[str, Row]] = {}

    def row(self, metric: str, name: str = "") -> Row:
        """Return one row; it is empty if it does not exist yet."""
        return self.rows[metric].get(name, ())

    def growth(self, before: "Reading", metric: str, name: str = "") -> Row | None:
        """Return how much a row has grown since another reading; None: not at all."""
        now, old = self.row(metric, name), before.row(metric, name)
        if now == old:
            return None
        return tuple(map(sub, now, old)) if old else now


class Metrics:
    """All metrics of one daemon, in their own registry, because tests run several daemons in one process."""

    reloaded = _gauge(
        "relay_config_last_reload_successful",
        "1 if config.toml was valid at the last reload or, without a reload, at the start.",
    )
    reloaded_at = _gauge(
        "relay_config_last_reload_success_timestamp_seconds", "Time at which config.toml was last loaded."
    )
    received = _counter("relay_events_received", "Events received from senders and stored.", source=NAMES)
    duplicates = _counter("relay_events_duplicate", "Requests that repeated a stored event.", source=NAMES)
    key_conflicts = _counter(
        "relay_events_key_conflicts",
        "Requests whose idempotency key was already used for a different request.",
        source=NAMES,
    )
    bytes = _counter("relay_event_bytes", "Bytes of the request bodies of stored events.", source=NAMES)
    rejected = _counter("relay_events_rejected", "Refused requests, by reason.", source=NAMES, reason=REASONS)
    unroutable = _counter(
        "relay_requests_unroutable", "Requests that match no route, by reason.", reason=UNROUTABLE
    )
    ingest = _histogram(
        "relay_ingest_duration_seconds",
        "Time from the head of a request to its response, which is sent after the commit.",
        _FAST,
        source=NAMES,
    )
    token_uses = _counter(
        "relay_token_uses",
        "Requests that a token or secret of a source authenticated, or, without the label source, a token of "
        "the admin API.",
        source=NAMES,
        token=NAMES,
    )
    token_used_at = _gauge(
        "relay_token_last_used_timestamp_seconds",
        "Time of the last request that the token or secret authenticated, within 15 seconds; 0 until the "
        "first one.",
        source=NAMES,
        token=NAMES,
    )
    last_event = _gauge(
        "relay_source_last_event_timestamp_seconds",
        "Time of a source's latest event; 0 if the store has none.",
        source=NAMES,
    )
    silence = _gauge(
        "relay_source_silence_seconds",
        "Time without an event while the relay was able to accept one, within a minute.",
        source=NAMES,
    )
    usual_gap = _gauge(
        "relay_source_usual_gap_seconds",
        "Usual time between two events of a source; 0 if it is not known yet, or the source is paused.",
        source=NAMES,
    )
    heartbeats = _counter("relay_heartbeats", "Heartbeats received from workers.", source=NAMES)
    workers = _gauge("relay_workers", "Registered workers, by status.", source=NAMES, status=STATUSES)
    transitions = _counter(
        "relay_worker_transitions",
        "Status changes of workers, by new status; a registration counts as a change.",
        source=NAMES,
        to=STATUSES,
    )
    plugin_errors = _counter(
        "relay_plugin_errors", "Requests and hook calls in which a plugin failed.", plugin=NAMES
    )
    created = _counter("relay_deliveries_created", "Deliveries created.", destination=NAMES)
    finished = _counter(
        "relay_deliveries_finished", "Finished deliveries, by outcome.", destination=NAMES, outcome=OUTCOMES
    )
    attempts = _counter("relay_delivery_attempts", "Attempts, by result.", destination=NAMES, result=RESULTS)
    attempt_seconds = _histogram(
        "relay_delivery_attempt_duration_seconds", "Duration of a delivery attempt.", _FAST, destination=NAMES
    )
    latency = _histogram(
        "relay_delivery_latency_seconds",
        "Time from receipt of an event to a 2xx from the destination.",
        _SLOW,
        destination=NAMES,
    )
    unaccounted = _gauge(
        "relay_deliveries_unaccounted",
        "Pending deliveries in the ledger minus those in the table of deliveries; anything but 0 is a bug.",
        destination=NAMES,
    )
    pending = _gauge(
        "relay_deliveries_pending", "Pending deliveries, by state.", destination=NAMES, state=PENDING_STATES
    )
    circuit = _gauge(
        "relay_destination_circuit_open",
        "1 while the circuit breaker of the destination is open.",
        destination=NAMES,
    )
    disabled = _gauge("relay_destination_disabled", "1 while the destination is disabled.", destination=NAMES)
    oldest = _gauge(
        "relay_delivery_oldest_pending_timestamp_seconds",
        "Time at which the oldest pending delivery was created; 0 if no delivery is pending.",
        destination=NAMES,
    )
    last_success = _gauge(
        "relay_destination_last_success_timestamp_seconds",
        "Time of the latest 2xx from a destination; 0 if the store has none.",
        destination=NAMES,
    )
    certificate = _gauge(
        "relay_destination_certificate_expiry_timestamp_seconds",
        "Time at which the TLS certificate of a destination expires, as of the latest connection;"
        " 0 if unknown.",
        destination=NAMES,
    )
    certificate_lifetime = _gauge(
        "relay_destination_certificate_lifetime_seconds",
        "Total period of validity of the TLS certificate of a destination; 0 if unknown.",
        destination=NAMES,
    )
    job_success = _gauge(
        "relay_job_last_success_timestamp_seconds", "Time of a job's last successful run.", job_name=NAMES
    )
    job_every = _gauge("relay_job_interval_seconds", "Interval between two runs of a job.", job_name=NAMES)
    job_runs = _counter("relay_job_runs", "Runs of jobs, by outcome.", job_name=NAMES, outcome=JOB_OUTCOMES)
    job_seconds = _histogram("relay_job_duration_seconds", "Duration of a job's run.", _SLOW, job_name=NAMES)
    plugins = _gauge("relay_plugin_info", "1 for each available kind of source.", plugin=NAMES, version=NAMES)
    size = _gauge(
        "relay_storage_size_bytes",
        "Size of each file of the database, or of the PostgreSQL database and its table of pending "
        "deliveries.",
        file=NAMES,
    )
    disk_free = _gauge("relay_disk_free_bytes", "Free space of the disk that holds the database.")
    disk_floor = _gauge(
        "relay_disk_min_free_bytes", "`[storage] min_free_disk`: with less free space, senders get 503."
    )
    disk_full_in = _gauge(
        "relay_disk_full_in_seconds",
        "Time until the free space reaches min_free_disk at the pace of the last day;"
        " +Inf if the database does not grow or the pace is not known yet.",
    )
    backup_at = _gauge(
        "relay_backup_last_success_timestamp_seconds",
        "Time of the latest backup in `[backup] dir`; 0 if there is none.",
    )
    backup_size = _gauge("relay_backup_size_bytes", "Size of the latest backup.")
    backup_every = _gauge(
        "relay_backup_interval_seconds", "`[backup] every`: the interval of backups; 0 if they are off."
    )
    commit_seconds = _histogram(
        "relay_storage_commit_duration_seconds", "Duration of a database transaction.", _FAST
    )
    commit_events = _histogram(
        "relay_storage_commit_events", "Number of requests and delivery outcomes in one transaction.", _SHARED
    )
    standbys = _gauge(
        "relay_database_standbys",
        "Connected standbys of the PostgreSQL server, by the kind of their replication.",
        replication=REPLICATION,
    )
    standby_lag = _gauge(
        "relay_database_standby_lag_bytes", "WAL that the standby furthest behind has not stored yet."
    )
    standby_delay = _gauge(
        "relay_database_standby_lag_seconds",
        "Time from a write on the PostgreSQL server until the standby furthest behind has stored it.",
    )
    oldest_snapshot = _gauge(
        "relay_database_oldest_snapshot_seconds",
        "Age of the oldest snapshot on the PostgreSQL server; old ones slow down the queue.",
    )
    dead_rows = _gauge(
        "relay_database_queue_dead_rows",
        "Dead rows in PostgreSQL's table of pending deliveries, which vacuum has not removed yet.",
    )
    connections = _gauge(
        "relay_database_connections_used_ratio",
        "Share of the connections of the PostgreSQL server that are in use.",
    )
    clock_offset = _gauge(
        "relay_database_clock_offset_seconds",
        "How far the clock of the PostgreSQL server is ahead of this machine's.",
    )
    nodes = _gauge("relay_cluster_nodes", "Live nodes of the cluster; 0 without a cluster.")
    lanes = _gauge("relay_cluster_lanes", "Destinations whose lanes this node of a cluster runs.")
    renewal_age = _gauge(
        "relay_cluster_renewal_age_seconds", "Time since this node last renewed the leases of its lanes."
    )
    config_differs = _gauge(
        "relay_cluster_config_differs", "1 while another node has a different configuration."
    )
    wakeup_delay = _gauge(
        "relay_cluster_wakeup_delay_seconds",
        "Time after which a node notices deliveries that another node accepted, within 10 seconds.",
    )
    lag = _gauge("relay_event_loop_lag_seconds", "Delay of the event loop at the latest measurement.")
    log_dropped = _counter(
        "relay_log_lines_dropped", "Log lines dropped because the reader of the log was too slow."
    )

    def __init__(
        self, sources: Iterable[str] = (), destinations: Iterable[str] = (), *, listener: str = "fast"
    ) -> None:
        """Create the metrics, with the series of these sources and destinations at 0."""
        self.registry = CollectorRegistry()
        self._children: dict[str, dict[str, tuple[Any, ...]]] = {}  # by attribute and first label
        ProcessCollector(registry=self.registry)
        self._build = {
            "version": __version__,
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "postgresql": "",
            "listener": listener,
        }
        self._build_info = Info(
            "relay_build",
            "Version of the relay, Python, SQLite and the PostgreSQL server, and the listener in use.",
            registry=self.registry,
        )
        self._build_info.info(self._build)
        for attribute, each in declared().items():
            made = each.kind(each.name, each.help, tuple(each.labels), registry=self.registry, **each.options)
            setattr(self, attribute, made)
            self._children[attribute] = {} if each.labels else {"": (made,)}
            if each.labels and NAMES not in each.labels.values():
                self._start(attribute, each)
        for name in sources:
            self.add_source(name)
        for name in destinations:
            self.add_destination(name)

    async def read(self, *metrics: str) -> Reading:
        """Read counters, histograms, and gauges that are set, with pauses for other tasks.

        prometheus_client's `collect` would make an object for each value: for 1,000 destinations, that takes
        100 ms, ten times as long.
        """
        reading, turns = Reading(), Turns()
        for metric in metrics:
            rows = reading.rows[metric] = {}
            for name, children in tuple(self._children[metric].items()):  # a reload adds rows
                rows[name] = _values(children)
                await turns.give()
        return reading

    def add_source(self, name: str) -> None:
        """Create the series of a source at 0."""
        self._add("source", name)

    def add_destination(self, name: str) -> None:
        """Create the series of a destination at 0."""
        self._add("destination", name)

    def add_job(self, name: str) -> None:
        """Create the series of a job at 0."""
        self._add("job_name", name)

    def _add(self, label: str, value: str) -> None:
        for attribute, each in _named_by(label).items():
            self._start(attribute, each, **{label: value})

    def _start(self, attribute: str, each: Declared, **known: str) -> None:
        """Create the series of a metric with every combination of label values."""
        values = [(known[name],) if name in known else choices for name, choices in each.labels.items()]
        metric, children = getattr(self, attribute), self._children[attribute]
        for first in values[0]:
            children[first] = tuple(metric.labels(first, *others) for others in product(*values[1:]))

    def count_workers(self, source: str, census: Callable[[str, str], int]) -> None:
        """Let a scrape read the number of a source's workers in each status from `census`, in memory."""
        for status in STATUSES:
            self.workers.labels(source, status).set_function(partial(census, source, status))

    def count_status_change(self, source: str, status: WorkerStatus) -> None:
        """Count a worker's change to a status."""
        self.transitions.labels(source, status).inc()

    def note_server(self, observed: Observed) -> None:
        """Set the metrics about a database server."""
        if self._build["postgresql"] != observed.engine:
            self._build["postgresql"] = observed.engine
            self._build_info.info(self._build)
        for label, size in observed.sizes.items():
            self.size.labels(label).set(size)
        for kind in REPLICATION:
            self.standbys.labels(kind).set(observed.figures[f"standbys_{kind}"])
        for name in _OF_SERVER:
            getattr(self, name).set(observed.figures[name])

    def watch_cluster(self, figures: Callable[[], Mapping[str, float]]) -> None:
        """Let each scrape read the metrics about the cluster from memory."""
        for name in _OF_CLUSTER:
            getattr(self, name).set_function(lambda name=name: figures()[name])

    def add_files(self, files: Mapping[str, Path]) -> None:
        """Let each scrape read the sizes of the store's files, by label."""
        for label, path in files.items():
            self.size.labels(label).set_function(partial(_size, path))


_OF_SERVER = (
    "standby_lag", "standby_delay", "oldest_snapshot", "dead_rows", "connections", "clock_offset",
)  # fmt: skip
_OF_CLUSTER = ("nodes", "lanes", "renewal_age", "config_differs", "wakeup_delay")


@cache
def declared() -> Mapping[str, Declared]:
    """Return every metric that `Metrics` declares, by its attribute."""
    return {name: each for name, each in vars(Metrics).items() if isinstance(each, Declared)}


@cache
def _named_by(label: str) -> Mapping[str, Declared]:
    """Return the metrics whose series are known except for the value of this label."""
    found = {}
    for attribute, each in declared().items():
        others = [values for name, values in each.labels.items() if name != label]
        if each.labels.get(label) == NAMES and NAMES not in others:
            found[attribute] = each
    return found


def _values(series: Sequence[Any]) -> Row:
    """Return the values of series, from undocumented attributes of prometheus_client if they exist."""
    try:
        if isinstance(series[0], Histogram):
            buckets = [bucket.get() for each in series for bucket in (*each._buckets, each._sum)]  # noqa: SLF001 - see `read`
            return tuple(buckets)
        return tuple([each._value.get() for each in series])  # noqa: SLF001
    except AttributeError:
        return _collected(series)


def _collected(series: Sequence[Any]) -> Row:
    row: list[float] = []
    for each in series:
        [family] = each.collect()
        values = [sample.value for sample in family.samples]
        if isinstance(each, Histogram):
            *totals, _, sum_ = values  # the buckets are cumulative; then follow their number and the sum
            values = [*map(sub, totals, [0.0, *totals]), sum_]
        row += values
    return tuple(row)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
