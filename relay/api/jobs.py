"""Periodic jobs for operators: when each ran, what came of it, and running one now."""

from typing import Any

from aiohttp import web

from relay.api.context import Parts
from relay.api.responses import say, tell
from relay.base.clock import SECOND, rfc3339
from relay.base.units import render_duration
from relay.jobs.scheduler import Past


class JobsApi:
    """The part of the admin API under `/api/jobs`."""

    def __init__(self, parts: Parts) -> None:
        self._jobs = parts.jobs

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [
            web.get("/api/jobs", self._list),
            web.post("/api/jobs/{name}/run", self._run),
        ]

    async def _list(self, _request: web.Request) -> web.Response:
        return say({"items": [self._item(past) for past in self._jobs.all()], "next_cursor": None})

    async def _run(self, request: web.Request) -> web.StreamResponse:
        return await tell(request, self._jobs.run(request.match_info["name"]), result=self._item)

    def _item(self, past: Past) -> dict[str, Any]:
        following = self._jobs.next_run(past.name)
        return {
            "name": past.name,
            "every": render_duration(past.every),
            "running": past.running,
            "runs": past.runs,
            "failures": past.failures,
            "started_at": _time(past.started_at),
            "succeeded_at": _time(past.succeeded_at),
            "seconds": None if past.seconds is None else round(past.seconds, 3),
            "error": past.error,
            "next_run_at": None if following is None else _time(int(following.timestamp() * SECOND)),
        }


def _time(moment: int | None) -> str | None:
    return None if moment is None else rfc3339(moment)
