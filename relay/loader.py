"""What config.toml and the plugins are together: sources with their settings bound. Asks pluggy, once."""

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pluggy

from relay import hookspecs
from relay.config import checks
from relay.config.bind import Binder
from relay.config.document import read
from relay.config.model import Config, SourceConfig
from relay.config.problem import ConfigError, KeyPath, Problem, guess, shown
from relay.config.tables import bind_tables, named_tables
from relay.doors import Door, Plugin, at_the_doors, in_one_line
from relay.errors import Refusal
from relay.source import Source

_COMMON = frozenset(SourceConfig.__struct_fields__)
_PLACEHOLDER = re.compile(r"\{[^}]*\}")


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of source that `plugin = …` may name."""

    name: str
    source: type[Source]
    file: str  # where it came from
    door: Door
    version: str


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the daemon needs to know before it starts."""

    config: Config
    kinds: Mapping[str, Kind]


class _PluginError(Exception):
    """What is wrong with a plugin, as one sentence about its file."""


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Setup:
    """Read config.toml, import the plugins and bind every source's settings.

    Raises:
        ConfigError: with every problem of the file and of the plugins at once.
    """
    binder = Binder(read(path), environ)
    config = bind_tables(binder)
    kinds, broken = discover(config.plugins.dirs)
    binder.problems += broken
    sources = {}
    for name, table in named_tables(binder, "sources").items():
        if name == checks.RESERVED:
            binder.report(("sources", name), "this name is reserved for the relay's own events")
        source = _bind_source(binder, config, kinds, name, table, blame_kinds=not broken)
        if source is not None:
            sources[name] = source
    _check_claims(binder, sources)
    if binder.problems:
        raise ConfigError(binder.problems)
    warnings = tuple(str(warning) for warning in sorted(binder.warnings))
    return Setup(config=msgspec.structs.replace(config, sources=sources, warnings=warnings), kinds=kinds)


def discover(dirs: Sequence[Path]) -> tuple[dict[str, Kind], list[Problem]]:
    """Return the kinds on offer by name, and what is wrong with plugins; earlier doors hide later ones."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    kinds: dict[str, Kind] = {}
    problems: list[Problem] = []
    for plugin in at_the_doors(dirs):
        if isinstance(plugin, Problem):
            problems.append(plugin)
            continue
        try:
            for kind in _kinds_of(manager, plugin):
                rival = kinds.setdefault(kind.name, kind)
                if rival is not kind and rival.door == kind.door:
                    text = f'offers the kind "{kind.name}", as {rival.file} does; keep one of them'
                    problems.append(Problem(plugin.file, 0, "", text))
        except _PluginError as error:
            problems.append(Problem(plugin.file, 0, "", str(error)))
    return kinds, problems


def _kinds_of(manager: pluggy.PluginManager, plugin: Plugin) -> Iterator[Kind]:
    _check_hooks(manager, plugin.module)
    if manager.is_registered(plugin.module):
        raise _PluginError("comes in twice; keep one of its entry points")
    try:
        manager.register(plugin.module)
    except pluggy.PluginValidationError as error:
        raise _PluginError(f"is no valid plugin: {str(error).splitlines()[-1]}") from None
    for hook in manager.hook.relay_sources.get_hookimpls():
        if hook.plugin is plugin.module:
            for source in _call(hook.function):
                _check_source(source)
                yield Kind(
                    name=source.kind,
                    source=source,
                    file=plugin.file,
                    door=plugin.door,
                    version=plugin.version,
                )


def _check_hooks(manager: pluggy.PluginManager, module: Any) -> None:
    """Find misspelt hooks: pluggy passes over a function without a mark, whatever its name."""
    known = [name for name in vars(hookspecs) if name.startswith("relay_")]
    found = False
    for name in dir(module):
        options = manager.parse_hookimpl_opts(module, name)
        hook = (options.get("specname") or name) if options else name
        value = inspect.getattr_static(module, name)
        own = inspect.isfunction(value) and value.__module__ == getattr(module, "__name__", "")
        if not options and not (own and name.startswith("relay_")):
            continue
        if hook not in known:
            raise _PluginError(f'has a hook "{hook}" that does not exist{guess(hook, known)}')
        if not options:
            raise _PluginError(f"defines {name}() without @hookimpl; put the mark above it")
        found = True
    if not found:
        raise _PluginError("offers nothing; define relay_sources() with @hookimpl")


def _call(function: Any) -> list[Any]:
    try:
        offered = function()
    except Exception as error:  # noqa: BLE001 - a plugin may raise anything, the start tells it in a sentence
        raise _PluginError(f"relay_sources() raised {in_one_line(error)}") from None
    if not isinstance(offered, list | tuple):
        raise _PluginError(f"relay_sources() returned {offered!r:.60}; expected a list of Source classes")
    return list(offered)


def _check_source(source: Any) -> None:
    if not (isinstance(source, type) and issubclass(source, Source)):
        raise _PluginError(f"relay_sources() returned a list with {source!r:.60}, which is no Source class")
    try:
        checks.name(source.kind)
        fields = {field.name for field in msgspec.structs.fields(source)}
    except ValueError as error:
        raise _PluginError(f"{source.__name__} has the kind {source.kind!r}: {error}") from None
    except NameError as error:
        raise _PluginError(f"{source.__name__} has a field of an unknown type: {error}") from None
    if taken := sorted(fields & _COMMON):
        raise _PluginError(f"{source.__name__} has a field `{taken[0]}`: that key belongs to every source")


def _bind_source(
    binder: Binder,
    config: Config,
    kinds: Mapping[str, Kind],
    name: str,
    table: Mapping[str, Any],
    *,
    blame_kinds: bool,
) -> SourceConfig | None:
    path: KeyPath = ("sources", name)
    plugin = table.get("plugin")
    kind = kinds.get(plugin) if isinstance(plugin, str) else None
    own = kind.source.__struct_fields__ if kind else tuple(table)
    source = binder.struct(
        SourceConfig,
        table,
        path,
        given={"name": name, "max_body": config.server.max_body, "workers": config.workers},
        hidden={"name", "settings"},
        others=own,
    )
    if kind is None:
        if blame_kinds and isinstance(plugin, str):  # else a broken plugin may be the one that is meant
            known = guess(plugin, kinds) or f"; there are: {', '.join(sorted(kinds))}"
            binder.report((*path, "plugin"), f"no plugin offers the kind {shown(plugin)}{known}")
        return None
    settings = _bind_settings(binder, kind, {key: table[key] for key in own if key in table}, path)
    if source is None or settings is None:
        return None
    return msgspec.structs.replace(source, settings=settings)


def _bind_settings(binder: Binder, kind: Kind, table: Mapping[str, Any], path: KeyPath) -> Source | None:
    """Make the plugin's own record; what its code raises is a problem of the table, never a traceback."""
    try:
        settings = binder.struct(kind.source, table, path)
        for warning in settings.warnings() if settings is not None else ():
            binder.warn(path, warning)
    except Refusal as refusal:
        binder.report(path, refusal.detail)
    except ValueError as error:
        binder.report(path, str(error))
    except Exception as error:  # noqa: BLE001 - see above
        binder.report(path, f'the plugin "{kind.name}" ({kind.file}) failed: {in_one_line(error)}')
    else:
        return settings
    return None


def _check_claims(binder: Binder, sources: Mapping[str, SourceConfig]) -> None:
    """Report two sources that want the same requests, or the errors below the same prefix."""
    claimed = {"GET /health": "the relay itself"}
    for name, source in sources.items():
        settings = source.settings
        claims = [f"everything below {source.prefix}{prefix}" for prefix in settings.owns]
        for method, route, _ in settings.routes():
            claims.append(f"{method} {source.prefix}{_PLACEHOLDER.sub('{}', route)}")
        for claim in claims:
            rival = claimed.setdefault(claim, f'source "{name}"')
            if rival != f'source "{name}"':
                binder.report(("sources", name), f"claims {claim}, as {rival} does; give it a `prefix`")
                break
