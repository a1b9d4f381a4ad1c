"""Periodic jobs: list them with the results of their runs, and run one now."""

from typing import Annotated

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import Lines, Page, endpoint
from relay.api.responses import stream_lines
from relay.api.views import Time
from relay.base.clock import SECOND, rfc3339
from relay.base.units import render_duration
from relay.jobs.scheduler import Past


class JobView(msgspec.Struct):
    """A periodic job and its runs since the daemon started."""

    name: str
    every: Annotated[str, msgspec.Meta(description='Interval between runs, such as "10s".')]
    running: bool
    runs: int
    failures: int
    started_at: Time | None
    succeeded_at: Time | None
    seconds: float | None
    error: str | None
    next_run_at: Time | None


class JobsApi:
    """Endpoints under `/api/jobs`."""

    def __init__(self, context: Context) -> None:
        self._jobs = context.jobs

    @endpoint(
        "GET", "/api/jobs", "listJobs", "List periodic jobs and the results of their runs.",
        returns=Page[JobView],
    )  # fmt: skip
    async def _list(self, _request: web.Request) -> Page[JobView]:
        return Page(tuple(self._view(past) for past in self._jobs.all()), None)

    @endpoint("POST", "/api/jobs/{name}/run", "runJob", "Run a job now.", returns=Lines[JobView])
    async def _run(self, request: web.Request) -> web.StreamResponse:
        return await stream_lines(request, self._jobs.run(request.match_info["name"]), result=self._view)

    def _view(self, past: Past) -> JobView:
        following = self._jobs.next_run(past.name)
        return JobView(
            name=past.name,
            every=render_duration(past.every),
            running=past.running,
            runs=past.runs,
            failures=past.failures,
            started_at=_time(past.started_at),
            succeeded_at=_time(past.succeeded_at),
            seconds=None if past.seconds is None else round(past.seconds, 3),
            error=past.error,
            next_run_at=None if following is None else _time(int(following.timestamp() * SECOND)),
        )


def _time(moment: int | None) -> str | None:
    return None if moment is None else rfc3339(moment)
