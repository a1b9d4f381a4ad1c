"""Between records and rows: the only place that knows the order of columns."""

from collections.abc import Sequence
from typing import Any

import aiosqlite
import msgspec

from relay.base.clock import SECOND
from relay.base.json_text import encode
from relay.model import Attempt, Command, Delivery, DeliveryState, StoredEvent, Worker

Row = tuple[Any, ...]

EVENT_COLUMNS = (
    "id, public_id, source, type, subject, received_at, content_type, traceparent, sha256, size,"
    " context, data_at, data_size, data, body"
)
DELIVERY_COLUMNS = (
    "id, public_id, event_id, destination, state, reason, created_at, next_attempt_at, finished_at,"
    " order_key, latest_key, expires_at, on_dead, replay_of"
)
CLAIM_COLUMNS = (
    "d.id, d.public_id, d.event_id, d.destination, d.attempts, d.created_at, e.size,"
    " d.order_key, d.latest_key, d.expires_at, d.on_dead, d.replay_of"
)
ATTEMPT_COLUMNS = "delivery_id, started_at, duration_ms, result, status, error, truncated, answer"
WORKER_COLUMNS = "source, id, status, last_heartbeat, deadline, record"
MEASUREMENT_COLUMNS = "source, worker_id, at, status, cpu, memory, uptime, message_count, sessions"
COMMAND_COLUMNS = "public_id, source, worker_id, state, created_at, expires_at, sent_at, body"
STATS_COLUMNS = "hour, source, type, events, duplicates, bytes"

HOUR = 3600 * SECOND
"""What one row of `stats` counts."""

_worker = msgspec.json.Decoder(Worker)


def event_row(event: StoredEvent) -> Row:
    """Flatten an event; its data is kept as a place in the body wherever it stands there."""
    at = event.body.find(event.data)
    place = (at, len(event.data), None) if at >= 0 else (None, None, event.data)
    return (
        event.id, event.public_id, event.source, event.type, event.subject, event.received_at,
        event.content_type, event.traceparent, event.sha256, len(event.body),
        event.context, *place, event.body,
    )  # fmt: skip


def event_of(row: Sequence[Any]) -> StoredEvent:
    """Build an event from a row of `EVENT_COLUMNS`."""
    body, at = row[14], row[11]
    return StoredEvent(
        id=row[0], public_id=row[1], source=row[2], type=row[3], subject=row[4], received_at=row[5],
        content_type=row[6], traceparent=row[7], sha256=row[8], context=row[10],
        data=row[13] if at is None else body[at : at + row[12]], body=body,
    )  # fmt: skip


def marks(values: Sequence[Any]) -> str:
    """Return a placeholder for each value of `IN (…)`."""
    return ", ".join("?" * len(values))


async def load_events(reader: aiosqlite.Connection, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
    """Read events with their bodies by row id; deleted events are missing from the result."""
    sql = f"SELECT {EVENT_COLUMNS} FROM events WHERE id IN ({marks(event_ids)})"  # noqa: S608 - constants
    events = map(event_of, await reader.execute_fetchall(sql, event_ids))
    return {event.id: event for event in events}


def delivery_row(
    delivery: Delivery,
    state: DeliveryState,
    reason: str | None,
    next_attempt_at: int | None,
    ended: int | None,
) -> Row:
    """Flatten a new delivery, which may have ended at its very birth."""
    return (
        delivery.id, delivery.public_id, delivery.event_id, delivery.destination, state, reason,
        delivery.created_at, next_attempt_at, ended, delivery.order_key, delivery.latest_key,
        delivery.expires_at, delivery.on_dead, delivery.replay_of,
    )  # fmt: skip


def delivery_of(row: Sequence[Any]) -> Delivery:
    """Build a delivery, without its event, from a row of `CLAIM_COLUMNS`."""
    return Delivery(
        id=row[0], public_id=row[1], event_id=row[2], destination=row[3], attempts=row[4],
        created_at=row[5], size=row[6], order_key=row[7], latest_key=row[8], expires_at=row[9],
        on_dead=row[10], replay_of=row[11],
    )  # fmt: skip


def attempt_row(delivery_id: int, attempt: Attempt) -> Row:
    """Flatten an attempt."""
    return (
        delivery_id, attempt.started_at, attempt.duration_ms, attempt.result, attempt.status,
        attempt.error, attempt.truncated, attempt.answer,
    )  # fmt: skip


def worker_row(worker: Worker) -> Row:
    """Flatten a registry row; what lists filter by stands in columns of its own."""
    return (
        worker.source, worker.id, worker.status, worker.last_heartbeat, worker.deadline,
        encode(worker),
    )  # fmt: skip


def worker_of(record: bytes) -> Worker:
    """Build a registry row from its JSON record."""
    return _worker.decode(record)


def measurement_row(worker: Worker, at: int) -> Row:
    """Flatten a worker's gauges at a moment."""
    return (
        worker.source, worker.id, at, worker.status, worker.cpu, worker.memory, worker.uptime,
        worker.message_count, encode(worker.counts),
    )  # fmt: skip


def command_row(command: Command) -> Row:
    """Flatten a command."""
    return (
        command.public_id, command.source, command.worker_id, command.state, command.created_at,
        command.expires_at, command.sent_at, encode(command.body),
    )  # fmt: skip


def command_of(row: Sequence[Any]) -> Command:
    """Build a command from a row of `COMMAND_COLUMNS`."""
    return Command(
        public_id=row[0], source=row[1], worker_id=row[2], state=row[3], created_at=row[4],
        expires_at=row[5], sent_at=row[6], body=msgspec.json.decode(row[7]),
    )  # fmt: skip
