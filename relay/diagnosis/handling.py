"""Asking a source what it makes of a request, as the front door would."""

from typing import Any

import msgspec

from relay.config.schema import SourceConfig
from relay.errors import MethodNotAllowed, PluginFailed, Refusal
from relay.incoming import Incoming
from relay.ingest.routes import Match, Routes, mounts_of
from relay.source import Accepted, Reply


def match_of(source: SourceConfig, path: str, method: str) -> Match:
    """Find the route of a path as on the wire, the source's prefix included.

    Raises:
        NotFound: the source has no such path.
        Malformed: the path is not percent-encoded UTF-8.
    """
    return Routes(mounts_of({source.name: source})).find(path, method)


def handle(match: Match, incoming: Incoming) -> Accepted | Reply:
    """Have the handler of a route read a request, whose path is below the source's prefix.

    Raises:
        Refusal: the source's own; MethodNotAllowed; PluginFailed with what the plugin raised as its cause.
    """
    handler = match.handlers.get(incoming.method)
    if handler is None:
        raise MethodNotAllowed(allow=tuple(sorted(match.handlers)))
    asked = msgspec.structs.replace(incoming, params=match.params)
    try:
        answer: Any = handler(asked)
    except Refusal:
        raise
    except BaseException as error:
        raise PluginFailed from error
    if not isinstance(answer, Accepted | Reply):
        raise PluginFailed from TypeError(f"a handler returned {type(answer).__name__}")
    return answer
