"""The JSON Schema of config.toml, with which editors complete keys and mark mistakes."""

import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from relay.base.units import Rate
from relay.config.schema import AdminToken, Config, DestinationConfig, SourceConfig
from relay.config.secrets import Secret, Secrets, Url
from relay.config.signatures import SignatureConfig

# Draft 7 is the latest that the usual editors know.
DRAFT = "http://json-schema.org/draft-07/schema#"
SCHEMA = Path(__file__).with_name("config.schema.json")
"""The schema for the bundled kinds of source; `make docs` writes it."""

_LINK = re.compile(r"\[([^]]+)\]\([^)]*\)")
_NAME = "^[a-z0-9][a-z0-9_-]{0,63}$"
_UNITS = {
    "duration": {"type": "string", "examples": ["90s", "5m", "14d"]},
    "size": {"type": "string", "examples": ["64 KiB", "2 MiB"]},
}
_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "pattern": "pattern",
}
_SIMPLE: Mapping[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    Path: {"type": "string"},
    Rate: {"type": "string", "examples": ["50/s", "1000/m"]},
    Secret: {"$ref": "#/definitions/secret"},
    Url: {"anyOf": [{"type": "string"}, {"$ref": "#/definitions/secret"}]},
    Secrets: {"type": "array", "items": {"$ref": "#/definitions/token"}},
    Any: {},
}
_SECRET = {
    "description": "A reference to a secret; plain text is permitted with `development = true`.",
    "anyOf": [
        {"type": "string"},
        *(
            {
                "type": "object",
                "properties": {place: {"type": "string"}, "development": {"type": "string"}},
                "required": [place],
                "additionalProperties": False,
            }
            for place in ("env", "file", "credential")
        ),
    ],
}
_TOKEN = {
    "anyOf": [
        {"$ref": "#/definitions/secret"},
        {
            "type": "object",
            "properties": {
                "secret": {"$ref": "#/definitions/secret"},
                "name": {"type": "string"},
                "scopes": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["secret"],
            "additionalProperties": False,
        },
    ]
}
_SHORT: Mapping[Any, dict[str, Any]] = {
    SignatureConfig: {"type": "string"},
    AdminToken: {"$ref": "#/definitions/secret"},
}
"""Short forms of records that have one."""

_HIDDEN = {"path", "included", "origins", "warnings", "name", "settings", "compiled"}
"""Fields that are not keys of config.toml."""


Kinds = Mapping[str, tuple[type[msgspec.Struct], frozenset[str]]]
"""Per kind of source, for `plugin = …`: its class, and the required keys that its preset provides."""


def json_schema(kinds: Kinds) -> dict[str, Any]:
    """Return the schema of config.toml with these kinds of source."""
    tables = _table(Config, _HIDDEN | {"sources", "destinations"})
    del tables["required"]  # the relay knows where its state folder is
    properties = tables["properties"]
    properties["sources"] = _named(_sources(kinds), "senders, one table each")
    properties["destinations"] = _named(_table(DestinationConfig, _HIDDEN), "receivers, one table each")
    return {
        "$schema": DRAFT,
        "title": "hookferry's config.toml",
        **tables,
        "definitions": {"secret": _SECRET, "token": _TOKEN},
    }


def _named(table: dict[str, Any], description: str) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "propertyNames": {"pattern": _NAME},
        "additionalProperties": table,
    }


def _sources(kinds: Kinds) -> dict[str, Any]:
    """Return the schema of a source: the keys of every source, and the keys of its kind."""
    common = _table(SourceConfig, _HIDDEN)
    by_class: dict[type[msgspec.Struct], list[str]] = {}
    required: dict[tuple[str, ...], list[str]] = {}  # kinds by their required keys
    for name, (class_, provided) in sorted(kinds.items()):
        by_class.setdefault(class_, []).append(name)
        keys = [key for key in _table(class_, set()).get("required", ()) if key not in provided]
        required.setdefault(tuple(keys), []).append(name)
    rules = []
    for class_, names in by_class.items():
        properties = {**common["properties"], **_table(class_, set())["properties"]}
        rules.append(_rule(names, {"properties": properties, "additionalProperties": False}))
    rules += [_rule(names, {"required": list(keys)}) for keys, names in required.items() if keys]
    plugin = {**common["properties"]["plugin"], "examples": sorted(kinds)}
    return {"type": "object", "properties": {"plugin": plugin}, "required": ["plugin"], "allOf": rules}


def _rule(kinds: list[str], then: dict[str, Any]) -> dict[str, Any]:
    """Return the rule that applies the schema `then` to sources of these kinds."""
    return {"if": {"properties": {"plugin": {"enum": kinds}}, "required": ["plugin"]}, "then": then}


def _table(record: type[msgspec.Struct], hidden: set[str]) -> dict[str, Any]:
    """Return the schema of a record's table."""
    fields = [field for field in msgspec.structs.fields(record) if field.name not in hidden]
    required = [field.encode_name for field in fields if field.required]
    table: dict[str, Any] = {
        "type": "object",
        "properties": {field.encode_name: _of(field.type) for field in fields},
        "additionalProperties": False,
    }
    return {**table, "required": required} if required else table


def _of(kind: Any) -> dict[str, Any]:
    """Return the schema of a value, as `relay.config.binding` reads it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _annotated(args[0], args[1:])
    if origin in (Union, types.UnionType):
        arms = [_of(each) for each in args if each is not types.NoneType]
        return arms[0] if len(arms) == 1 else {"anyOf": arms}
    if origin is Literal:
        schema: dict[str, Any] = {"enum": list(args)}
    elif origin is tuple:
        schema = {"type": "array", "items": _of(args[0])}
    elif origin is dict:
        schema = {"type": "object", "additionalProperties": _of(args[1])}
    elif kind in _SIMPLE:
        schema = dict(_SIMPLE[kind])
    else:
        schema = _table(kind, set())
        if kind is SignatureConfig:  # the name of a scheme replaces further keys
            schema.pop("required", None)
        if kind in _SHORT:
            schema = {"anyOf": [_SHORT[kind], schema]}
    return schema


def _annotated(kind: Any, notes: tuple[Any, ...]) -> dict[str, Any]:
    found: dict[str, Any] | None = None
    more: dict[str, Any] = {}
    for meta in notes:
        extra = meta.extra or {}
        if "unit" in extra:
            found = dict(_UNITS[extra["unit"]])
        if meta.description:
            more["description"] = _LINK.sub(r"\1", meta.description)
        for name, keyword in _BOUNDS.items():
            if (bound := getattr(meta, name)) is not None:
                more[keyword] = bound
    schema = _of(kind) if found is None else found
    if schema.get("type") == "string" and found is not None:
        more = {key: value for key, value in more.items() if key == "description"}  # bounds are for numbers
    if schema.get("type") == "array":
        more = {{"minLength": "minItems", "maxLength": "maxItems"}.get(key, key): more[key] for key in more}
    if "$ref" in schema and more:  # draft 7 ignores keywords beside a reference
        return {"allOf": [schema], **more}
    return {**schema, **more}
