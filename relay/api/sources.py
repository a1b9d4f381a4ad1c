"""Sources: list, show, pause and resume them."""

import logging
from typing import Annotated, Any

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import Page, endpoint
from relay.api.views import EventView, unknown, view_of
from relay.config.effective import effective_source
from relay.ingest.routes import Mount
from relay.process.logs import fields

log = logging.getLogger("relay.ingest")


class SourceView(msgspec.Struct):
    """A source."""

    name: str
    plugin: str
    prefix: str
    paused: bool


class SourceShown(SourceView):
    """A source with its settings and its latest event."""

    settings: Annotated[
        dict[str, Any],
        msgspec.Meta(description="As in config.toml, with defaults; secrets are `<secret>`."),
    ]
    latest: EventView | None


class SourceSteered(msgspec.Struct):
    """Whether a source is paused."""

    name: str
    paused: bool


class SourcesApi:
    """Endpoints under `/api/sources`."""

    def __init__(self, context: Context) -> None:
        self._store = context.store
        self._ingest = context.ingest

    @endpoint("GET", "/api/sources", "listSources", "List sources.", returns=Page[SourceView])
    async def _list(self, _request: web.Request) -> Page[SourceView]:
        return Page(tuple(SourceView(**_fields(mount)) for mount in self._ingest.mounts.values()), None)

    @endpoint(
        "GET", "/api/sources/{name}", "showSource", "Show a source with its settings and its latest event.",
        returns=SourceShown,
    )  # fmt: skip
    async def _show(self, request: web.Request) -> dict[str, Any]:
        mount = self._mount(request)
        latest = await self._store.queries.find("events", source=mount.name, limit=1)
        return {
            **_fields(mount),
            "settings": effective_source(mount.config),
            "latest": view_of(latest[0]) if latest else None,
        }

    @endpoint(
        "POST", "/api/sources/{name}/{verb:pause|resume}", "steerSource", "Pause or resume a source.",
        returns=SourceSteered,
    )  # fmt: skip
    async def _steer(self, request: web.Request) -> SourceSteered:
        name = self._mount(request).name
        paused = request.match_info["verb"] == "pause"
        await self._store.events.pause_source(name, paused=paused)
        if (mount := self._ingest.mounts.get(name)) is not None:  # a reload may have removed it
            mount.paused = paused
        log.info("%s: %s by an operator", name, "paused" if paused else "resumed", extra=fields(source=name))
        return SourceSteered(name, paused)

    def _mount(self, request: web.Request) -> Mount:
        name = request.match_info["name"]
        if name not in self._ingest.mounts:
            raise unknown("source", name, self._ingest.mounts)
        return self._ingest.mounts[name]


def _fields(mount: Mount) -> dict[str, Any]:
    return {
        "name": mount.name,
        "plugin": mount.config.plugin,
        "prefix": mount.config.prefix,
        "paused": mount.paused,
    }
