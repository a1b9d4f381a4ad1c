"""Workers for operators: who there is, with sessions and gauges; forget, maintenance, commands."""

from heapq import nsmallest
from typing import Any

import msgspec
from aiohttp import web

from relay.api.context import Parts
from relay.api.query_params import MOST_ROWS, WorkersQuery
from relay.api.responses import body_of, query_of, say
from relay.base.clock import SECOND, rfc3339
from relay.base.ids import command_id
from relay.base.units import parse_duration
from relay.errors import RelayError, UnknownError
from relay.model import Command, Worker
from relay.workers.rules import shown

RECENT_METRICS = 60  # rows shown with a worker: an hour
RECENT_COMMANDS = 20
DEFAULT_TTL = "10m"
MOST_COMMAND_BYTES = 16 * 1024

_encode = msgspec.json.Encoder(enc_hook=str).encode
_HINT = "it must be a JSON object"


class WorkersApi:
    """The part of the admin API under `/api/workers`."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._clock = parts.clock

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        one = "/api/workers/{source}/{id:[^/]+}"  # braces too, which aiohttp's own pattern leaves out
        return [
            web.get("/api/workers", self._list),
            web.get(one, self._show),
            web.delete(one, self._forget),
            web.post(one + "/maintenance", self._maintain),
            web.get(one + "/commands", self._commands),
            web.post(one + "/commands", self._queue),
            web.delete(one + "/commands/{command}", self._cancel),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        query = query_of(request, WorkersQuery)
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
        return say({"items": [_item(worker) for worker in page], "next_cursor": more})

    async def _show(self, request: web.Request) -> web.Response:
        worker = self._find(request)
        metrics = await self._rows("worker_metrics", worker, RECENT_METRICS)
        commands = await self._rows("worker_commands", worker, RECENT_COMMANDS)
        shown = {
            **_item(worker),
            "metrics": [_measurement(row) for row in metrics],
            "commands": [_command(row) for row in commands],
        }
        return say(shown)

    async def _forget(self, request: web.Request) -> web.Response:
        worker = self._find(request)
        key = (worker.source, worker.id)
        await self._store.workers.change(lambda fleet: fleet.forget([key]))
        return say({"source": worker.source, "id": worker.id, "forgotten": True})

    async def _maintain(self, request: web.Request) -> web.Response:
        worker = self._find(request)
        body = await body_of(request, dict[str, Any], _HINT)
        on = body.get("on")
        if not isinstance(on, bool):
            raise RelayError('"on" must be true or false', hint='send {"on": true}')
        key = (worker.source, worker.id)
        after = await self._store.workers.change(lambda fleet: fleet.maintain(key, on=on))
        return say(_item(after or worker))

    async def _commands(self, request: web.Request) -> web.Response:
        worker = self._find(request)
        rows = await self._rows("worker_commands", worker, MOST_ROWS)
        return say({"items": [_command(row) for row in rows], "next_cursor": None})

    async def _queue(self, request: web.Request) -> web.Response:
        worker = self._find(request)
        body = await body_of(request, dict[str, Any], _HINT)
        wish = body.get("command")
        if not isinstance(wish, dict) or not isinstance(wish.get("type"), str) or not wish["type"]:
            raise RelayError(
                '"command" must be an object with a "type"',
                hint='send {"command": {"type": "restart"}, "ttl": "10m"}',
            )
        if len(_encode(wish)) > MOST_COMMAND_BYTES:
            raise RelayError("the command is larger than 16 KiB", hint="send a reference instead")
        try:
            ttl = parse_duration(str(body.get("ttl", DEFAULT_TTL)))
        except ValueError as error:
            raise RelayError(f'"ttl": {error}') from None
        command = Command(
            public_id=command_id(self._clock.wall()),
            source=worker.source,
            worker_id=worker.id,
            body=wish,
            created_at=self._clock.wall(),
            expires_at=self._clock.steady() + int(ttl * SECOND),
        )
        await self._store.workers.change(lambda fleet: fleet.queue(command))
        return say({"id": command.public_id, "state": command.state, "command": wish}, 201)

    async def _cancel(self, request: web.Request) -> web.Response:
        worker, command = self._find(request), request.match_info["command"]
        key = (worker.source, worker.id)
        if not await self._store.workers.change(lambda fleet: fleet.cancel_command(key, command)):
            raise UnknownError(f"no queued command {command!r}", hint="a sent one cannot be taken back")
        return say({"id": command, "state": "cancelled"})

    async def _rows(self, kind: str, worker: Worker, limit: int) -> list[dict[str, Any]]:
        return await self._store.queries.find(kind, limit=limit, source=worker.source, worker_id=worker.id)

    def _find(self, request: web.Request) -> Worker:
        key = (request.match_info["source"], request.match_info["id"])
        for worker in self._store.workers.all():
            if (worker.source, worker.id) == key and worker.unregistered_at is None:
                return worker
        raise UnknownError(
            f"no worker {key[1]!r} of source {key[0]!r}", hint="`relay workers list` shows who there is"
        )


def _item(worker: Worker) -> dict[str, Any]:
    return {**shown(worker), "session_count": worker.counts.get("total", len(worker.sessions))}


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
