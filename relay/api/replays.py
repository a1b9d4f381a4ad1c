"""Replays: start, list, show and cancel them. Each runs on the node of a cluster that started it."""

from typing import Annotated

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import Page, endpoint
from relay.api.query_params import Filter, read_field
from relay.api.responses import CountView, respond, selection_of
from relay.api.views import Time, about
from relay.base.clock import rfc3339
from relay.base.ids import REPLAY, dashed, new_id
from relay.base.units import parse_rate, render_rate
from relay.config.problems import ambiguous
from relay.errors import StorageUnavailableError, UnknownError
from relay.jobs.replay import DEFAULT_RATE, STOP_WITHIN, Replay, ReplayRequest, Replays, State

LIST, SHOW, CANCEL = "list replays", "show the replay", "cancel the replay"
"""Requests of other nodes."""

PATIENCE = 2.0  # seconds within which the other nodes must answer
PATIENCE_TO_CANCEL = STOP_WITHIN + PATIENCE


class ReplayBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The events to replay (ids or a filter), and their destination."""

    events: tuple[str, ...] | None = None
    filter: Filter | None = None
    to: str | None = None
    rate: Annotated[str, msgspec.Meta(description='Maximum rate of events, such as "20/s".')] = render_rate(
        DEFAULT_RATE
    )
    dry_run: bool = False  # only count


class ReplayView(msgspec.Struct):
    """A replay and its progress."""

    id: str
    state: State
    count: int
    done: int
    created: int
    skipped: int
    to: str | None
    rate: str
    per_second: float
    eta_seconds: float | None
    reached: Time | None
    began_at: Time
    ended_at: Time | None
    error: str | None
    node: Annotated[str | None, about("The other node that runs it; null: the node that answers.")] = None


class ReplaysApi:
    """Endpoints under `/api/replays`."""

    def __init__(self, context: Context) -> None:
        self._store = context.store
        self._clock = context.clock
        self._replays = context.replays
        self._check_names = context.check_names
        self._nodes = nodes = context.store.nodes
        for verb, handle in ((LIST, self._list_here), (SHOW, self._show_here), (CANCEL, self._cancel_here)):
            nodes.handle(verb, handle)

    @endpoint(
        "POST", "/api/replays", "startReplay", "Start a replay, or count its events.",
        body=ReplayBody, returns=CountView, also={201: ReplayView},
    )  # fmt: skip
    async def _start(self, _request: web.Request, body: ReplayBody) -> web.Response:
        rate = read_field("rate", parse_rate, body.rate)
        selection = selection_of("events", body.events, body.filter, self._clock)
        if selection is not None:
            await self._check_names(selection)
        what = await self._store.queries.name_events(body.events or ()) if selection is None else selection
        return await begin(
            self._replays, ReplayRequest(what=what, to=body.to, rate=rate), dry_run=body.dry_run
        )

    @endpoint(
        "GET", "/api/replays", "listReplays", "List the replays since the daemon started.",
        returns=Page[ReplayView],
    )  # fmt: skip
    async def _list(self, _request: web.Request) -> Page[ReplayView]:
        return Page(tuple(await self._all()), None)

    async def _all(self) -> list[ReplayView]:
        """Return the replays of all nodes that answer, newest first."""
        found = await self._list_here()
        others = await self._nodes.ask_others(LIST, None, PATIENCE)
        for node, views in others.read(list[ReplayView])[0]:
            found += [msgspec.structs.replace(view, node=node) for view in views]
        return sorted(found, key=lambda view: view.began_at, reverse=True)

    async def _whole_id(self, id_: str) -> str:
        """Return the id of a replay; a prefix must be unique on all nodes.

        Raises:
            RelayError: the id is ambiguous.
        """
        digits = id_.lower().removeprefix(REPLAY)
        if self._nodes.alone or not digits or len(REPLAY + digits) == len(new_id(REPLAY, 0)):
            return id_
        found = [each.id for each in await self._all() if each.id.startswith(REPLAY + dashed(digits))]
        if len(found) > 1:
            raise ambiguous("replay", id_, found)
        return found[0] if found else id_

    @endpoint("GET", "/api/replays/{id}", "showReplay", "Show a replay and its progress.", returns=ReplayView)
    async def _show(self, request: web.Request) -> ReplayView:
        id_ = await self._whole_id(request.match_info["id"])
        return await self._show_here("", id_) or await self._elsewhere(id_, SHOW, PATIENCE)

    @endpoint("DELETE", "/api/replays/{id}", "cancelReplay", "Cancel a replay.", returns=ReplayView)
    async def _cancel(self, request: web.Request) -> ReplayView:
        id_ = await self._whole_id(request.match_info["id"])
        return await self._cancel_here("", id_) or await self._elsewhere(id_, CANCEL, PATIENCE_TO_CANCEL)

    async def _elsewhere(self, id_: str, verb: str, patience: float) -> ReplayView:
        """Let the other nodes show or cancel a replay that this node does not know.

        Raises:
            UnknownError: no node knows it.
            StorageUnavailableError: no node knows it, but some do not answer.
        """
        answers = await self._nodes.ask_others(verb, id_, patience)
        known = tuple((node, view) for node, view in answers.given if view is not None)
        found, unable = msgspec.structs.replace(answers, given=known).read(ReplayView)
        for node, view in found:
            return msgspec.structs.replace(view, node=node)
        for names, why in ((answers.silent, "did not answer"), (unable, "cannot tell: another version")):
            if names:
                raise StorageUnavailableError(
                    f"cannot {verb} {id_}: it is not on this node, and {', '.join(names)} {why}",
                    hint="relay nodes",
                )
        return replay_view(self._replays.get(id_))  # raises

    async def _list_here(self, _to: str = "", _argument: None = None) -> list[ReplayView]:
        return [replay_view(replay) for replay in self._replays.all()]

    async def _show_here(self, _to: str, id_: str) -> ReplayView | None:
        try:
            return replay_view(self._replays.get(id_))
        except UnknownError:
            return None

    async def _cancel_here(self, _to: str, id_: str) -> ReplayView | None:
        try:
            return replay_view(await self._replays.cancel(id_))
        except UnknownError:
            return None


async def begin(replays: Replays, request: ReplayRequest, *, dry_run: bool) -> web.Response:
    """Start a replay, or count its events."""
    if dry_run:
        return respond(CountView(await replays.count(request)))
    return respond(replay_view(await replays.start(request)), 201)


def replay_view(replay: Replay) -> ReplayView:
    """Return a replay as JSON."""
    return ReplayView(
        id=replay.id,
        state=replay.state,
        count=replay.total,
        done=replay.done,
        created=replay.created,
        skipped=replay.skipped,
        to=replay.request.to,
        rate=render_rate(replay.request.rate),
        per_second=round(replay.per_second, 1),
        eta_seconds=None if replay.eta is None else round(replay.eta, 1),
        reached=None if replay.reached is None else rfc3339(replay.reached),
        began_at=rfc3339(replay.began_at),
        ended_at=None if replay.ended_at is None else rfc3339(replay.ended_at),
        error=replay.error,
    )
