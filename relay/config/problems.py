"""The problems of a configuration: one record per fault, all reported at once."""

import difflib
import grp
import json
import os
import shlex
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from relay.errors import RelayError

KeyPath = tuple[str | int, ...]
"""The way to a value in a TOML document: keys of tables, indices of arrays."""

_BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_SHOWN = 60  # characters shown of a wrong value; a longer value would hide the rest of the message


class Problem(msgspec.Struct, frozen=True, order=True):
    """One error or warning with its place; prints as `file:line: key: problem`."""

    file: str
    line: int  # 0: the file as a whole
    key: str  # dotted; "" if the problem has no key
    problem: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(part for part in (place, self.key, self.problem) if part)


class ConfigError(RelayError):
    """The configuration cannot be used; `problems` has every reason, ordered by place."""

    def __init__(self, problems: Iterable[Problem], *, hint: str = "", warnings: Iterable[str] = ()) -> None:
        self.problems = tuple(sorted(set(problems)))
        self.warnings = tuple(warnings)
        super().__init__("\n".join(map(str, self.problems)), hint=hint)


class SettingError(ValueError):
    """A wrong setting; raised by a record of settings, it is reported at the line of the setting's key.

    Several of them are raised together as an ExceptionGroup.
    """

    def __init__(self, problem: str, *key: str | int) -> None:
        super().__init__(problem)
        self.key = key  # the way from the record's table to the value


def faults_of(error: Exception) -> tuple[tuple[KeyPath, str], ...]:
    """Return the key, from the record's table, and the sentence of each fault in an error of a record."""
    if isinstance(error, ExceptionGroup):
        return tuple(fault for each in error.exceptions for fault in faults_of(each))
    if isinstance(error, ValueError):
        return ((error.key if isinstance(error, SettingError) else (), str(error)),)
    return (((), f"{type(error).__name__}: {error}"),)


class UnreadableError(ConfigError):
    """This user may not read the configuration."""


def dotted(path: KeyPath) -> str:
    """Write a path the way TOML does.

    >>> dotted(("sources", "a b", "tokens", 0, "env"))
    'sources."a b".tokens[0].env'
    """
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            bare = step != "" and _BARE.issuperset(step)
            text += ("." if text else "") + (step if bare else json.dumps(step, ensure_ascii=False))
    return text


MOST_MATCHES = 5
"""Maximum number of ids that the error for an ambiguous id lists."""


def ambiguous(noun: str, given: str, matches: Iterable[str]) -> RelayError:
    """Return the error for a prefix that several ids have; it lists the first ids."""
    found = list(matches)
    listed = [*found[:MOST_MATCHES], *(["…"] if len(found) > MOST_MATCHES else [])]
    return RelayError(
        f"ambiguous {noun} id {shown(given)}; matches: {', '.join(listed)}", hint="add more characters"
    )


def shown(value: object) -> str:
    """Return a wrong value as short TOML for an error message; never pass a value that may be a secret.

    >>> shown(True), shown("x"), shown({})
    ('true', '"x"', 'a table')
    """
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    text = (
        json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool | int | float) else str(value)
    )
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def kind_of(value: object) -> str:
    """Name the kind of a value that must not be shown.

    >>> kind_of("s3cret")
    'a string'
    """
    return "a string" if isinstance(value, str) else shown(value)


def check_again(file: object) -> str:
    """Return the next step after an error of a configuration."""
    return f"correct it, then run `relay check-config {file}`"


def unreadable(path: Path, error: OSError) -> str:
    """Return why a file cannot be read; if the group of the service lacks permission, also what to run."""
    reason = error.strerror or str(error)
    if not isinstance(error, PermissionError) or os.geteuid() == os.getuid():
        return reason
    group = str(os.getegid())  # root checks the file as the service's user
    with suppress(KeyError):
        group = grp.getgrgid(os.getegid()).gr_name
    file = shlex.quote(str(path))
    return f"{reason}; let the service read it: `chgrp {group} {file} && chmod g+r {file}`"


def guess(name: str, known: Collection[str]) -> str:
    """Return `, did you mean "…"?` where one of the known names is near, else nothing.

    >>> guess("max_boddy", ["listen", "max_body"])
    ', did you mean "max_body"?'
    """
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f', did you mean "{near[0]}"?' if near else ""
