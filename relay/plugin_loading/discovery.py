"""Finds and imports plugins, in this order: `[plugins] dirs`, installed packages, bundled sources."""

import hashlib
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import msgspec

import relay
from relay.config.problems import Problem

Door = Literal["dirs", "entry point", "bundled"]
GROUP = "relay"
"""The group of entry points for plugins in installed packages."""

NO_PLUGINS = ("_", "test_")
"""Prefixes of file names in the folders that are not plugins."""

BUNDLED = "relay.sources"
"""The package of the bundled sources; its files are in `plugins/` (see pyproject.toml)."""


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """An imported plugin, before its hooks are called."""

    name: str  # of the file or the entry point; a metric label
    module: Any  # an entry point may name any object
    file: str  # shown in messages and lists
    door: Door
    version: str  # "": not stated


def find_plugins(dirs: Sequence[Path]) -> Iterator[Plugin | Problem]:
    """Import all plugins; yields a problem for one that cannot be imported."""
    yield from _in_folders(dirs)
    yield from _installed()
    yield from _bundled()


def digests_of(dirs: Sequence[Path], others: Iterable[str]) -> Mapping[str, bytes]:
    """Return the digests of all plugin files, in the folders and `others`, without importing them.

    A different result means that code was added, changed or removed.
    """
    return {file: _digest(file) for file in (*map(str, _files(dirs)), *others)}


def _digest(file: str) -> bytes:
    try:
        return hashlib.sha256(Path(file).read_bytes()).digest()
    except OSError:  # deleted, or an entry point without a file
        return b""


def _files(dirs: Sequence[Path]) -> Sequence[Path]:
    files = [file for folder in dirs for file in sorted(folder.glob("*.py"))]
    return tuple(dict.fromkeys(file.resolve() for file in files if not file.name.startswith(NO_PLUGINS)))


def _in_folders(dirs: Sequence[Path]) -> Iterator[Plugin | Problem]:
    for folder in dirs:
        try:
            os.scandir(folder).close()
        except PermissionError as error:  # `glob` would silently find nothing
            yield Problem(str(folder), 0, "", f"cannot be read: {error.strerror}")
        except OSError:  # a missing folder has no plugins
            pass
    for file in _files(dirs):
        loaded = _attempt(str(file), partial(_import_file, file))
        if isinstance(loaded, Problem):
            yield loaded
        else:
            version = str(getattr(loaded, "__version__", ""))
            yield Plugin(name=file.stem, module=loaded, file=str(file), door="dirs", version=version)


def _installed() -> Iterator[Plugin | Problem]:
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        name = f'entry point "{point.name} = {point.value}"'
        loaded = _attempt(name, point.load)
        if isinstance(loaded, Problem):
            yield loaded
        else:
            file = str(getattr(loaded, "__file__", None) or name)
            version = point.dist.version if point.dist else ""
            yield Plugin(name=point.name, module=loaded, file=file, door="entry point", version=version)


def _bundled() -> Iterator[Plugin | Problem]:
    package = importlib.import_module(BUNDLED)
    for info in pkgutil.iter_modules(package.__path__):
        name = f"{BUNDLED}.{info.name}"
        loaded = _attempt(name, partial(importlib.import_module, name))
        if isinstance(loaded, Problem):
            yield loaded
        else:
            file = str(loaded.__file__)
            yield Plugin(name=info.name, module=loaded, file=file, door="bundled", version=relay.__version__)


def _import_file(file: Path) -> ModuleType:
    """Import a file under a private name; the same content runs once, so a reload gets the same classes.

    The name contains a digest of path and content, so an edited file is a new module. Writes no bytecode
    beside the operator's files.
    """
    content = file.read_bytes()
    key = hashlib.sha256(bytes(file) + b"\0" + content).hexdigest()[:16]
    name = f"_relay_plugin_{file.stem}_{key}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # msgspec resolves annotations there
    try:
        exec(compile(content, str(file), "exec"), module.__dict__)  # noqa: S102 - plugins are code
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attempt(file: str, load: Callable[[], Any]) -> Any:
    """Return the result of `load`, or a problem if it raises any exception."""
    try:
        return load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - see above
        if isinstance(error, SyntaxError) and error.filename == file:
            return Problem(file, error.lineno or 0, "", f"cannot be imported: {error.msg}")
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        line = (lines[-1] if lines else 0) or 0
        return Problem(file, line, "", f"cannot be imported: {in_one_line(error)}")


def in_one_line(error: BaseException) -> str:
    """Return an exception as part of a sentence.

    >>> in_one_line(KeyError("x"))
    "KeyError: 'x'"
    """
    return " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
