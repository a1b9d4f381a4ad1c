"""The effective configuration as the text of a config.toml, with defaults; secrets appear as `<secret>`."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import msgspec

from relay.base.units import Rate, render_duration, render_rate
from relay.config.problems import dotted
from relay.config.schema import AdminToken, Config, DestinationConfig, SourceConfig
from relay.config.secrets import Secret, Secrets, Url
from relay.config.signatures import SignatureConfig

_NAMED = ("sources", "destinations")
_OURS: dict[type, set[str]] = {  # fields that have no key in config.toml
    Config: {"path", "included", "origins", "warnings"},
    SourceConfig: {"name", "settings", "compiled"},
    DestinationConfig: {"name"},
}
_JSON = json.JSONEncoder(ensure_ascii=False)
_TYPES = 256  # of tables, whose keys are remembered
_SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def effective(config: Config) -> dict[str, Any]:
    """Return the tables of config.toml as JSON values; keys without a value are left out."""
    tables: dict[str, Any] = {}
    for _ in fill(tables, config):
        pass
    return tables


def fill(tables: dict[str, Any], config: Config) -> Iterator[None]:
    """Add the tables of `effective`; each step adds one source, one destination or one other table."""
    for key, name, unit in _keys(Config):
        value = getattr(config, name)
        if key in _NAMED:
            inner = tables[key] = {}
            for each, record in value.items():
                inner[each] = effective_table(record)
                yield
        elif (shown := _value(value, unit)) is not None:
            tables[key] = shown
            yield


_AGREED = ("shards",)
"""Keys of a destination that may differ between nodes, because the nodes agree on one value."""


class Digests(msgspec.Struct, frozen=True):
    """Digests of the settings that the nodes of a cluster should share, in hexadecimal.

    They leave out secrets other than URLs, and settings with their default value, because a newer version
    has more settings.
    """

    whole: str = ""
    jobs: str = ""  # of the settings that jobs of a cluster use: retention, sources, rules of workers
    destinations: dict[str, str] = {}  # by name


def digests(config: Config) -> Digests:
    """Return the digests of a configuration."""
    sources = {name: (_set(source), _set(source.settings)) for name, source in config.sources.items()}
    jobs = _digest([_set(config.retention), _set(config.workers), sources])
    settings = {name: _set(each) for name, each in sorted(config.destinations.items())}
    destinations = {
        name: _digest({key: value for key, value in table.items() if key not in _AGREED})[:16]
        for name, table in settings.items()
    }
    return Digests(_digest([jobs, settings]), jobs[:16], destinations)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _set(record: msgspec.Struct) -> dict[str, Any]:
    """Return the keys of a table that differ from their defaults."""
    values: dict[str, Any] = {}
    for key, name, unit in _keys(type(record)):
        value = getattr(record, name)
        if value == _defaults(type(record)).get(name, msgspec.NODEFAULT):
            continue
        if isinstance(value, Url):
            values[key] = value.reveal()
        elif isinstance(value, msgspec.Struct) and not isinstance(value, SignatureConfig):
            values[key] = _set(value)
        else:
            values[key] = _value(value, unit)
    return values


@lru_cache(_TYPES)
def _defaults(type_: type[msgspec.Struct]) -> dict[str, Any]:
    found = {}
    for field in msgspec.structs.fields(type_):
        if field.default is not msgspec.NODEFAULT:
            found[field.name] = field.default
        elif field.default_factory is not msgspec.NODEFAULT:
            found[field.name] = field.default_factory()
    return found


def effective_source(source: SourceConfig) -> dict[str, Any]:
    """Return one source's table as JSON values, including its plugin's own keys."""
    return _table(source) | _table(source.settings)


def effective_table(record: Any) -> Any:
    """Return one table of a configuration as JSON values; any other value as it is shown."""
    if isinstance(record, SourceConfig):
        return effective_source(record)
    return _table(record) if isinstance(record, msgspec.Struct) else _value(record, None)


def as_toml(tables: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a config.toml with the same settings."""
    for line, _ in _keyed(tables):
        yield line


def with_origins(tables: Mapping[str, Any], origins: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the lines of a config.toml with the same settings, each with its origin or "default".

    `origins` are those of `Config`. A line without a key has the origin "".
    """
    for line, key in _keyed(tables):
        yield line, origins.get(key, "default") if key else ""


def _keyed(tables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines of a config.toml, each with its dotted key; "" for a line without a key."""
    yield from _lines({name: value for name, value in tables.items() if not isinstance(value, dict)})
    for name, table in tables.items():
        if name in _NAMED:
            for each, inner in table.items():
                yield from _with_header(dotted((name, each)), inner)
        elif isinstance(table, dict):
            yield from _with_header(name, table)


def _with_header(name: str, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "", ""
    yield f"[{name}]", ""
    for line, key in _lines(table):
        yield line, f"{name}.{key}"


def _table(record: msgspec.Struct) -> dict[str, Any]:
    values = {key: _value(getattr(record, name), unit) for key, name, unit in _keys(type(record))}
    return {name: value for name, value in values.items() if value is not None}


@lru_cache(_TYPES)
def _keys(type_: type[msgspec.Struct]) -> tuple[tuple[str, str, str | None], ...]:
    """Return the key, name and unit of each field that is listed.

    They are remembered, because finding them takes most of the time, and the daemon must not wait for it.
    """
    ours = _OURS.get(type_, ())
    return tuple(
        (field.encode_name, field.name, _unit(field.type))
        for field in msgspec.structs.fields(type_)
        if field.name not in ours and _is_shown(field.type)
    )


def _is_shown(type_: Any) -> bool:
    """Return whether a key is listed: samples of requests are not, because they fill a screen."""
    notes = getattr(type_, "__metadata__", ())
    return not any((each.extra or {}).get("unlisted") for each in notes if isinstance(each, msgspec.Meta))


def _value(value: Any, unit: str | None) -> Any:
    is_plain = value is None or type(value) in (str, bool) or (unit is None and type(value) in (int, float))
    return value if is_plain else _converted(value, unit)  # most are plain


def _converted(value: Any, unit: str | None) -> Any:
    shown: Any
    if isinstance(value, Secret | Path):
        shown = str(value)
    elif isinstance(value, Secrets):
        shown = ["<secret>"] * len(value)
    elif isinstance(value, Rate):
        shown = render_rate(value)
    elif isinstance(value, SignatureConfig | AdminToken):
        shown = _value(value.written(), unit)
    elif isinstance(value, msgspec.Struct):
        shown = _table(value)
    elif isinstance(value, dict):
        shown = {key: _value(item, unit) for key, item in value.items()}
    elif isinstance(value, tuple | list):
        shown = [_value(item, unit) for item in value]
    elif unit == "duration":
        shown = render_duration(value)
    elif unit == "size":
        shown = next(f"{value // factor} {name}" for factor, name in _SIZES if value % factor == 0)
    else:
        shown = value
    return shown


def _unit(type_: Any) -> str | None:
    """Return the unit in which config.toml has a field of this type; the unit may be nested in the type."""
    for part in (*get_args(type_), *getattr(type_, "__metadata__", ())):
        if isinstance(part, msgspec.Meta) and part.extra and "unit" in part.extra:
            return str(part.extra["unit"])
        if not isinstance(part, msgspec.Meta) and (found := _unit(part)):
            return found
    return None


def _lines(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a line for each key of a table, with the key as written in TOML."""
    for name, value in table.items():
        key = dotted((name,))
        yield f"{key} = {_written(value)}", key


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(line for line, _ in _lines(value))} }}" if value else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    return _JSON.encode(value)
