"""Periodic jobs: list them with the results of their runs, and run one now.

In a cluster, one node leads some of the jobs. The other nodes show its runs, and let it run the job.
"""

import asyncio
import secrets
from typing import Annotated, Any

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import Lines, Page, endpoint
from relay.api.responses import stream_lines
from relay.api.views import Time, about
from relay.base.clock import SECOND, rfc3339
from relay.base.units import render_duration
from relay.errors import RelayError, UnknownError
from relay.jobs.scheduler import Past

RUN, AWAIT_RUN, LED_JOBS = "run", "wait for the run", "list jobs"
"""Requests of other nodes."""

PATIENCE = 2.0  # seconds within which the leaders of jobs must answer
TURN = 3.0  # seconds for which the leader waits for the end of a run before it answers
MOST_RUNS = 100  # runs for other nodes whose results are kept


class JobView(msgspec.Struct):
    """A periodic job and its runs since the daemon started: this one, or the node that leads the job."""

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
    node: Annotated[
        str | None, about("The other node that leads the job and answered; null: the runs of this node.")
    ] = None


class JobsApi:
    """Endpoints under `/api/jobs`."""

    def __init__(self, context: Context) -> None:
        self._jobs = context.jobs
        self._nodes = nodes = context.store.nodes
        self._runs: dict[str, asyncio.Task[Past]] = {}  # for other nodes
        for verb, handle in ((RUN, self._run_here), (AWAIT_RUN, self._await_here), (LED_JOBS, self._led)):
            nodes.handle(verb, handle)

    def end(self) -> None:
        """Cancel the runs for other nodes, because the daemon stops."""
        for task in self._runs.values():
            task.cancel()

    @endpoint(
        "GET", "/api/jobs", "listJobs", "List periodic jobs and the results of their runs.",
        returns=Page[JobView],
    )  # fmt: skip
    async def _list(self, _request: web.Request) -> Page[JobView]:
        led: dict[str, JobView] = {}
        if any(map(self._jobs.is_led_elsewhere, self._jobs.of_cluster)):
            others = await self._nodes.ask_others(LED_JOBS, None, PATIENCE)
            for node, views in others.read(list[JobView])[0]:
                led |= {view.name: msgspec.structs.replace(view, node=node) for view in views}
        shown = [self._view(past) for past in self._jobs.all()]
        return Page(
            tuple(
                led[view.name] if view.name in led and self._jobs.is_led_elsewhere(view.name) else view
                for view in shown
            ),
            None,
        )

    @endpoint("POST", "/api/jobs/{name}/run", "runJob", "Run a job now.", returns=Lines[JobView])
    async def _run(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if self._jobs.is_led_elsewhere(name):
            return await stream_lines(request, self._run_elsewhere(name))
        return await stream_lines(request, self._jobs.run(name), result=self._view)

    async def _run_elsewhere(self, name: str) -> Any:
        """Let the node that leads a job run it, and wait for the end; a lost client does not end the run.

        Raises:
            RelayError: the leader refused, or does not answer any more.
        """
        run = await self._nodes.ask_leader(name, RUN, name)
        view = None
        while view is None:
            view = await self._nodes.ask_node(run["node"], AWAIT_RUN, run["id"], TURN + PATIENCE)
        return {**view, "node": run["name"]}

    async def _run_here(self, _to: str, name: str) -> dict[str, str]:
        """Begin a run for another node; returns how to wait for it."""
        if self._jobs.is_led_elsewhere(name):
            raise UnknownError(f"{name}: another node leads the job now", hint="try again")
        for id_ in [id_ for id_, task in self._runs.items() if task.done()][:-MOST_RUNS]:
            del self._runs[id_]
        id_ = secrets.token_hex(8)
        self._runs[id_] = asyncio.create_task(self._jobs.run(name), name=f"job {name}")
        [name] = [node.name for node in await self._nodes.all() if node.is_self] or [""]
        return {"node": self._nodes.incarnation, "name": name, "id": id_}

    async def _await_here(self, _to: str, id_: str) -> Any:
        """Wait for a run that this node began for another one; None: it has not ended yet."""
        if (task := self._runs.get(id_)) is None:
            raise UnknownError("the node that ran the job has restarted", hint="run it again")
        done, _ = await asyncio.wait((task,), timeout=TURN)
        if not done:
            return None
        del self._runs[id_]
        if task.cancelled():
            raise RelayError("the node that ran the job stopped", hint="run it again")
        return self._view(task.result())

    async def _led(self, _to: str, _argument: None) -> list[JobView]:
        """Return the jobs that this node leads, for another node."""
        led = [name for name in self._jobs.of_cluster if not self._jobs.is_led_elsewhere(name)]
        return [self._view(past) for past in self._jobs.all() if past.name in led]

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
