"""Generic sources from the text of their table, and requests to them, without a daemon."""

import tempfile
from pathlib import Path

import msgspec
import pytest

from relay.config.problems import ConfigError
from relay.plugin_loading.loader import load
from relay.source import Incoming

BASIS = """development = true
[sources.shop]
plugin = "generic"
"""
"""Three lines, so that the first line of a test's text is line 4."""

USUAL = {"path": '"/hooks/shop/{store}"', "type": '"order"', "verify": '"none"'}
"""Keys that a test's text need not have."""


def table(text, **usual):
    """Return a config.toml with the keys of a text, and behind them those of `USUAL` that it lacks."""
    given = {line.partition("=")[0].strip() for line in text.splitlines()}
    more = [f"{key} = {value}" for key, value in {**USUAL, **usual}.items() if value and key not in given]
    return f"{BASIS}{text}\n" + ("" if "\n[" in f"\n{text}" else "\n".join(more)) + "\n"


def load_table(text, **environ):
    """Return the source of a table's text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.toml")
        path.write_text(table(text))
        return load(path, environ).config.sources["shop"].settings


def problems_of(text, **usual):
    """Return the problems of a table's text: `line: key: problem`, the key without `sources.shop.`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.toml")
        path.write_text(table(text, **usual))
        with pytest.raises(ConfigError) as error:
            load(path, {})
        return [
            f"{each.line}: {each.key.removeprefix('sources.shop').removeprefix('.')}: {each.problem}"
            for each in error.value.problems
        ]


def incoming(body=b"{}", headers=None, *, path="/hooks/shop/berlin", method="POST", **more):
    """Return a request to `/hooks/shop/{store}`; `more`: query, at (seconds), remote, params."""
    query, at, remote = more.get("query", ""), more.get("at", 0), more.get("remote")
    request = Incoming.of(method, path, headers, body, **more.get("params", {"store": "berlin"}))
    found = {} if remote is None else {"find_remote": lambda: remote}
    target = f"{path}?{query}" if query else path
    return msgspec.structs.replace(request, query=query, target=target, received_at=at * 1_000_000, **found)


def event_of(source, *args, **kwargs):
    """Return the event of a request."""
    return source.receive(incoming(*args, **kwargs)).event
