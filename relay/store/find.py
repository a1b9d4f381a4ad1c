"""Lists for operators: newest first, by keyset, every filter with its index."""

from collections.abc import Mapping, Sequence
from typing import Any

import aiosqlite

from relay.errors import RelayError

_CURSORS = {"worker_metrics": "e.at", "worker_commands": "e.created_at"}
_LISTS: dict[str, tuple[str, dict[str, str]]] = {
    "events": (
        """
        SELECT e.id AS row, e.public_id AS id, e.source, e.type, e.subject, e.received_at, e.size
          FROM events AS e
        """,
        {"id": "e.public_id", "source": "e.source", "type": "e.type", "subject": "e.subject"},
    ),
    "deliveries": (
        """
        SELECT e.id AS row, e.public_id AS id, v.public_id AS event_id, v.type, e.destination, e.state,
               e.reason, e.attempts, e.next_attempt_at, e.last_status, e.last_error, e.created_at,
               e.finished_at,
               (SELECT r.public_id FROM deliveries AS r WHERE r.id = e.replay_of) AS replay_of
          FROM deliveries AS e JOIN events AS v ON v.id = e.event_id
        """,
        {
            "id": "e.public_id",
            "event_id": "v.public_id",
            "destination": "e.destination",
            "state": "e.state",
        },
    ),
    "attempts": (
        """
        SELECT e.id AS row, d.public_id AS delivery_id, e.started_at, e.duration_ms, e.result,
               e.status, e.error, e.truncated, e.answer
          FROM attempts AS e JOIN deliveries AS d ON d.id = e.delivery_id
        """,
        {"delivery_id": "d.public_id"},
    ),
    "worker_metrics": (
        """
        SELECT e.at AS row, e.source, e.worker_id, e.at, e.status, e.cpu, e.memory, e.uptime,
               e.message_count, e.sessions
          FROM worker_metrics AS e
        """,
        {"source": "e.source", "worker_id": "e.worker_id"},
    ),
    "worker_commands": (
        """
        SELECT e.created_at AS row, e.public_id AS id, e.source, e.worker_id, e.state, e.created_at,
               e.sent_at, e.expires_at, e.body
          FROM worker_commands AS e
        """,
        {"id": "e.public_id", "source": "e.source", "worker_id": "e.worker_id", "state": "e.state"},
    ),
}


SPAN_SQL = "SELECT min(id), max(id) FROM events WHERE received_at >= ? AND received_at < ?"
"""Where in the order of ids the events of a time are: the list itself then needs no other order."""

_TIMES = ("since", "until")  # of events, microseconds UTC


def list_sql(kind: str, conditions: Sequence[str]) -> str:
    """Return the statement for a page of a list."""
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    return f"{_LISTS[kind][0]} {where} ORDER BY {_CURSORS.get(kind, 'e.id')} DESC LIMIT ?"


async def find(
    reader: aiosqlite.Connection,
    kind: str,
    *,
    limit: int,
    before: int | None,
    filters: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return at most `limit` rows older than row `before`; `row` in each is the next cursor.

    Raises:
        RelayError: no such list, or it has no such filter.
    """
    if kind not in _LISTS:
        raise RelayError(f"no list of {kind}", hint=f"there are {', '.join(_LISTS)}")
    columns = _LISTS[kind][1]
    conditions = [f"{_CURSORS.get(kind, 'e.id')} < ?"] if before is not None else []
    values: list[Any] = [before] if before is not None else []
    times = {name: filters[name] for name in _TIMES if kind == "events" and filters.get(name) is not None}
    if times:
        bounds = (times.get("since", 0), times.get("until", 2**63 - 1))
        [(first, last)] = await reader.execute_fetchall(SPAN_SQL, bounds)
        conditions += ["e.id BETWEEN ? AND ?", "+e.received_at >= ?", "+e.received_at < ?"]
        values += [first, last, *bounds]
    for name, value in filters.items():
        if kind == "events" and name in _TIMES:
            continue
        if name not in columns:
            raise RelayError(f"{kind} have no filter {name!r}", hint=f"there are {', '.join(columns)}")
        if value is not None:
            conditions.append(f"{columns[name]} = ?")
            values.append(value)
    cursor = await reader.execute(list_sql(kind, conditions), (*values, limit))
    names = [column[0] for column in cursor.description]
    rows = await cursor.fetchall()
    await cursor.close()
    return [dict(zip(names, row, strict=True)) for row in rows]
