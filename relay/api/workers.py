"""Workers: list and show them, forget one, set maintenance, queue and cancel commands."""

from collections.abc import Sequence
from functools import partial
from heapq import nsmallest
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import Page, endpoint
from relay.api.query_params import MOST_ROWS, WorkersQuery, read_field
from relay.api.views import Time, about, unknown
from relay.base.clock import SECOND, rfc3339
from relay.base.ids import COMMAND, new_id
from relay.base.units import parse_duration, parse_time_span
from relay.config.validators import pattern
from relay.errors import RelayError, UnknownError
from relay.model import Command, Worker, WorkerStatus
from relay.store import WorkerChanges
from relay.workers.rules import Plan, heard_minutes, matches, shown

RECENT_METRICS = 60  # rows shown with a worker: one hour
RECENT_COMMANDS = 20
AT_ONCE = 500
"""Workers that one transaction puts into maintenance."""

DEFAULT_TTL = "10m"
MOST_COMMAND_BYTES = 16 * 1024

_encode = msgspec.json.Encoder(enc_hook=str).encode


class SessionView(msgspec.Struct):
    """A session that a worker reported."""

    id: str
    status: str
    phone: str | None
    name: str | None
    last_activity: str | None


class MeasurementView(msgspec.Struct):
    """The values that a worker reported with one heartbeat."""

    at: Time
    status: WorkerStatus
    cpu: float | None
    memory: float | None
    uptime: float | None
    message_count: int | None
    sessions: dict[str, int]


class CommandView(msgspec.Struct):
    """A command for a worker."""

    id: str
    state: Literal["queued", "sent", "expired", "cancelled"]
    created_at: Time
    sent_at: Time | None
    expires_at: Time
    command: dict[str, Any]


class WorkerView(msgspec.Struct):
    """A worker."""

    source: str
    id: str
    status: WorkerStatus
    maintenance: bool
    maintenance_by: Annotated[
        Literal["operator", "config"] | None,
        about("Who started it: an operator, or a window in config.toml; null: it is not in maintenance."),
    ]
    maintenance_until: Annotated[Time | None, about("When it ends; null: when an operator ends it.")]
    endpoint: str
    description: str
    version: str
    environment: str
    max_sessions: int | None
    registered_at: Time
    last_heartbeat: Time
    restarts: int
    cpu: float | None
    memory: float | None
    uptime: float | None
    message_count: int | None
    counts: dict[str, int]
    sessions: tuple[SessionView, ...]
    session_count: int
    queued_commands: Annotated[int, about("Commands that wait for its next heartbeat.")]
    heard_minutes: Annotated[
        str,
        about("One character per minute of the last hour, oldest first: 1 if it sent a heartbeat, else 0."),
    ]


class WorkerShown(WorkerView):
    """A worker with its latest gauges and commands."""

    metrics: tuple[MeasurementView, ...]
    commands: tuple[CommandView, ...]


class ForgottenView(msgspec.Struct):
    """The worker that was removed from the registry."""

    source: str
    id: str
    forgotten: bool


class MaintenanceBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Whether the worker is in maintenance, and for how long."""

    on: bool
    for_: Annotated[str, about('Duration such as "2h"; without it, until an operator ends it.')] | None = (
        msgspec.field(default=None, name="for")
    )


class PatternBody(MaintenanceBody, kw_only=True):
    """The workers that begin or end maintenance, and for how long."""

    pattern: Annotated[str, about('Shell-style pattern of their ids, such as "batch-*".')]
    source: Annotated[str, about("Name of their source; without it, of every source.")] | None = None


class MaintainedView(msgspec.Struct):
    """The result of beginning or ending maintenance by a pattern."""

    workers: Annotated[int, about("Number of workers that match.")]
    maintenance_until: Time | None


class CommandBody(msgspec.Struct):
    """A command, and how long it may wait for a heartbeat."""

    command: Annotated[
        dict[str, Any],
        msgspec.Meta(extra_json_schema={"required": ["type"], "properties": {"type": {"type": "string"}}}),
    ]
    ttl: str = DEFAULT_TTL


class QueuedView(msgspec.Struct):
    """A command that was queued."""

    id: str
    state: str
    command: dict[str, Any]


class CommandCancelledView(msgspec.Struct):
    """A command that was cancelled."""

    id: str
    state: str


_WORKER = "/api/workers/{source}/{id:[^/]+}"  # ids may have braces, which aiohttp's own pattern excludes


class WorkersApi:
    """Endpoints under `/api/workers`."""

    def __init__(self, context: Context) -> None:
        self._store = context.store
        self._clock = context.clock
        self._check_names = context.check_names
        self._ingest = context.ingest

    @endpoint(
        "GET", "/api/workers", "listWorkers", "List workers.", query=WorkersQuery, returns=Page[WorkerView]
    )
    async def _list(self, _request: web.Request, query: WorkersQuery) -> dict[str, Any]:
        if all(worker.source != query.source for worker in self._store.workers.all()):
            await self._check_names(query)
        filters = msgspec.structs.asdict(query)
        limit, cursor = filters.pop("limit"), filters.pop("cursor")
        source, _, id_ = (cursor or "").partition("/")
        workers = nsmallest(
            limit + 1,
            (
                worker
                for worker in self._store.workers.all()
                if worker.unregistered_at is None
                and (worker.source, worker.id) > (source, id_)
                and all(value in (None, getattr(worker, name)) for name, value in filters.items())
            ),
            key=lambda worker: (worker.source, worker.id),
        )
        page = workers[:limit]
        more = f"{page[-1].source}/{page[-1].id}" if len(workers) > len(page) else None
        return {"items": [self._shown(worker) for worker in page], "next_cursor": more}

    @endpoint(
        "GET", _WORKER, "showWorker", "Show a worker with its sessions, gauges and commands.",
        returns=WorkerShown,
    )  # fmt: skip
    async def _show(self, request: web.Request) -> dict[str, Any]:
        worker = self._find(request)
        metrics = await self._rows("worker_metrics", worker, RECENT_METRICS)
        commands = await self._rows("worker_commands", worker, RECENT_COMMANDS)
        return {
            **self._shown(worker),
            "metrics": [_measurement(row) for row in metrics],
            "commands": [_command(row) for row in commands],
        }

    @endpoint(
        "DELETE", _WORKER, "forgetWorker", "Forget a worker. Its next heartbeat registers it again.",
        returns=ForgottenView,
    )  # fmt: skip
    async def _forget(self, request: web.Request) -> ForgottenView:
        worker = self._find(request)
        key = (worker.source, worker.id)
        await self._store.workers.change(lambda changes: changes.forget([key]))
        return ForgottenView(worker.source, worker.id, forgotten=True)

    @endpoint(
        "POST", f"{_WORKER}/maintenance", "maintainWorker", "Start or end a worker's maintenance.",
        body=MaintenanceBody, find="_find", returns=WorkerView,
    )  # fmt: skip
    async def _maintain(self, request: web.Request, body: MaintenanceBody) -> dict[str, Any]:
        worker = self._find(request)
        key, plan = (worker.source, worker.id), self._plan(body)
        after = await self._store.workers.change(lambda changes: changes.maintain(key, on=body.on, plan=plan))
        return self._shown(after or worker)

    @endpoint(
        "POST", "/api/workers/maintenance", "maintainWorkers",
        "Start or end maintenance of the workers whose ids match a pattern.",
        body=PatternBody, returns=MaintainedView,
    )  # fmt: skip
    async def _maintain_all(self, _request: web.Request, body: PatternBody) -> MaintainedView:
        read_field("pattern", pattern, body.pattern)
        if body.source is not None:
            await self._check_names(WorkersQuery(source=body.source))
        as_ = f"{body.source or '*'}/{body.pattern}"
        plan = self._plan(body, as_)
        keys = [
            (row.source, row.id)
            for row in self._store.workers.all()
            if row.unregistered_at is None and matches(as_, row)
        ]
        if not keys:
            of = "" if body.source is None else f' of source "{body.source}"'
            hint = "list workers: relay workers list; a pattern must match at least one of them"
            raise UnknownError(f'no worker{of} matches "{body.pattern}"', hint=hint)
        for first in range(0, len(keys), AT_ONCE):
            some = keys[first : first + AT_ONCE]
            await self._store.workers.change(partial(_maintain_some, some, body.on, plan))
        return MaintainedView(len(keys), None if plan.until is None else rfc3339(plan.until))

    def _plan(self, body: MaintenanceBody, pattern: str = "") -> Plan:
        """Return an operator's maintenance as a request's body describes it."""
        if body.for_ is None:
            return Plan("operator", None, pattern)
        if not body.on:
            raise RelayError('"for" needs "on": true', hint='to end maintenance now, omit "for"')
        seconds = read_field("for", parse_time_span, body.for_)
        return Plan("operator", self._clock.steady() + int(seconds * SECOND), pattern)

    @endpoint(
        "GET", f"{_WORKER}/commands", "listCommands", "List a worker's commands, newest first.",
        returns=Page[CommandView],
    )  # fmt: skip
    async def _commands(self, request: web.Request) -> dict[str, Any]:
        worker = self._find(request)
        rows = await self._rows("worker_commands", worker, MOST_ROWS)
        return {"items": [_command(row) for row in rows], "next_cursor": None}

    @endpoint(
        "POST", f"{_WORKER}/commands", "queueCommand",
        "Send a worker a command in the response to its next heartbeat.",
        body=CommandBody, find="_find", returns=QueuedView, status=201,
    )  # fmt: skip
    async def _queue(self, request: web.Request, body: CommandBody) -> QueuedView:
        worker = self._find(request)
        type_ = body.command.get("type")
        if not isinstance(type_, str) or not type_:
            raise RelayError(
                '"command" needs a "type"', hint='example: {"command": {"type": "restart"}, "ttl": "10m"}'
            )
        if len(_encode(body.command)) > MOST_COMMAND_BYTES:
            raise RelayError("the command is larger than 16 KiB", hint="send a reference instead")
        try:
            ttl = parse_duration(body.ttl)
        except ValueError as error:
            raise RelayError(f'"ttl": {error}') from None
        command = Command(
            public_id=new_id(COMMAND, self._clock.wall()),
            source=worker.source,
            worker_id=worker.id,
            body=body.command,
            created_at=self._clock.wall(),
            expires_at=self._clock.steady() + int(ttl * SECOND),
        )
        await self._store.workers.change(lambda changes: changes.queue(command))
        return QueuedView(command.public_id, command.state, body.command)

    @endpoint(
        "DELETE", f"{_WORKER}/commands/{{command}}", "cancelCommand",
        "Cancel a command that is still queued.",
        returns=CommandCancelledView,
    )  # fmt: skip
    async def _cancel(self, request: web.Request) -> CommandCancelledView:
        worker, command = self._find(request), request.match_info["command"]
        key = (worker.source, worker.id)
        if not await self._store.workers.change(lambda changes: changes.cancel_command(key, command)):
            raise UnknownError(f'no queued command "{command}"', hint="a sent command cannot be cancelled")
        return CommandCancelledView(command, "cancelled")

    async def _rows(self, kind: str, worker: Worker, limit: int) -> list[dict[str, Any]]:
        return await self._store.queries.find(kind, limit=limit, source=worker.source, worker_id=worker.id)

    def _shown(self, worker: Worker) -> dict[str, Any]:
        sessions = worker.counts.get("total", len(worker.sessions))
        heard = heard_minutes(worker, self._clock.wall())
        queued = self._store.workers.queued(worker.source, worker.id)
        counts = {"session_count": sessions, "queued_commands": queued}
        return {**shown(worker), **counts, "heard_minutes": heard}

    def _find(self, request: web.Request) -> Worker:
        key = (request.match_info["source"], request.match_info["id"])
        for worker in self._store.workers.all():
            if (worker.source, worker.id) == key and worker.unregistered_at is None:
                return worker
        if key[0] not in self._ingest.mounts:
            raise unknown("source", key[0], self._ingest.mounts)
        raise UnknownError(
            f'unknown worker "{key[1]}" of source "{key[0]}"', hint="list them: relay workers list"
        )


def _maintain_some(keys: Sequence[tuple[str, str]], on: bool, plan: Plan, changes: WorkerChanges) -> None:  # noqa: FBT001 - see above
    for key in keys:
        changes.maintain(key, on=on, plan=plan)


def _measurement(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in row.items() if name not in ("row", "source", "worker_id")}
    return {**kept, "at": rfc3339(row["at"]), "sessions": msgspec.Raw(row["sessions"])}


def _command(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "state": row["state"],
        "created_at": rfc3339(row["created_at"]),
        "sent_at": None if row["sent_at"] is None else rfc3339(row["sent_at"]),
        "expires_at": rfc3339(row["expires_at"]),
        "command": msgspec.Raw(row["body"]),
    }
