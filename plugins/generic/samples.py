"""Samples: the default sample of a source, and new idempotency keys for each sample that is sent."""

import json
import re
from typing import Any

import msgspec

from relay.source import Incoming, parse_path, parse_template

EXAMPLE = "example"
"""The value of each placeholder of an event's type in the default sample."""


def example_of(type_: str, events: str) -> tuple[str, dict[str, str]]:
    """Return a JSON body and headers that have a value for each placeholder of an event's type.

    Args:
        type_: the source's template of the type.
        events: the source's template of the events of a batch; `""` without one.
    """
    values: dict[str, Any] = {"body": {}, "item": {}}
    headers = {"Content-Type": "application/json"}
    for each in parse_template(type_).placeholders:
        if each.kind in values and each.argument:
            _put(values[each.kind], each.argument, EXAMPLE)
        elif each.kind == "header":
            headers[each.argument] = EXAMPLE
    body, item = values["body"], values["item"]
    if events:
        path = parse_template(events).placeholders[0].argument
        if path:
            _put(body, path, [item])
        else:
            body = [item]
    return json.dumps(body), headers


def _put(value: dict[str, Any], path: str, new: object) -> None:
    """Set the value at a path, unless the path or a part of it already has one."""
    *outer, (last, _) = parse_path(path)
    for name, _ in outer:
        value = value.setdefault(name, {})
        if not isinstance(value, dict):
            return
    value.setdefault(last, new)


def renewed(incoming: Incoming, key: str, events: str) -> Incoming:
    """Return a sample whose idempotency keys are new, made from the time at which it is sent.

    Args:
        incoming: the sample; `received_at` is that time.
        key: the source's template of the key.
        events: its template of the events of a batch, `""` without one.
    """
    parts = [each for each in parse_template(key).placeholders if not each.filters]
    if not parts:
        return incoming
    last, now = parts[-1], incoming.received_at
    if last.kind == "header" and (old := incoming.header(last.argument)):
        return incoming.with_headers({last.argument: _changed(old, now)})
    if last.kind not in ("body", "item") or not last.argument:
        return incoming
    try:
        value = json.loads(incoming.body)
        items = (
            _at(value, parse_template(events).placeholders[0].argument) if last.kind == "item" else [value]
        )
        body = incoming.body.decode()
        for number, item in enumerate(items):
            body = _replaced(body, last.argument, _at(item, last.argument), now + number)
    except (ValueError, KeyError, IndexError, TypeError):  # not the shape that the template expects
        return incoming
    return msgspec.structs.replace(incoming, body=body.encode())


def _at(value: Any, path: str) -> Any:
    for name, position in parse_path(path) if path else ():
        value = value[position or 0] if isinstance(value, list) else value[name]
    return value


def _replaced(body: str, path: str, old: Any, number: int) -> str:
    """Replace a value in a JSON text at every key with the last name of its path."""
    name = json.dumps(parse_path(path)[-1][0])
    new = _changed(old, number) if isinstance(old, str) else number
    pattern = rf"({re.escape(name)}\s*:\s*){re.escape(json.dumps(old))}(?=\s*[,}}\]])"
    return re.sub(pattern, lambda found: found[1] + json.dumps(new), body)


def _changed(old: str, number: int) -> str:
    """Return a text of the same length that ends in a number, if it is long enough."""
    digits = str(number)
    return old[: max(len(old) - len(digits), 0)] + digits
