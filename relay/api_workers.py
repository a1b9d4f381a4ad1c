"""Workers for operators: who there is, with sessions and gauges; forget, maintenance, commands."""

import re
from heapq import nsmallest
from typing import Any

import msgspec
from aiohttp import web

from relay.clock import SECOND, Clock, rfc3339
from relay.errors import RelayError
from relay.ids import command_id
from relay.model import Command, Worker
from relay.registry import shown
from relay.store import Store
from relay.units import parse_duration

RECENT_METRICS = 60  # rows shown with a worker: an hour
RECENT_COMMANDS = 20
MOST_ROWS = 500  # of a list
FILTERS = ("source", "id", "status", "version", "environment", "endpoint")
DEFAULT_TTL = "10m"
MOST_COMMAND_BYTES = 16 * 1024

_encode = msgspec.json.Encoder(enc_hook=str).encode


class WorkersApi:
    """The part of the admin API under `/api/workers`."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        one = "/api/workers/{source}/{id}"
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
        known = (*FILTERS, "limit", "cursor")
        if unknown := set(request.query) - set(known):
            raise RelayError(f"unknown parameter {min(unknown)!r}", hint=f"there are {', '.join(known)}")
        wanted = {name: request.query[name] for name in FILTERS if name in request.query}
        limit = request.query.get("limit", "50")
        if not re.fullmatch("[1-9][0-9]{0,8}", limit):
            raise RelayError("limit must be a whole number", hint="for example limit=50")
        source, _, id_ = request.query.get("cursor", "").partition("/")
        workers = nsmallest(
            min(int(limit), MOST_ROWS) + 1,
            (
                worker
                for worker in self._store.workers()
                if worker.unregistered_at is None
                and (worker.source, worker.id) > (source, id_)
                and all(getattr(worker, name) == value for name, value in wanted.items())
            ),
            key=lambda worker: (worker.source, worker.id),
        )
        page = workers[: min(int(limit), MOST_ROWS)]
        more = f"{page[-1].source}/{page[-1].id}" if len(workers) > len(page) else None
        return _json({"items": [_item(worker) for worker in page], "next_cursor": more})

    async def _show(self, request: web.Request) -> web.Response:
        worker = self._find(request)
        metrics = await self._rows("worker_metrics", worker, RECENT_METRICS)
        commands = await self._rows("worker_commands", worker, RECENT_COMMANDS)
        shown = {
            **_item(worker),
            "metrics": [_measurement(row) for row in metrics],
            "commands": [_command(row) for row in commands],
        }
        return _json(shown)

    async def _forget(self, request: web.Request) -> web.Response:
        worker = self._find(request)
        key = (worker.source, worker.id)
        await self._store.fleet(lambda fleet: fleet.forget([key]))
        return _json({"source": worker.source, "id": worker.id, "forgotten": True})

    async def _maintain(self, request: web.Request) -> web.Response:
        worker = self._find(request)
        body = await _body(request)
        on = body.get("on")
        if not isinstance(on, bool):
            raise RelayError('"on" must be true or false', hint='send {"on": true}')
        key = (worker.source, worker.id)
        after = await self._store.fleet(lambda fleet: fleet.maintain(key, on=on))
        return _json(_item(after or worker))

    async def _commands(self, request: web.Request) -> web.Response:
        worker = self._find(request)
        rows = await self._rows("worker_commands", worker, MOST_ROWS)
        return _json({"items": [_command(row) for row in rows], "next_cursor": None})

    async def _queue(self, request: web.Request) -> web.Response:
        worker = self._find(request)
        body = await _body(request)
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
        await self._store.fleet(lambda fleet: fleet.queue(command))
        return _json({"id": command.public_id, "state": command.state, "command": wish}, 201)

    async def _cancel(self, request: web.Request) -> web.Response:
        worker, command = self._find(request), request.match_info["command"]
        key = (worker.source, worker.id)
        if not await self._store.fleet(lambda fleet: fleet.cancel_command(key, command)):
            raise _missing(f"no queued command {command!r}", "a sent one cannot be taken back")
        return _json({"id": command, "state": "cancelled"})

    async def _rows(self, kind: str, worker: Worker, limit: int) -> list[dict[str, Any]]:
        return await self._store.find(kind, limit=limit, source=worker.source, worker_id=worker.id)

    def _find(self, request: web.Request) -> Worker:
        key = (request.match_info["source"], request.match_info["id"])
        for worker in self._store.workers():
            if (worker.source, worker.id) == key and worker.unregistered_at is None:
                return worker
        raise _missing(f"no worker {key[1]!r} of source {key[0]!r}", "GET /api/workers lists them")


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        return msgspec.json.decode(await request.read(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise RelayError(f"the body is no JSON object: {error}") from None


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


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=_encode(value), content_type="application/json")


def _missing(message: str, hint: str) -> web.HTTPNotFound:
    error = {"code": "not_found", "message": message, "hint": hint}
    return web.HTTPNotFound(text=_encode({"error": error}).decode(), content_type="application/json")
