"""What Prometheus sees: counters in memory, labels from config names and closed lists only.

A scrape never touches a table; children are created at start, so that a rate has its first zero.
"""

import platform
import sqlite3
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import get_args

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
from relay.errors import REASONS, UNROUTABLE
from relay.model import RESULTS, DeliveryState, WorkerStatus

disable_created_metrics()  # type: ignore[no-untyped-call]

OUTCOMES = tuple(state for state in get_args(DeliveryState) if state != "pending")
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 3600, 21_600, 86_400)

_SHARED = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All metrics of one daemon, in a registry of its own."""

    def __init__(
        self, sources: Iterable[str] = (), destinations: Iterable[str] = (), *, listener: str = "fast"
    ) -> None:
        self.registry = CollectorRegistry()
        # One registry per daemon, not the process-wide default: a test runs several side by side.
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        ProcessCollector(registry=self.registry)
        info = Info("relay_build", "The running program.", registry=self.registry)
        info.info(
            {
                "version": __version__,
                "python": platform.python_version(),
                "sqlite": sqlite3.sqlite_version,
                "listener": listener,
            }
        )
        self.reloaded = gauge(
            "relay_config_last_reload_successful",
            "1 if the latest reload of the configuration, or else the start, succeeded.",
        )
        self.reloaded_at = gauge(
            "relay_config_last_reload_success_timestamp_seconds",
            "When the configuration was last taken in.",
        )
        source, destination = ("source",), ("destination",)
        self.received = counter("relay_events_received", "Events newly stored from requests.", source)
        self.duplicates = counter(
            "relay_events_duplicate",
            "Requests that repeated a stored event.",
            source,
        )
        self.key_conflicts = counter(
            "relay_events_key_conflicts",
            "Requests whose idempotency key was used before for a different request.",
            source,
        )
        self.bytes = counter("relay_event_bytes", "Body bytes of newly stored events.", source)
        self.rejected = counter(
            "relay_events_rejected",
            "Requests refused, by reason.",
            ("source", "reason"),
        )
        self.unroutable = counter(
            "relay_requests_unroutable",
            "Requests that match no route, by reason.",
            ("reason",),
        )
        for reason in UNROUTABLE:
            self.unroutable.labels(reason)
        self.ingest = histogram(
            "relay_ingest_duration_seconds",
            "From the request's head to its durable answer.",
            source,
            buckets=_FAST,
        )
        self.heartbeats = counter("relay_heartbeats", "Worker heartbeats.", source)
        self.workers = gauge("relay_workers", "Registered workers.", ("source", "status"))
        self.transitions = counter(
            "relay_worker_transitions",
            "Workers that came into a status, new ones included.",
            ("source", "to"),
        )
        self.plugin_errors = counter(
            "relay_plugin_errors",
            "Requests and reports that a plugin failed at.",
            ("plugin",),
        )
        self.created = counter(
            "relay_deliveries_created",
            "Deliveries owed to a destination.",
            destination,
        )
        self.finished = counter(
            "relay_deliveries_finished",
            "Deliveries that ended.",
            ("destination", "outcome"),
        )
        self.attempts = counter(
            "relay_delivery_attempts",
            "HTTP tries by result.",
            ("destination", "result"),
        )
        self.attempt_seconds = histogram(
            "relay_delivery_attempt_duration_seconds",
            "One HTTP try.",
            destination,
            buckets=_FAST,
        )
        self.latency = histogram(
            "relay_delivery_latency_seconds",
            "From receipt to the receiver's yes.",
            destination,
            buckets=_SLOW,
        )
        self.unaccounted = gauge(
            "relay_deliveries_unaccounted",
            "Ledger minus counted pending deliveries: always 0.",
            destination,
        )
        self.pending = gauge(
            "relay_deliveries_pending",
            "Deliveries not yet ended.",
            ("destination", "state"),
        )
        self.circuit = gauge(
            "relay_destination_circuit_open", "1 while a destination is only probed.", destination
        )
        self.disabled = gauge(
            "relay_destination_disabled",
            "1 while a destination is disabled.",
            destination,
        )
        self.oldest = gauge(
            "relay_delivery_oldest_pending_timestamp_seconds",
            "When the oldest pending delivery was created; 0: there is none.",
            destination,
        )
        self.job_success = gauge(
            "relay_job_last_success_timestamp_seconds",
            "When a periodic job last succeeded.",
            ("job_name",),
        )
        self.job_runs = counter("relay_job_runs", "Runs of periodic jobs.", ("job_name", "outcome"))
        self.job_seconds = histogram(
            "relay_job_duration_seconds", "One run of a periodic job.", ("job_name",), buckets=_SLOW
        )
        self.plugins = gauge(
            "relay_plugin_info", "1 for every kind of source there is.", ("plugin", "version")
        )
        self.size = gauge("relay_storage_size_bytes", "Size of the database's files.", ("file",))
        self.commit_seconds = histogram(
            "relay_storage_commit_duration_seconds", "One transaction.", buckets=_FAST
        )
        self.commit_events = histogram(
            "relay_storage_commit_events", "Requests and outcomes that shared a transaction.", buckets=_SHARED
        )
        self.lag = gauge("relay_event_loop_lag_seconds", "How late the event loop last was.")
        self.log_dropped = counter("relay_log_lines_dropped", "Log lines dropped: nobody read the log.")
        for name in sources:
            self.add_source(name)
        for name in destinations:
            self.add_destination(name)

    def add_source(self, name: str) -> None:
        """Create a source's children at 0."""
        for metric in (
            self.received,
            self.duplicates,
            self.key_conflicts,
            self.bytes,
            self.ingest,
            self.heartbeats,
        ):
            metric.labels(name)
        for reason in REASONS:
            self.rejected.labels(name, reason)
        for status in get_args(WorkerStatus):
            self.workers.labels(name, status)
            self.transitions.labels(name, status)

    def count_workers(self, source: str, census: Callable[[str, str], int]) -> None:
        """Have a scrape ask how many workers of a source are in a status; `census` answers from memory."""
        for status in get_args(WorkerStatus):
            self.workers.labels(source, status).set_function(partial(census, source, status))

    def count_commit(self, seconds: float, jobs: int) -> None:
        """Count a transaction."""
        self.commit_seconds.observe(seconds)
        self.commit_events.observe(jobs)

    def weigh(self, database: Path) -> None:
        """Have a scrape ask the file system how large the database is."""
        for file, path in (("main", database), ("wal", database.with_name(f"{database.name}-wal"))):
            self.size.labels(file).set_function(partial(_size, path))

    def add_job(self, name: str) -> None:
        """Create a periodic job's children at 0."""
        self.job_success.labels(name)
        self.job_seconds.labels(name)
        for outcome in ("ok", "failed"):
            self.job_runs.labels(name, outcome)

    def add_destination(self, name: str) -> None:
        """Create a destination's children at 0."""
        for metric in (
            self.created,
            self.attempt_seconds,
            self.latency,
            self.unaccounted,
            self.disabled,
            self.circuit,
            self.oldest,
        ):
            metric.labels(name)
        for outcome in OUTCOMES:
            self.finished.labels(name, outcome)
        for result in RESULTS:
            self.attempts.labels(name, result)
        for state in ("due", "waiting", "in_flight", "held"):
            self.pending.labels(name, state)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
