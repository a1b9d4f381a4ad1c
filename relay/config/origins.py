"""The origin of each setting: the file and line that set it, and the variable or file of its secret."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relay.config.document import Document
from relay.config.problems import KeyPath, dotted

_NAMED = ("sources", "destinations")
_PLACES = {"env": "environment variable", "file": "file", "credential": "credential"}


def origins_of(document: Document, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the file and line of each key that is set, such as "conf.d/crm.toml:4".

    The text for a secret also names its variable, file or credential:
    "config.toml:7, environment variable CRM_SECRET".
    """
    folder = Path(document.file).parent
    found = {}
    for path, line in document.lines.items():
        if len(path) != (3 if path[:1] and path[0] in _NAMED else 2) and not _is_loose(path, document.data):
            continue
        file = Path(document.files.get(path, document.file))
        shown = file.relative_to(folder) if file.is_relative_to(folder) else file
        value = _value(path, document.data)
        if path[-1] == "headers" and isinstance(value, dict):  # the keys are names of headers, such as "file"
            value = list(value.values())
        places = dict.fromkeys(_places(value))
        found[dotted(path)] = ", ".join((f"{shown}:{line}", *places))
    if "state_dir" not in found and environ.get("STATE_DIRECTORY"):
        found["state_dir"] = "environment variable STATE_DIRECTORY"
    return found


def _is_loose(path: KeyPath, data: Mapping[str, Any]) -> bool:
    """Return whether a key is outside of all tables."""
    return len(path) == 1 and not isinstance(data.get(str(path[0])), dict)


def _value(path: KeyPath, data: Any) -> Any:
    for key in path:
        data = data[key]
    return data


def _places(value: Any) -> Iterator[str]:
    """Yield the places of the secrets in a value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if len(value) == 1 and name in _PLACES and isinstance(inner, str):
                yield f"{_PLACES[name]} {inner}"
            else:
                yield from _places(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _places(inner)
