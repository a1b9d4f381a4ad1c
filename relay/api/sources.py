"""Sources: list, show, pause and resume them."""

import logging
from typing import Annotated, Any

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import Page, endpoint
from relay.api.views import EventView, Time, about, unknown, view_of
from relay.base.clock import rfc3339
from relay.config.effective import effective_source
from relay.ingest.routes import Mount
from relay.ingest.token_use import TokenUse, Use, merged
from relay.process.logs import fields

log = logging.getLogger("relay.ingest")

SHOW_TOKENS = "show the use of tokens"
"""The request to another node."""

PATIENCE = 2.0  # seconds to wait for the other nodes


class SourceView(msgspec.Struct):
    """A source."""

    name: str
    plugin: str
    prefix: str
    paused: bool
    last_event: Annotated[Time | None, about("Receipt of the latest event; null if the store has none.")]
    silent: Annotated[bool, about("Whether no event has arrived for three times as long as usual.")]


class TokenView(msgspec.Struct):
    """The use of one token or secret."""

    name: Annotated[
        str, about("From config.toml, else the name of its variable, file or credential, else `key`.")
    ]
    key: Annotated[str, about("Its place in the settings, such as `tokens[0]`.")]
    uses: Annotated[int, about("Requests that it authenticated since `since`, at all nodes.")]
    last_used: Annotated[Time | None, about("Time of the last of these requests, within 15 seconds.")]
    since: Annotated[
        Time,
        about("When the daemon started, or a reload added the name; in a cluster, the latest time."),
    ]


class SourceShown(SourceView):
    """A source with its settings, the use of its tokens, and its latest event."""

    settings: Annotated[
        dict[str, Any],
        msgspec.Meta(description="As in config.toml, with defaults; secrets are `<secret>`."),
    ]
    tokens: tuple[TokenView, ...]
    missing: Annotated[
        tuple[str, ...], about("Nodes that did not answer; `tokens` does not include their uses.")
    ]
    latest: EventView | None


class SourceSteered(msgspec.Struct):
    """Whether a source is paused."""

    name: str
    paused: bool


def _view_of(token: TokenUse, use: Use) -> TokenView:
    return TokenView(
        name=token.name,
        key=token.key,
        uses=use.count,
        last_used=None if use.last is None else rfc3339(use.last),
        since=rfc3339(use.since),
    )


class SourcesApi:
    """Endpoints under `/api/sources`."""

    def __init__(self, context: Context) -> None:
        self._store = context.store
        self._ingest = context.ingest
        self._activity = context.activity
        self._store.nodes.handle(SHOW_TOKENS, self._tokens_here)

    @endpoint("GET", "/api/sources", "listSources", "List sources.", returns=Page[SourceView])
    async def _list(self, _request: web.Request) -> Page[SourceView]:
        return Page(tuple(SourceView(**self._fields(mount)) for mount in self._ingest.mounts.values()), None)

    @endpoint(
        "GET", "/api/sources/{name}", "showSource",
        "Show a source with its settings, its tokens and its latest event.", returns=SourceShown,
    )  # fmt: skip
    async def _show(self, request: web.Request) -> dict[str, Any]:
        mount = self._mount(request)
        latest = await self._store.queries.find("events", source=mount.name, limit=1)
        others = await self._store.nodes.ask_others(SHOW_TOKENS, mount.name, PATIENCE)
        parts, unable = others.read(dict[str, Use])
        tokens = self._ingest.token_uses.of(mount.name)
        return {
            **self._fields(mount),
            "settings": effective_source(mount.config),
            "tokens": [
                _view_of(
                    token, merged([token.use, *(uses[token.name] for _, uses in parts if token.name in uses)])
                )
                for token in tokens
            ],
            "missing": others.silent + unable if tokens else (),
            "latest": view_of(latest[0]) if latest else None,
        }

    async def _tokens_here(self, _to: str, source: str) -> dict[str, Use]:
        """Return the use of a source's tokens at this node, by name; for another node."""
        return {token.name: token.use for token in self._ingest.token_uses.of(source)}

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

    def _fields(self, mount: Mount) -> dict[str, Any]:
        latest = self._activity.last_event(mount.name)
        return {
            "name": mount.name,
            "plugin": mount.config.plugin,
            "prefix": mount.config.prefix,
            "paused": mount.paused,
            "last_event": None if latest is None else rfc3339(latest),
            "silent": self._activity.is_silent(mount.name),
        }
