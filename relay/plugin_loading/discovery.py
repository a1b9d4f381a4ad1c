"""The three doors that plugins come in by: the operator's folders, installed packages, bundled sources."""

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
"""The group of entry points that packages offer plugins under."""

NO_PLUGINS = ("_", "test_")
"""How names of files begin that stand in the folders and are no plugins."""

BUNDLED = "relay.sources"
"""The package of the bundled sources; its files stand in `plugins/` (see pyproject.toml)."""


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """Something that came in: imported, and not yet asked what it offers."""

    name: str  # of the file or the entry point; the value of a metric's label
    module: Any  # an entry point may name any object
    file: str  # for messages and lists
    door: Door
    version: str  # "" where it states none


def at_the_doors(dirs: Sequence[Path]) -> Iterator[Plugin | Problem]:
    """Import every plugin, the earlier door first; one that cannot be imported is a problem."""
    yield from _in_folders(dirs)
    yield from _installed()
    yield from _bundled()


def prints(dirs: Sequence[Path], others: Iterable[str]) -> Mapping[str, bytes]:
    """Return the digest of every plugin's file, without running any: those in the folders, and others.

    Two answers that differ mean that code was added, edited or removed in between.
    """
    return {file: _digest(file) for file in (*map(str, _files(dirs)), *others)}


def _digest(file: str) -> bytes:
    try:
        return hashlib.sha256(Path(file).read_bytes()).digest()
    except OSError:  # gone; or an entry point that has no file
        return b""


def _files(dirs: Sequence[Path]) -> Sequence[Path]:
    files = [file for folder in dirs for file in sorted(folder.glob("*.py"))]
    return tuple(dict.fromkeys(file.resolve() for file in files if not file.name.startswith(NO_PLUGINS)))


def _in_folders(dirs: Sequence[Path]) -> Iterator[Plugin | Problem]:
    for folder in dirs:
        try:
            os.scandir(folder).close()
        except PermissionError as error:  # `glob` would find nothing in it, and blame nobody
            yield Problem(str(folder), 0, "", f"cannot be read: {error.strerror}")
        except OSError:  # a folder that is not there holds no plugins
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
    """Run a file as a module of a private name; the same bytes run once, so a reload gets equal classes.

    The name holds a digest of path and content: an edited file is another module, never a stale one.
    Nothing is written beside the operator's files.
    """
    content = file.read_bytes()
    key = hashlib.sha256(bytes(file) + b"\0" + content).hexdigest()[:16]
    name = f"_relay_plugin_{file.stem}_{key}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # msgspec looks annotations up there
    try:
        exec(compile(content, str(file), "exec"), module.__dict__)  # noqa: S102 - running it is the point
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attempt(file: str, load: Callable[[], Any]) -> Any:
    """Return what `load` returns, or a problem in one sentence: a plugin may raise anything."""
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
    """Write an exception as part of a sentence.

    >>> in_one_line(KeyError("x"))
    "KeyError: 'x'"
    """
    return " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
