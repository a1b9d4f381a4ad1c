"""Converts between records and rows; the only place that knows the order of columns."""

from collections.abc import Sequence
from typing import Any

import msgspec

from relay.base.json_text import encode
from relay.model import Attempt, Command, Delivery, DeliveryState, DestinationState, StoredEvent, Worker

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
GROUP_CLAIM_COLUMNS = f"{CLAIM_COLUMNS}, d.group_key"
ATTEMPT_COLUMNS = "delivery_id, started_at, duration_ms, result, status, error, truncated, answer"
WORKER_COLUMNS = "source, id, status, last_heartbeat, deadline, record"
MEASUREMENT_COLUMNS = "source, worker_id, at, status, cpu, memory, uptime, message_count, sessions"
COMMAND_COLUMNS = "public_id, source, worker_id, state, created_at, expires_at, sent_at, body"
STATE_COLUMNS = ", ".join(DestinationState.__struct_fields__)
STATS_COLUMNS = "hour, source, type, events, duplicates, bytes"

_worker = msgspec.json.Decoder(Worker)


def event_row(event: StoredEvent) -> Row:
    """Return an event's row; data that is part of the body is stored as a position in it."""
    at = event.body.find(event.data)
    place = (at, len(event.data), None) if at >= 0 else (None, None, event.data)
    return (
        event.id, event.public_id, event.source, event.type, event.subject, event.received_at,
        event.content_type, event.traceparent, event.sha256, len(event.body),
        event.context, *place, event.body,
    )  # fmt: skip


def event_of(row: Sequence[Any]) -> StoredEvent:
    """Build an event from a row of `EVENT_COLUMNS`."""
    (
        id_, public_id, source, type_, subject, received_at, content_type, traceparent, sha256, _size,
        context, data_at, data_size, data, body,
    ) = row  # fmt: skip
    return StoredEvent(
        id=id_, public_id=public_id, source=source, type=type_, subject=subject, received_at=received_at,
        content_type=content_type, traceparent=traceparent, sha256=sha256, context=context,
        data=data if data_at is None else body[data_at : data_at + data_size], body=body,
    )  # fmt: skip


def delivery_row(
    delivery: Delivery,
    state: DeliveryState,
    reason: str | None,
    next_attempt_at: int | None,
    ended: int | None,
) -> Row:
    """Return a new delivery's row; it may have ended already."""
    return (
        delivery.id, delivery.public_id, delivery.event_id, delivery.destination, state, reason,
        delivery.created_at, next_attempt_at, ended, delivery.order_key, delivery.latest_key,
        delivery.expires_at, delivery.on_dead, delivery.replay_of,
    )  # fmt: skip


def delivery_of(row: Sequence[Any]) -> Delivery:
    """Build a delivery, without its event, from a row of `CLAIM_COLUMNS`."""
    (
        id_, public_id, event_id, destination, attempts, created_at, size, order_key, latest_key,
        expires_at, on_dead, replay_of,
    ) = row  # fmt: skip
    return Delivery(
        id=id_, public_id=public_id, event_id=event_id, destination=destination, attempts=attempts,
        created_at=created_at, size=size, order_key=order_key, latest_key=latest_key,
        expires_at=expires_at, on_dead=on_dead, replay_of=replay_of,
    )  # fmt: skip


def grouped_delivery_of(row: Sequence[Any]) -> Delivery:
    """Build a delivery, without its event, from a row of `GROUP_CLAIM_COLUMNS`."""
    delivery = delivery_of(row[:-1])
    delivery.group_key = row[-1]
    return delivery


def attempt_row(delivery_id: int, attempt: Attempt) -> Row:
    """Return an attempt's row."""
    return (
        delivery_id, attempt.started_at, attempt.duration_ms, attempt.result, attempt.status,
        attempt.error, attempt.truncated, attempt.answer,
    )  # fmt: skip


def worker_row(worker: Worker) -> Row:
    """Return a worker's row; fields that lists filter by have their own columns."""
    return (
        worker.source, worker.id, worker.status, worker.last_heartbeat, worker.deadline,
        encode(worker),
    )  # fmt: skip


def worker_of(record: bytes) -> Worker:
    """Build a worker from its JSON record."""
    return _worker.decode(record)


def measurement_row(worker: Worker, at: int) -> Row:
    """Return a row of a worker's gauges."""
    return (
        worker.source, worker.id, at, worker.status, worker.cpu, worker.memory, worker.uptime,
        worker.message_count, encode(worker.counts),
    )  # fmt: skip


def command_row(command: Command) -> Row:
    """Return a command's row."""
    return (
        command.public_id, command.source, command.worker_id, command.state, command.created_at,
        command.expires_at, command.sent_at, encode(command.body),
    )  # fmt: skip


def command_of(row: Sequence[Any]) -> Command:
    """Build a command from a row of `COMMAND_COLUMNS`."""
    public_id, source, worker_id, state, created_at, expires_at, sent_at, body = row
    return Command(
        public_id=public_id, source=source, worker_id=worker_id, state=state, created_at=created_at,
        expires_at=expires_at, sent_at=sent_at, body=msgspec.json.decode(body),
    )  # fmt: skip
