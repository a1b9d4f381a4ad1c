"""A TOML file and the files that it includes, as they were read: their values, and the place of each."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from relay.config.installed_service import service_of
from relay.config.problems import ConfigError, KeyPath, Problem, UnreadableError, check_again, dotted, kind_of

_WILD = re.compile(r"[*?\[]")
_AT_LINE = re.compile(r" \(at line (\d+), column \d+\)\Z")
_AT_END = " (at end of document)"


INCLUDED = ("conf.d/*.toml",)
"""Files that belong to a configuration without the key `include`; patterns are relative to its folder."""


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """One TOML file, with the tables of the files that it includes."""

    file: str  # as the operator named it, for messages
    path: Path  # absolute
    data: dict[str, Any]
    lines: Mapping[KeyPath, int]
    files: Mapping[KeyPath, str] = {}  # of keys in included files
    included: tuple[Path, ...] = ()

    def problem(self, path: KeyPath, text: str) -> Problem:
        """Return a problem at the line of a key, or of the nearest table around it that a file names."""
        at = path
        while at not in self.lines:
            at = at[:-1]
        return Problem(self.files.get(at, self.file), self.lines[at], dotted(path), text)


def read(path: Path) -> Document:
    """Read a TOML file and the files that it includes.

    Raises:
        UnreadableError: this user may not read one of the files.
        ConfigError: a file cannot be opened, is not UTF-8 or is not TOML; or two files set the same key.
    """
    main = _read(path)
    data, lines = main.data, dict(main.lines)
    files: dict[KeyPath, str] = {}
    document = Document(file=main.file, path=main.path, data=data, lines=lines, files=files)
    problems: list[Problem] = []
    included = []
    for file in _included(document, problems):
        try:
            part = _read(file)
        except UnreadableError:
            raise
        except ConfigError as error:  # the other files may have problems as well
            problems += error.problems
            continue
        included.append(part.path)
        if "include" in part.data:
            problems.append(part.problem(("include",), f"only {main.file} may include files"))
            continue
        repeated = list(_merge(data, part.data, ()))
        for key in repeated:
            first = document.problem(key, "")
            problems.append(part.problem(key, f"is set in {first.file}:{first.line} as well"))
        for key, line in part.lines.items():
            if key not in lines:
                lines[key], files[key] = line, part.file
    if problems:
        raise ConfigError(problems, hint=check_again(path))
    return msgspec.structs.replace(document, included=tuple(included))


def _included(main: Document, problems: list[Problem]) -> Iterator[Path]:
    """Yield the files that a document includes, in the order of their names."""
    patterns = main.data.get("include", list(INCLUDED))
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        problems.append(main.problem(("include",), f"expected a list of patterns, got {kind_of(patterns)}"))
        return
    for at, pattern in enumerate(patterns):
        folder, name = Path(main.file).parent / Path(pattern).parent, Path(pattern).name
        if not _WILD.search(pattern):
            yield folder / name
            continue
        try:
            files = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
        except PermissionError as error:
            problems.append(main.problem(("include", at), f"{folder} cannot be read: {error.strerror}"))
        except OSError:  # a missing folder has no files
            pass
        else:
            yield from (each for each in files if fnmatchcase(each.name, name))


def _merge(data: dict[str, Any], more: Mapping[str, Any], path: KeyPath) -> Iterator[KeyPath]:
    """Add the keys of an included file; yields those that are set already."""
    for key, value in more.items():
        if key not in data:
            data[key] = value
        elif isinstance(value, dict) and isinstance(data[key], dict):
            yield from _merge(data[key], value, (*path, key))
        else:
            yield (*path, key)


def _read(path: Path) -> Document:
    """Read one file."""
    file = str(path)
    try:
        content = path.read_bytes()
    except PermissionError as error:
        service = service_of(path)
        who = f"a member of the group {service.group}" if service else "the user that the relay runs as"
        hint = f"run the command as root, or as {who}"
        raise UnreadableError([_unread(file, error)], hint=hint) from None
    except OSError as error:
        hint = "name another file with -c; `relay config init FILE` creates a starter file"
        raise ConfigError([_unread(file, error)], hint=hint) from None
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = Problem(file, line, "", "not UTF-8 text; save the file as UTF-8")
        raise ConfigError([problem], hint=check_again(path)) from None
    try:
        data = tomllib.loads(text)
        lines = find_lines(text)
    except RecursionError:
        problem = Problem(file, 0, "", "nested too deeply")
        raise ConfigError([problem], hint=check_again(path)) from None
    except ValueError as error:  # TOMLDecodeError is one; a number of 5,000 digits is another
        raise ConfigError([_syntax(file, text, str(error))], hint=check_again(path)) from None
    return Document(file=file, path=path.absolute(), data=data, lines=lines)


def _unread(file: str, error: OSError) -> Problem:
    return Problem(file, 0, "", f"cannot be read: {error.strerror}")


def _syntax(file: str, text: str, message: str) -> Problem:
    """Turn "Invalid value (at line 3, column 5)" into a problem at line 3."""
    place = _AT_LINE.search(message)
    if place is not None:
        line, message = int(place[1]), message[: place.start()]
    else:
        line = text.count("\n") + 1 if message.endswith(_AT_END) else 0
        message = message.removesuffix(_AT_END)
    return Problem(file, line, "", f"not valid TOML: {message[:1].lower()}{message[1:]}")


_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\n]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}(?!")'
    r"|'''.*?'{3,5}(?!')"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'",
    re.DOTALL,
)


def find_lines(text: str) -> dict[KeyPath, int]:
    """Return the line, counted from 1, of every key, table and array element of a valid TOML text.

    The line of a table is the line of its header. A table without a header has the line that names it
    first. The text must have passed `tomllib.loads`, because this function does not check it again.
    """
    scanner = _Scanner(text.replace("\r\n", "\n"))
    scanner.document()
    return scanner.lines


class _Scanner:
    """Walks over a text once; `at` is always between two tokens."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {(): 1}
        self._line, self._counted = 1, 0
        self._tables: dict[KeyPath, int] = {}  # number of tables so far in each array of tables

    def document(self) -> None:
        table: KeyPath = ()
        self._skip(_BLANK)
        while self.at < len(self.text):
            if self._peek() == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)

    def _header(self) -> KeyPath:
        line, brackets = self._here(), 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        keys = self._keys()
        self.at += brackets
        path: KeyPath = ()
        for key in keys[:-1]:
            path = (*path, key)
            self.lines.setdefault(path, line)
            if path in self._tables:  # a header continues in the array's last table
                path = (*path, self._tables[path] - 1)
        path = (*path, keys[-1])
        if brackets == 2:  # noqa: PLR2004 - the two brackets of an array of tables
            self.lines.setdefault(path, line)
            index = self._tables.get(path, 0)
            self._tables[path] = index + 1
            path = (*path, index)
        self.lines[path] = line
        return path

    def _pair(self, path: KeyPath) -> None:
        line = self._here()
        for key in self._keys():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self.at += 1  # the equals sign
        self._skip(_SPACE)
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        first = self._peek()
        if first == "[":
            self._array(path)
        elif first == "{":
            self._inline(path)
        else:
            self._take(_STRING if first in "\"'" else _SCALAR)

    def _array(self, path: KeyPath) -> None:
        index = 0
        self._step()
        while self._peek() != "]":
            self.lines[(*path, index)] = self._here()
            self._value((*path, index))
            index += 1
            self._skip(_BLANK)
            if self._peek() == ",":
                self._step()
        self.at += 1

    def _inline(self, path: KeyPath) -> None:
        self._step()
        while self._peek() != "}":
            self._pair(path)
            self._skip(_BLANK)
            if self._peek() == ",":
                self._step()
        self.at += 1

    def _keys(self) -> list[str]:
        keys: list[str] = []
        while True:
            self._skip(_SPACE)
            if self._peek() in "\"'":
                keys.extend(tomllib.loads(f"{self._take(_STRING)} = 0"))
            else:
                keys.append(self._take(_BARE_KEY))
            self._skip(_SPACE)
            if self._peek() != ".":
                return keys
            self.at += 1

    def _peek(self) -> str:
        return self.text[self.at]

    def _step(self) -> None:
        self.at += 1
        self._skip(_BLANK)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise AssertionError(f"no valid TOML at character {self.at}: tomllib must read it first")
        self.at = match.end()
        return match[0]

    def _here(self) -> int:
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line
