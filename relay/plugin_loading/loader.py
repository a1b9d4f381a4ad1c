"""Loads config.toml and the plugins, and binds the settings of the sources. Calls pluggy once.

A reload reads the file again with the plugins that are already loaded: plugin code runs once.
"""

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pluggy

from relay import hookspecs
from relay.config import validators
from relay.config.binding import WRONG, Binder
from relay.config.document import read
from relay.config.installed_service import Given
from relay.config.problems import ConfigError, KeyPath, Problem, check_again, faults_of, guess, shown
from relay.config.schema import Admin, Cluster, Config, SourceConfig, Storage
from relay.config.tables import bind_tables, named_tables
from relay.errors import Refusal, RestartNeededError
from relay.formats import Format
from relay.formats.destination import problems_of, warnings_of
from relay.ingest.implementation import implementation_of
from relay.model import Job
from relay.plugin_loading.discovery import digests_of, find_plugins, in_one_line
from relay.plugin_loading.offered import Kind, Observer, Offering, Offers, PluginError
from relay.schemas import Schemas
from relay.source import SPANNING, Preset, Source

_AT_START = {
    "server": ("listen", "implementation"),
    "admin": Admin.__struct_fields__,
    "storage": Storage.__struct_fields__,
    "cluster": Cluster.__struct_fields__,
    "plugins": ("dirs",),
}
"""Keys, by table, that only a restart applies; `state_dir` is another."""

_SEGMENT = re.compile(r"[^{}?#\s]*|\{[^{}]+\}")
"""A segment of a path."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration and the plugins: everything that the daemon needs to start."""

    config: Config
    kinds: Mapping[str, Kind]
    formats: Mapping[str, Format]  # by name, including the relay's own
    jobs: tuple[Job, ...]
    observers: tuple[Observer, ...]
    offers: tuple[Offering, ...]  # everything that plugins provide, for lists
    code: Mapping[str, bytes]  # digests of the plugin files at their import
    absent: tuple[Problem, ...] = ()  # secrets that a lenient `load` could not read


def load(path: Path, given: Mapping[str, str] | Given = os.environ, *, lenient: bool = False) -> Setup:
    """Read config.toml, import the plugins and bind every source's settings.

    With `lenient`, unreadable secrets and certificates are no problem (see `Binder`).

    Raises:
        ConfigError: contains all problems of the file and of the plugins.
    """
    binder = Binder(read(path), given, lenient=lenient)
    config = bind_tables(binder)
    offers, broken = discover(config.plugins.dirs)
    binder.problems += broken
    complete = _complete(binder, config, offers.kinds, offers.formats, blame=not broken)
    return Setup(
        config=complete,
        absent=tuple(binder.absent),
        kinds=offers.kinds,
        formats=offers.formats,
        jobs=tuple(offers.jobs.values()),
        observers=tuple(offers.observers.values()),
        offers=offers.listed(),
        code=digests_of(config.plugins.dirs, {offering.plugin.file for offering in offers.found}),
    )


def load_again(setup: Setup, given: Mapping[str, str] | Given = os.environ) -> Setup:
    """Read the config.toml of a running daemon again, with the loaded plugins.

    Raises:
        ConfigError: contains all problems of the file.
        RestartNeededError: plugins, or keys that only a restart applies, have changed.
    """
    binder = Binder(read(setup.config.path), given)
    config = bind_tables(binder)
    code = digests_of(config.plugins.dirs, setup.code)
    keys = _changed_keys(setup.config, config)
    files = tuple(file for file in code if code[file] != setup.code.get(file))
    if not files and "plugins.dirs" not in keys:
        config = _complete(binder, config, setup.kinds, setup.formats, blame=True)
    elif binder.problems:  # problems of sources depend on plugins that have changed
        raise ConfigError(binder.problems, hint=check_again(binder.document.file))
    if keys or files:
        raise RestartNeededError((*keys, *files))
    return msgspec.structs.replace(setup, config=config)


def _changed_keys(old: Config, new: Config) -> tuple[str, ...]:
    keys = [
        f"{table}.{field}"
        for table, fields in _AT_START.items()
        for field in fields
        if getattr(getattr(old, table), field) != getattr(getattr(new, table), field)
    ]
    return (*(("state_dir",) if old.state_dir != new.state_dir else ()), *keys)


def _complete(
    binder: Binder, config: Config, kinds: Mapping[str, Kind], formats: Mapping[str, Format], *, blame: bool
) -> Config:
    """Add the sources. Without `blame`, a missing plugin is no problem: its import may have failed.

    Raises:
        ConfigError: contains all problems.
    """
    sources, claiming = {}, {}
    for name, table in named_tables(binder, "sources").items():
        if name == validators.RESERVED:
            binder.report(("sources", name), "this name is reserved for the relay's own events")
        source, wrong = _bind_source(binder, config, kinds, name, table, blame_kinds=blame)
        if source is not None and "prefix" not in wrong:
            claiming[name] = source
        if source is not None and not wrong:
            sources[name] = source
    _check_claims(binder, claiming)
    if config.cluster.enabled and not config.is_node:
        binder.report(("cluster", "enabled"), "several nodes need a postgresql:// URL in [storage] url")
    if blame:
        _check_formats(binder, config, formats)
    if binder.problems:
        hint = check_again(binder.document.file)
        raise ConfigError(binder.problems, hint=hint, warnings=map(str, sorted(binder.warnings)))
    if problem := implementation_of(config.server.implementation)[1]:
        binder.warn(("server", "implementation"), problem)
    warnings = tuple(str(warning) for warning in sorted(binder.warnings))
    return msgspec.structs.replace(config, sources=sources, warnings=warnings)


class _Manager(pluggy.PluginManager):
    """Examines only marked functions of a module: with all names of a module, pluggy takes a few ms."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        """See pluggy."""
        if isinstance(plugin, ModuleType):
            value = vars(plugin).get(name)
            if not hasattr(value, f"{self.project_name}_impl"):
                return None
        return super().parse_hookimpl_opts(plugin, name)


def discover(dirs: Sequence[Path]) -> tuple[Offers, list[Problem]]:
    """Return everything that plugins provide, and the problems of plugins."""
    manager = _Manager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    offers = Offers()
    problems: list[Problem] = []
    for plugin in find_plugins(dirs):
        if isinstance(plugin, Problem):
            problems.append(plugin)
            continue
        try:
            for hook, function in _hooks_of(manager, plugin.module).items():
                offers.take(plugin, hook, function)
        except PluginError as error:
            problems.append(Problem(plugin.file, 0, "", str(error)))
    return offers, problems


def _hooks_of(manager: pluggy.PluginManager, module: Any) -> dict[str, Callable[..., Any]]:
    """Return a plugin's hooks as plain functions, by the name of the hook."""
    _check_marks(manager, module)
    if manager.is_registered(module):
        raise PluginError("is loaded twice; keep one of its entry points")
    try:
        manager.register(module)
    except pluggy.PluginValidationError as error:
        raise PluginError(f"is not a valid plugin: {str(error).splitlines()[-1]}") from None
    found: dict[str, Callable[..., Any]] = {}
    for caller in manager.get_hookcallers(module) or ():
        takes = inspect.signature(getattr(hookspecs, caller.name)).parameters
        for hook in caller.get_hookimpls():
            if hook.plugin is not module:
                continue
            if caller.name in found:
                raise PluginError(f"defines {caller.name}() twice")
            plain = not (hook.hookwrapper or hook.wrapper or inspect.iscoroutinefunction(hook.function))
            if not plain or hook.argnames != tuple(takes):
                raise PluginError(f"must define {caller.name}({', '.join(takes)}) as a plain function")
            found[caller.name] = hook.function
    return found


def _check_marks(manager: pluggy.PluginManager, module: Any) -> None:
    """Check for misspelt hooks: pluggy ignores every function without a mark."""
    known = [name for name in vars(hookspecs) if name.startswith("relay_")]
    found = False
    for name in dir(module):
        options = manager.parse_hookimpl_opts(module, name)
        if not options and not name.startswith("relay_"):
            continue
        hook = (options.get("specname") or name) if options else name
        value = inspect.getattr_static(module, name)
        own = inspect.isfunction(value) and value.__module__ == getattr(module, "__name__", "")
        if not options and not own:
            continue
        if hook not in known:
            raise PluginError(f'has a hook "{hook}" that does not exist{guess(hook, known)}')
        if not options:
            raise PluginError(f"defines {name}() without @hookimpl; add the decorator")
        found = True
    if not found:
        raise PluginError(f"offers nothing; define one of {', '.join(known)} with @hookimpl")


def _bind_source(
    binder: Binder,
    config: Config,
    kinds: Mapping[str, Kind],
    name: str,
    table: Mapping[str, Any],
    *,
    blame_kinds: bool,
) -> tuple[SourceConfig | None, frozenset[str]]:
    """Return a source, with defaults in place of its wrong keys, and the names of these keys.

    The source is None if its settings are wrong or its plugin is unknown.
    """
    path: KeyPath = ("sources", name)
    plugin = table.get("plugin")
    kind = kinds.get(plugin) if isinstance(plugin, str) else None
    if kind is not None and kind.preset is not None:
        complete = _with_preset(binder, kind, kind.preset, table, path)
        if complete is None:
            return None, frozenset()
        table = complete
    own = kind.source.__struct_encode_fields__ if kind else tuple(table)
    values = binder.fields(
        SourceConfig,
        table,
        path,
        given={"name": name, "max_body": config.server.max_body, "workers": config.workers},
        hidden={"name", "settings", "compiled"},
        others=own,
    )
    if kind is None:
        if blame_kinds and isinstance(plugin, str):  # else a broken plugin may provide this kind
            known = guess(plugin, kinds) or "; `relay plugins list` shows all kinds"
            binder.report((*path, "plugin"), f"no plugin offers the kind {shown(plugin)}{known}")
        return None, frozenset()
    settings = _bind_settings(binder, kind, {key: table[key] for key in own if key in table}, path)
    wrong = frozenset(key for key, value in values.items() if value is WRONG)
    source = SourceConfig(**{key: value for key, value in values.items() if key not in wrong})
    schemas = Schemas(kind.source.data_field)
    for type_, file in source.schemas.items():
        try:
            schemas.add(type_, file)
        except ValueError as error:
            binder.report((*path, "schemas", type_), str(error))
    if settings is None:
        return None, wrong
    compiled = schemas if source.schemas else None
    return msgspec.structs.replace(source, settings=settings, compiled=compiled), wrong


def _with_preset(
    binder: Binder, kind: Kind, preset: Preset, table: Mapping[str, Any], path: KeyPath
) -> Mapping[str, Any] | None:
    """Return the table of a source with the defaults of its preset; None if the preset fails."""
    try:
        return kind.source.merged(preset.read().defaults, table)
    except Exception as error:  # noqa: BLE001 - a plugin may raise anything
        problem = f'the preset "{kind.name}" ({kind.file}) failed: {in_one_line(error)}'
        binder.report((*path, "plugin"), problem)
        return None


def _bind_settings(binder: Binder, kind: Kind, table: Mapping[str, Any], path: KeyPath) -> Source | None:
    """Create the plugin's settings record; an exception of its code becomes a problem of the table."""
    try:
        settings = binder.struct(kind.source, table, path)
        if settings is None:
            return None
        for warning in settings.warnings():
            binder.warn(path, warning)
        _check_routes(settings)
        settings.is_open()
        settings.needs_body()
    except Refusal as refusal:
        binder.report(path, refusal.detail)
    except (ValueError, ExceptionGroup) as error:
        for key, text in faults_of(error):
            binder.report((*path, *key), text)
    except BaseException as error:  # noqa: BLE001 - see above; at a reload a SystemExit would end the daemon
        binder.report(path, f'the plugin "{kind.name}" ({kind.file}) failed: {in_one_line(error)}')
    else:
        return settings
    return None


def _check_claims(binder: Binder, sources: Mapping[str, SourceConfig]) -> None:
    """Report two sources that claim the same paths, or the errors below the same prefix.

    A placeholder matches every segment, so `/hooks/{shop}` of one source and `/hooks/github` of another match
    the same requests. Within a source, the literal path takes precedence. All methods of a path belong to one
    source, because that source also responds to methods without a route.
    """
    prefixes: dict[str, str] = {}  # owners
    literals = {"/health": "the relay itself"}
    templates: dict[str, str] = {}
    for name, source in sources.items():
        settings, owner = source.settings, f'source "{name}"'
        routes: dict[str, str] = {}  # one method of each path
        for method, path, _ in settings.routes():
            routes.setdefault(source.prefix + path, method)
        owned = [source.prefix + prefix for prefix in settings.owned()]
        rivals = [(f"everything below {prefix}", prefixes.setdefault(prefix, owner)) for prefix in owned]
        for path, method in routes.items():
            if rival := literals.get(path) or templates.get(path):
                rivals.append((f"{method} {path}", rival))
            known = (literals | templates) if "{" in path else templates
            rivals += [
                (f"{method} {path}", f"{rival} ({other})")
                for other, rival in known.items()
                if other != path and _meet(path, other)
            ]
        for claim, rival in rivals:
            if rival != owner:
                has_path = "path" in settings.__struct_encode_fields__
                advice = "give it another `path`, or a `prefix`" if has_path else "give it a `prefix`"
                binder.report(("sources", name), f"claims {claim}, as {rival} does; {advice}")
                break
        for path in routes:
            (templates if "{" in path else literals).setdefault(path, owner)


def _check_routes(source: Source) -> None:
    """Check the paths of a source, which its plugin may compute from the settings.

    Raises:
        RuntimeError: the relay could not serve such a path.
    """
    if not all(prefix.startswith("/") for prefix in source.owned()):
        raise RuntimeError(f'owned() must return paths such as "/hooks", got {source.owned()!r}')
    for method, path, name in source.routes():
        segments = path.split("/")
        names = [segment.strip("{}").removesuffix(":path") for segment in segments if "{" in segment]
        if not path.startswith("/") or not all(map(_SEGMENT.fullmatch, segments)):
            raise RuntimeError(
                f"the path {path!r} must begin with a slash, and its segments must be literal or {{name}}"
            )
        if len(set(names)) < len(names) or path.count(SPANNING) > 1:
            raise RuntimeError(f"the path {path!r} has a name, or {{name:path}}, twice")
        if not method.isupper():
            raise RuntimeError(f"the method of {path} must be in capitals, got {method!r}")
        is_method = callable(getattr(source, name, None))
        if not is_method:
            raise RuntimeError(f"{name!r}, the handler of {method} {path}, is not a method")


def _meet(one: str, other: str) -> bool:
    """Return whether a path exists that matches both routes."""
    ours, theirs = one.split("/"), other.split("/")
    spans = [segments for segments in (ours, theirs) if any(part.endswith(SPANNING) for part in segments)]
    if not spans:
        return len(ours) == len(theirs) and all(map(_agree, ours, theirs))
    if len(spans) == 1 and len(ours if spans[0] is theirs else theirs) < len(spans[0]):
        return False
    # A `{name:path}` matches any number of segments, so only the parts before and after it can differ.
    before = min(_index(segments) for segments in spans)
    after = min(len(segments) - 1 - _index(segments) for segments in spans)
    return all(map(_agree, ours[:before], theirs[:before])) and all(
        map(_agree, ours[len(ours) - after :], theirs[len(theirs) - after :])
    )


def _index(segments: list[str]) -> int:
    """Return the position of the segment `{name:path}`."""
    return next(at for at, part in enumerate(segments) if part.endswith(SPANNING))


def _agree(one: str, other: str) -> bool:
    return one == other or one.startswith("{") or other.startswith("{")


_FORMAT_KEYS = {"format", "message", "template", "content_type", "group_by"}
"""Keys of a destination that are checked together."""


def _check_formats(binder: Binder, config: Config, formats: Mapping[str, Format]) -> None:
    incomplete = {
        name: destination
        for name, (destination, wrong) in binder.incomplete.items()
        if not wrong & _FORMAT_KEYS
    }
    for name, destination in {**config.destinations, **incomplete}.items():
        for key, problem in problems_of(destination, formats):
            binder.report(("destinations", name, *key), problem)
        for key, warning in warnings_of(destination, formats):
            binder.warn(("destinations", name, *key), warning)
