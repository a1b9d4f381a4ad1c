"""Reloads: apply a changed config.toml to the running daemon, completely or not at all."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import msgspec

from relay.base.clock import SECOND, Clock
from relay.config.effective import effective_table
from relay.config.installed_service import RunningEnvironment
from relay.config.problems import ConfigError, dotted
from relay.config.schema import Config
from relay.errors import RelayError, RestartNeededError, StorageUnavailableError
from relay.jobs.scheduler import Jobs
from relay.metrics import Metrics
from relay.model import Check
from relay.plugin_loading.loader import Setup, load_again
from relay.process.logs import configure, in_one_line, under_systemd
from relay.state import State
from relay.workers.watch import SWEEP

log = logging.getLogger("relay.reload")


class ReloadBody(msgspec.Struct, forbid_unknown_fields=True):
    """How to reload."""

    dry_run: bool = False  # only show the changes


class ChangedKey(msgspec.Struct, frozen=True):
    """One key whose value differs; null: it has no value. Secrets appear as `<secret>`."""

    table: str
    key: str
    before: Any
    after: Any
    place: str = ""  # of the new value, such as "conf.d/crm.toml:4"; empty for a default


class Reloaded(msgspec.Struct, frozen=True, kw_only=True):
    """The tables that a reload added, changed and removed, as config.toml names them."""

    path: str  # of the file
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    keys: tuple[ChangedKey, ...] = ()  # of the changed tables
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        changes = [
            f"{what} {', '.join(names)}"
            for what, names in (("added", self.added), ("changed", self.changed), ("removed", self.removed))
            if names
        ]
        return f"{self.path}: {'; '.join(changes) or 'no changes'}"


class Reloads:
    """Runs one reload at a time, between `open` and `close`."""

    def __init__(self, state: State, jobs: Jobs, metrics: Metrics, clock: Clock) -> None:
        self._state = state
        self._jobs = jobs
        self._metrics = metrics
        self._clock = clock
        self._environment = RunningEnvironment(state.config.path)
        # A context that is entered for each reload.
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext
        # Returns why the daemon has not started yet; None: it has started.
        self.waits_for: Callable[[], str | None] = lambda: None
        self.failed: str | None = None  # error of the latest reload
        self._open = asyncio.Event()
        self._closed = False
        self._lock = asyncio.Lock()  # held during a reload
        self._tasks: set[asyncio.Task[None]] = set()
        self._count(successful=True)  # the start has loaded the configuration

    def open(self) -> None:
        """Allow reloads; requests made before start now."""
        self._open.set()

    async def close(self) -> None:
        """Let the reload in progress finish and refuse further ones."""
        self._closed = True
        self._open.set()
        async with self._lock:
            pass
        await asyncio.gather(*self._tasks)

    def start(self) -> None:
        """Start a reload in the background, as SIGHUP does; its result is logged."""
        task = asyncio.create_task(self._reload_later())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def reload(self) -> Reloaded:
        """Read config.toml again and apply it.

        Raises:
            ConfigError: the file has problems; nothing has changed.
            StorageUnavailableError: the start waits for the database; nothing has changed.
            RestartNeededError: the changes need a restart; nothing has changed.
            RelayError: the configuration cannot be applied, or the daemon is stopping; nothing has changed.
        """
        if not self._open.is_set() and (why := self.waits_for()) is not None:
            hint = "config.toml was read at the start; reload again once /ready answers 200"
            raise StorageUnavailableError(f"the daemon is still waiting for its database: {why}", hint=hint)
        await self._open.wait()
        async with self._lock:
            if self._closed:
                raise RelayError("the daemon is stopping", hint="the next start reads config.toml")
            with self.around():
                return await self._apply()

    async def preview(self) -> Reloaded:
        """Return what a reload would change; change nothing. Raises as `reload` does."""
        setup, unread = await asyncio.to_thread(self._load)
        done = _compare(self._state.config, setup.config)
        return msgspec.structs.replace(done, warnings=(*done.warnings, *map(_unread, unread)))

    async def drift(self) -> Check:
        """Compare config.toml with the running configuration; change nothing."""
        hint = "relay reload"
        try:
            done = await self.preview()
        except ConfigError as error:
            detail, hint = error.message, "correct it before the next reload or restart"
        except RestartNeededError as error:
            detail, hint = error.message, "restart the daemon, or undo these changes"
        else:
            if not (done.added or done.changed or done.removed):
                return Check(name="config", ok=True, detail=f"{done.path} matches the running configuration")
            detail = f"not applied yet: {done}"
        return Check(name="config", ok=False, detail=detail, hint=hint)

    async def _apply(self) -> Reloaded:
        before, interval = self._state.config, self._state.watch.interval
        try:
            # In a thread: files are read and patterns compiled while requests are answered.
            setup, unread = await asyncio.to_thread(self._load)
            draft = await self._state.prepare(setup)
        except Exception as error:
            self._count(successful=False)
            self.failed = why = in_one_line(error) if isinstance(error, RelayError) else repr(error)
            log.error("reload failed, the configuration is unchanged: %s", why)  # noqa: TRY400 - the message has the reason
            raise
        self._state.adopt(draft)
        self.failed = None
        if self._state.watch.interval != interval:
            self._jobs.change(SWEEP, self._state.watch.interval)
        if setup.config.log != before.log:
            wanted = setup.config.log
            configure(wanted.level, wanted.format, under_systemd=under_systemd())
        done = _compare(before, setup.config)
        if unread:
            done = msgspec.structs.replace(done, warnings=(*done.warnings, *map(_unread, unread)))
        self._count(successful=True)
        log.info("reloaded %s", done)
        for warning in done.warnings:
            log.warning("%s", warning)
        return done

    def _load(self) -> tuple[Setup, tuple[str, ...]]:
        """Read the configuration; also returns the environment files that this user may not read."""
        given = self._environment.read()
        return load_again(self._state.setup, given), given.unreadable

    async def _reload_later(self) -> None:
        with suppress(Exception):  # `reload` logs it
            await self._open.wait()
            await self.reload()

    def _count(self, *, successful: bool) -> None:
        self._metrics.reloaded.set(successful)
        if successful:
            self._metrics.reloaded_at.set(self._clock.wall() / SECOND)


def _unread(file: str) -> str:
    return (
        f"{file} was not read again (permission denied), so its variables keep their values from the start;"
        " let the daemon's group read the file, or restart the daemon"
    )


def _compare(before: Config, config: Config) -> Reloaded:
    """Return the tables that differ."""
    old, new = dict(_tables(before)), dict(_tables(config))
    changed = tuple(name for name, table in new.items() if name in old and old[name] != table)
    return Reloaded(
        path=str(config.path),
        added=tuple(name for name in new if name not in old),
        changed=changed,
        removed=tuple(name for name in old if name not in new),
        keys=tuple(_changed_keys(changed, before, config)),
        warnings=config.warnings,
    )


def _changed_keys(names: Iterable[str], before: Config, config: Config) -> Iterator[ChangedKey]:
    """Yield the keys of changed tables whose values differ."""
    for name in names:
        table, _, inner = name.partition(".")
        old, new = getattr(before, table), getattr(config, table)
        if inner:
            old, new = old[inner], new[inner]
        shown = effective_table(old), effective_table(new)
        if not isinstance(new, msgspec.Struct):  # a key above all tables
            yield ChangedKey("", name, *shown, place=config.origins.get(name, ""))
            continue
        former, values = _fields(old), _fields(new)
        for key in sorted(former.keys() | values.keys()):
            if former.get(key) != values.get(key) and (key in shown[0] or key in shown[1]):
                path = (table, inner, key) if inner else (table, key)
                place = config.origins.get(dotted(path), "")
                yield ChangedKey(name, key, shown[0].get(key), shown[1].get(key), place)


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    """Return the values of a table by their keys."""
    values = {each.encode_name: getattr(record, each.name) for each in msgspec.structs.fields(record)}
    settings = values.get("settings")
    return values | _fields(settings) if isinstance(settings, msgspec.Struct) else values


def _tables(config: Config) -> Iterator[tuple[str, Any]]:
    for name, value in msgspec.structs.asdict(config).items():
        if name in {"path", "origins", "warnings"}:
            continue
        if isinstance(value, Mapping):
            for inner, table in value.items():
                yield f"{name}.{inner}", table
        else:
            yield name, value
