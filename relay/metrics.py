"""What Prometheus sees: counters in memory, labels from config names and closed lists only.

A scrape never touches a table; children are created at start, so that a rate has its first zero.
"""

import platform
import sqlite3
from collections.abc import Callable, Iterable
from functools import partial
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
from relay.errors import REASONS
from relay.model import WorkerStatus

disable_created_metrics()  # type: ignore[no-untyped-call]

RESULTS = ("ok", "3xx", "4xx", "429", "5xx", "timeout", "connect", "tls", "dns", "blocked", "protocol",
           "format")  # fmt: skip
OUTCOMES = ("delivered", "dead", "expired", "cancelled")
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 3600, 21_600, 86_400)


class Metrics:
    """All metrics of one daemon, in a registry of its own."""

    def __init__(self, sources: Iterable[str] = (), destinations: Iterable[str] = ()) -> None:
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
            }
        )
        source, destination = ("source",), ("destination",)
        self.received = counter("relay_events_received", "Events newly stored from requests.", source)
        self.duplicates = counter(
            "relay_events_duplicate",
            "Requests that repeated a stored event.",
            source,
        )
        self.bytes = counter("relay_event_bytes", "Body bytes of newly stored events.", source)
        self.rejected = counter(
            "relay_events_rejected",
            "Requests refused, by reason.",
            ("source", "reason"),
        )
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
        for name in sources:
            self.add_source(name)
        for name in destinations:
            self.add_destination(name)

    def add_source(self, name: str) -> None:
        """Create a source's children at 0."""
        for metric in (self.received, self.duplicates, self.bytes, self.ingest, self.heartbeats):
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

    def add_destination(self, name: str) -> None:
        """Create a destination's children at 0."""
        for metric in (
            self.created,
            self.attempt_seconds,
            self.latency,
            self.unaccounted,
            self.disabled,
            self.circuit,
        ):
            metric.labels(name)
        for outcome in OUTCOMES:
            self.finished.labels(name, outcome)
        for result in RESULTS:
            self.attempts.labels(name, result)
        for state in ("waiting", "in_flight"):
            self.pending.labels(name, state)
