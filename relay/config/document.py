"""A TOML file as it was read: its values, and the line of each."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from relay.config.installed_service import service_of
from relay.config.problems import ConfigError, KeyPath, Problem, UnreadableError
from relay.config.toml_lines import find_lines

_AT_LINE = re.compile(r" \(at line (\d+), column \d+\)\Z")
_AT_END = " (at end of document)"


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """One TOML file."""

    file: str  # as the operator named it, for messages
    path: Path  # absolute
    data: dict[str, Any]
    lines: Mapping[KeyPath, int]

    def line(self, path: KeyPath) -> int:
        """Return the line of a key, or of the nearest table around it that the file names."""
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]


def read(path: Path) -> Document:
    """Read a TOML file.

    Raises:
        UnreadableError: this user may not read it.
        ConfigError: it cannot be opened, is not UTF-8 or is not TOML; one problem, with its line.
    """
    file = str(path)
    try:
        content = path.read_bytes()
    except PermissionError as error:
        service = service_of(path)
        who = f"a member of the group {service.group}" if service else "the user that the relay runs as"
        hint = f"run the command as root, or as {who}"
        raise UnreadableError([_unread(file, error)], hint=hint) from None
    except OSError as error:
        hint = "name another file with -c; `relay config init FILE` writes one to start from"
        raise ConfigError([_unread(file, error)], hint=hint) from None
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem(file, line, "", "not UTF-8 text; save the file as UTF-8")]) from None
    try:
        data = tomllib.loads(text)
        lines = find_lines(text)
    except RecursionError:
        raise ConfigError([Problem(file, 0, "", "nested too deeply")]) from None
    except ValueError as error:  # TOMLDecodeError is one; a number of 5,000 digits is another
        raise ConfigError([_syntax(file, text, str(error))]) from None
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
