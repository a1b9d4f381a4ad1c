"""One page of the dashboard: the request for it, and the frame around its content."""

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from importlib import resources
from typing import Any, Protocol
from urllib.parse import quote, urlencode

import msgspec
from aiohttp import web

from relay import __version__
from relay.api.auth import includes
from relay.api.operators import OPERATOR, Operator
from relay.base.clock import Clock
from relay.base.turns import Turns
from relay.config.schema import Scope
from relay.ui.markup import Address, Content, Markup, address, join, tag

SECTIONS = (
    ("Now", ""),
    ("Events", "events"),
    ("Deliveries", "deliveries"),
    ("Destinations", "destinations"),
    ("Sources", "sources"),
    ("Refused", "refused"),
    ("Workers", "workers"),
    ("Jobs", "jobs"),
    ("Config", "config"),
    ("Doctor", "doctor"),
    ("Audit", "audit"),
)
"""Name and path of each page in the navigation."""


MOST_ADDRESSES = 1024
"""Addresses of links that are cached. Without a cache, quoting them takes a third of the time of a page."""


@lru_cache(MOST_ADDRESSES)
def _address(root: str, path: tuple[str, ...], query: tuple[tuple[str, str | None], ...]) -> Address:
    """Return the address of a page below `/ui/`, whose address is `root`."""
    given = {name: value for name, value in query if value is not None}
    place = root + "/".join(quote(each, safe="") for each in path)
    return address(f"{place}?{urlencode(given, errors='replace')}" if given else place)


class Ask(Protocol):
    """Returns the answer of an endpoint that changes nothing: `relay.api.app.Api.ask`."""

    async def __call__(
        self, name: str, path: Mapping[str, str] | None = None, query: Mapping[str, str] | None = None
    ) -> Any:
        """Return the answer of the endpoint with this operationId; raises `RelayError` as the API does."""
        ...


class StaticFile(msgspec.Struct, frozen=True):
    """A file of the dashboard. Its name has a digest, so browsers may keep it."""

    name: str
    content: bytes
    content_type: str


_UNSEEN: Mapping[str, re.Pattern[bytes]] = {
    "js": re.compile(rb"^ *//.*\n", re.MULTILINE),
    "css": re.compile(rb"^ *(/\*.*\*/\n)?", re.MULTILINE),
}
"""Comments, and the indentation of styles, by the extension of a file. The relay does not serve them."""


def _load(stem: str, ending: str, content_type: str) -> StaticFile:
    content = (resources.files("relay.ui") / "static" / f"{stem}.{ending}").read_bytes()
    if (unseen := _UNSEEN.get(ending)) is not None:
        content = unseen.sub(b"", content)  # saves an eighth of the script
    digest = hashlib.sha256(content).hexdigest()[:12]
    return StaticFile(f"{stem}.{digest}.{ending}", content, content_type)


STYLE = _load("app", "css", "text/css")
SCRIPT = _load("app", "js", "text/javascript")
ICON = _load("icon", "svg", "image/svg+xml")
ALERT = _load("alert", "svg", "image/svg+xml")
STATIC = {each.name: each for each in (STYLE, SCRIPT, ICON, ALERT)}


class Visit:
    """A request for a page."""

    def __init__(self, request: web.Request, ask: Ask, clock: Clock, node: str) -> None:
        """Take the `node` that makes the page: operators have pages of several daemons open."""
        self.ask = ask
        self.node = node
        self.path: Mapping[str, str] = request.match_info
        self.query: Mapping[str, str] = dict(request.query)
        self.now = clock.wall()
        self.turns = Turns()
        self.operator: Operator | None = request.get(OPERATOR)
        """The sender of the request; None: a page to log in is shown instead."""
        depth = request.raw_path.partition("?")[0].count("/") - 2
        self.root = "../" * depth or "./"
        """Relative address of `/ui/`. A proxy may serve it under any path."""

    def may(self, scope: Scope) -> bool:
        """Return whether the operator may use endpoints that need this scope."""
        return self.operator is not None and includes(self.operator.scope, scope)

    def link(self, *path: str, **query: str | None) -> Address:
        """Return the relative address of another page; each part of its path is quoted."""
        return _address(self.root, path, tuple(query.items()))

    def page(
        self,
        title: str,
        *content: Content,
        section: str | None = None,
        status: int = 200,
        problems: int = 0,
        heading: Content = None,
    ) -> web.Response:
        """Return a whole page.

        Args:
            title: of the browser's tab, and above the page.
            content: below the title.
            section: its path in the navigation; None: it is not there.
            status: of the response.
            problems: their number, which the browser's tab shows in its title and by a dot on its icon.
            heading: what stands above the page in place of the title.
        """
        body = tag(
            "body",
            _SKIP,
            self._header(section) if self.operator else None,
            tag("main", tag("h1", heading or title), *content, id="main", tabindex=-1),
            _STATUS,
            tag("footer", tag("span", f"hookferry {__version__}"), _TOOLS if self.operator else None),
            data_root=self.root,
            data_api=f"{self.root}../api/",
        )
        tab = f"({problems}) {title}" if problems else title
        if self.operator:
            tab += f" · {self.node}"
        files = _files(self.root, ALERT if problems else ICON)
        head = tag("head", _METAS, tag("title", f"{tab} · hookferry"), files)
        html = join(Markup("<!doctype html>"), tag("html", head, body, lang="en"))
        return web.Response(status=status, body=html.encode(), content_type="text/html", charset="utf-8")

    def _header(self, section: str | None) -> Markup:
        """Return the daemon's name, the search and the navigation, which is one scrolling line on a phone."""
        name = tag("a", tag("span", "hookferry · "), tag("b", self.node), href=self.link(), class_="brand")
        bar = tag("div", _navigation(self.root, section), self._whoami(), class_="bar")
        return tag("header", tag("div", name, _SEARCH, class_="top"), bar)

    def _whoami(self) -> Content:
        if self.operator is None:
            return None
        out = tag("button", "Log out", type="button", class_="scripted", data_logout=True)
        return tag(
            "p", self.operator.name, " ", tag("small", self.operator.scope), " ",
            out if self.operator.access == "login" else None, class_="operator",
        )  # fmt: skip


Screen = Callable[[Visit], Awaitable[web.Response]]
"""Makes a page."""


MOST_FRAMES = 64
"""Cached parts of the frame of pages, by the depth of their address and by their place in the navigation."""


@lru_cache(MOST_FRAMES)
def _navigation(root: str, section: str | None) -> Markup:
    items = [
        tag("li", tag("a", name, href=root + path, aria_current="page" if path == section else None))
        for name, path in SECTIONS
    ]
    return tag("nav", tag("ul", items), aria_label="Pages")


@lru_cache(MOST_FRAMES)
def _files(root: str, icon: StaticFile) -> Markup:
    return join(
        tag("link", rel="icon", href=f"{root}static/{icon.name}"),
        tag("link", rel="stylesheet", href=f"{root}static/{STYLE.name}"),
        tag("script", src=f"{root}static/{SCRIPT.name}", defer=True),
    )


_METAS = join(
    tag("meta", charset="utf-8"),
    tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
    tag("meta", name="color-scheme", content="light dark"),
)
_SKIP = tag("a", "Skip to content", class_="skip", href="#main")
_STATUS = tag("p", id="status", role="status", aria_live="polite")

_TOOLS = join(
    tag("button", "Keys", type="button", class_="scripted", data_keys=True, aria_keyshortcuts="?"),
    tag("button", "Show local times", type="button", class_="scripted", data_zone=True),
)
"""The button that lists the keys, and the one that switches between UTC and the browser's time zone."""

_FIND = tag(
    "input", type="search", name="find", placeholder="Id, subject or type",
    aria_label="Find an id, subject or type", aria_keyshortcuts="/", autocomplete="off",
)  # fmt: skip
_SEARCH = tag("form", _FIND, role="search", data_find=True)
"""The search field; the script opens the page that it finds."""
