"""Checks and registers everything that plugins provide: sources, formats, jobs, hooks."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import msgspec

from relay.config import validators
from relay.config.schema import SourceConfig
from relay.formats import FORMATS, Format
from relay.model import Job, Outcome, StoredEvent
from relay.plugin_loading.discovery import Door, Plugin, in_one_line
from relay.source import Preset, Source

_YEAR = 366 * 86_400
_COMMON = frozenset(SourceConfig.__struct_fields__)


class PluginError(Exception):
    """The fault of a plugin, as a sentence about its file."""


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of source, for `plugin = …`."""

    name: str
    source: type[Source]
    file: str  # of the plugin
    door: Door
    version: str
    preset: Preset | None = None  # the preset whose defaults it has


class Observer(msgspec.Struct, frozen=True, kw_only=True):
    """The hooks of one plugin that are called after a commit."""

    plugin: str
    events_stored: Callable[[Sequence[StoredEvent]], None] | None = None
    attempts_recorded: Callable[[Sequence[Outcome]], None] | None = None


class Offering(msgspec.Struct, frozen=True):
    """One thing that a plugin provides, for lists."""

    what: str  # source, preset, format, job, or the name of a hook
    name: str
    plugin: Plugin

    def shown(self) -> dict[str, str]:
        """Return the fields for the API."""
        return {
            "name": self.name,
            "offer": self.what,
            "door": self.plugin.door,
            "version": self.plugin.version,
            "file": self.plugin.file,
        }


class Offers:
    """Everything that plugins provide."""

    def __init__(self) -> None:
        self.found: list[Offering] = []
        self.kinds: dict[str, Kind] = {}  # the first plugin found wins
        self.formats: dict[str, Format] = dict(FORMATS)
        self.jobs: dict[str, Job] = {}  # by plugin and name
        self.observers: dict[str, Observer] = {}  # by file
        self._files = dict.fromkeys(FORMATS, "the relay itself")  # the plugin of each format

    def listed(self) -> tuple[Offering, ...]:
        """Return everything: sources, presets, and the rest; each by name."""
        order = {"source": 0, "preset": 1}
        return tuple(sorted(self.found, key=lambda each: (order.get(each.what, 2), each.name)))

    def take(self, plugin: Plugin, hook: str, function: Callable[..., Any]) -> None:
        """Add the results of one hook of a plugin.

        Raises:
            PluginError: a result is invalid, or another plugin provides the same name.
        """
        match hook:
            case "relay_sources":
                for source in _offered(hook, function, "Source classes"):
                    self._take_source(plugin, source)
            case "relay_presets":
                for preset in _offered(hook, function, "Presets"):
                    self._take_preset(plugin, preset)
            case "relay_formats":
                for format_ in _offered(hook, function, "Formats"):
                    self._take_format(plugin, format_)
            case "relay_jobs":
                for job in _offered(hook, function, "Jobs"):
                    self._take_job(plugin, job)
            case "relay_events_stored" | "relay_attempts_recorded":
                observer = self.observers.get(plugin.file) or Observer(plugin=plugin.name)
                hooks = {hook.removeprefix("relay_"): function}
                self.observers[plugin.file] = msgspec.structs.replace(observer, **hooks)
                self.found.append(Offering(hook, plugin.name, plugin))

    def _take_source(self, plugin: Plugin, source: Any) -> None:
        _check_source(source)
        self._take_kind("source", plugin, source.kind, source)

    def _take_preset(self, plugin: Plugin, preset: Any) -> None:
        if not isinstance(preset, Preset):
            raise PluginError(f"relay_presets() returned a list with {preset!r:.60}, which is not a Preset")
        _check_name("preset", preset.name)
        _check_source(preset.source)
        described = msgspec.structs.replace(plugin, file=preset.file or plugin.file)
        self._take_kind("preset", described, preset.name, preset.source, preset)

    def _take_kind(
        self, what: str, plugin: Plugin, name: str, source: type[Source], preset: Preset | None = None
    ) -> None:
        kind = Kind(
            name=name,
            source=source,
            file=plugin.file,
            door=plugin.door,
            version=plugin.version,
            preset=preset,
        )
        rival = self.kinds.setdefault(kind.name, kind)
        if rival is not kind and rival.door == kind.door:
            raise PluginError(
                f'offers the kind "{kind.name}", which {rival.file} offers too; keep one of them'
            )
        if rival is kind:
            self.found.append(Offering(what, kind.name, plugin))

    def _take_format(self, plugin: Plugin, format_: Any) -> None:
        _check_format(format_)
        if format_.name in self.formats:
            rival = self._files[format_.name]
            raise PluginError(
                f'offers the format "{format_.name}", which {rival} offers too; give it another name'
            )
        self.formats[format_.name] = format_
        self._files[format_.name] = plugin.file
        self.found.append(Offering("format", format_.name, plugin))

    def _take_job(self, plugin: Plugin, job: Any) -> None:
        _check_job(job)
        name = f"{plugin.name}.{job.name}"  # so that log lines name the plugin
        if name in self.jobs:
            raise PluginError(f'offers the job "{name}", which already exists; give it another name')
        self.jobs[name] = msgspec.structs.replace(job, name=name)
        self.found.append(Offering("job", name, plugin))


def _offered(hook: str, function: Callable[..., Any], expected: str) -> Iterator[Any]:
    try:
        offered = function()
    except BaseException as error:  # noqa: BLE001 - reported as one sentence
        raise PluginError(f"{hook}() raised {in_one_line(error)}") from None
    if not isinstance(offered, list | tuple):
        raise PluginError(f"{hook}() returned {offered!r:.60}; expected a list of {expected}")
    yield from offered


def _check_source(source: Any) -> None:
    if not (isinstance(source, type) and issubclass(source, Source)):
        raise PluginError(f"relay_sources() returned a list with {source!r:.60}, which is not a Source class")
    try:
        validators.name(source.kind)
        fields = _fields_of(source)
    except ValueError as error:
        raise PluginError(f"{source.__name__} has the kind {source.kind!r}: {error}") from None
    except NameError as error:
        raise PluginError(f"{source.__name__} has a field of an unknown type: {error}") from None
    if taken := sorted(fields & _COMMON):
        raise PluginError(f"{source.__name__} has a field `{taken[0]}`: that key belongs to every source")


@cache
def _fields_of(source: type[Source]) -> frozenset[str]:
    """Return the keys of a source; cached, because dozens of presets share one."""
    return frozenset(field.encode_name for field in msgspec.structs.fields(source))


def _check_format(format_: Any) -> None:
    if not isinstance(format_, Format):
        raise PluginError(f"relay_formats() returned a list with {format_!r:.60}, which is not a Format")
    _check_name("format", format_.name)
    if format_.content_type is not None and not _is_header_value(format_.content_type):
        raise PluginError(
            f'the format "{format_.name}" has the content type {format_.content_type!r:.60}, '
            "which is not a valid header value"
        )
    render: Any = format_.render
    if not callable(render) or inspect.iscoroutinefunction(render):
        raise PluginError(f'the format "{format_.name}" has a `render` that is not a plain function')
    group: Any = format_.group
    if group is not None and (not callable(group) or inspect.iscoroutinefunction(group)):
        raise PluginError(f'the format "{format_.name}" has a `group` that is not a plain function')


def _check_job(job: Any) -> None:
    if not isinstance(job, Job):
        raise PluginError(f"relay_jobs() returned a list with {job!r:.60}, which is not a Job")
    _check_name("job", job.name)
    every: Any = job.every
    if not isinstance(every, int | float) or not 0 < every <= _YEAR:
        raise PluginError(
            f'the job "{job.name}" has every = {every!r:.60}; expected seconds, above 0 and at most a year'
        )
    if not inspect.iscoroutinefunction(job.work):
        raise PluginError(f'the job "{job.name}" has a `work` that is not an `async def` function')


def _check_name(what: str, name: Any) -> None:
    try:
        validators.name(name)
    except (TypeError, ValueError) as error:
        raise PluginError(f"has a {what} called {name!r:.60}: {error}") from None


def _is_header_value(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isprintable() and value.strip() == value != ""
