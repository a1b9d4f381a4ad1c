"""Fills records from TOML tables by the types of their fields, and collects all problems.

A field's type determines how its value is read: `Duration`, `Size` and `Rate` from strings with units, `Path`
relative to the config file, `Secret` and `Secrets` from the places that `relay.config.secrets` knows,
`Literal`, `tuple[X, ...]`, `dict[str, X]`, nested records, unions of forms (`str | tuple[str, ...]`),
`X | None`, plain values. `msgspec.Meta` adds bounds.
"""

import math
import os
import re
import types
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from relay.base.units import Rate, parse_duration, parse_rate, parse_size
from relay.config.document import Document
from relay.config.installed_service import Given
from relay.config.problems import KeyPath, Problem, faults_of, guess, kind_of, shown
from relay.config.secrets import Absent, Credential, Origin, Secret, Secrets, Url, digest

S = TypeVar("S", bound=msgspec.Struct)


class _Wrong:
    """Placeholder for an invalid value that has been reported."""


WRONG: Final = _Wrong()


class _Token(msgspec.Struct, frozen=True, kw_only=True):
    """The long form of a token in `Secrets`."""

    secret: Secret
    scopes: tuple[Annotated[str, msgspec.Meta(min_length=1)], ...] | None = None
    name: str = ""


@cache
def _fields_of(type_: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    """Return the fields of a record by their keys."""
    return {field.encode_name: field for field in msgspec.structs.fields(type_)}


class Binder:
    """Binds one document; collects `problems` and `warnings`."""

    def __init__(
        self, document: Document, given: Mapping[str, str] | Given, *, lenient: bool = False
    ) -> None:
        """Prepare.

        Args:
            document: the file.
            given: environment and credentials of the daemon; a mapping is its environment.
            lenient: accept missing secrets and files, for commands that do not need them; `absent` lists
                them.
        """
        if not isinstance(given, Given):
            given = Given(environ=given)
        self.document = document
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.absent: list[Problem] = []
        self.incomplete: dict[str, tuple[Any, frozenset[str]]] = {}  # see `relay.config.tables`
        self._lenient = lenient
        self.origin = Origin(
            environ=given.environ,
            folder=document.path.parent,
            development=document.data.get("development") is True,
            credentials=given.credentials,
            hidden=given.hidden,
            place=given.place,
            after=given.after,
            is_running=given.is_running,
            lenient=lenient,
        )

    def report(self, path: KeyPath, text: str) -> None:
        """Record a problem at the line of a key."""
        self.problems.append(self.document.problem(path, text))

    def warn(self, path: KeyPath, text: str) -> None:
        """Record something that is valid but probably a mistake."""
        self.warnings.append(self.document.problem(path, text))

    def struct(
        self,
        type_: type[S],
        table: Mapping[str, Any],
        path: KeyPath,
        *,
        given: Mapping[str, Any] | None = None,
        hidden: Collection[str] = (),
        others: Collection[str] = (),
    ) -> S | None:
        """Return a record of a type, or None after reporting its invalid values.

        Args:
            type_: the record; its field names are the keys.
            table: the TOML table.
            path: the key path of the table.
            given: values for absent keys, in place of the type's defaults.
            hidden: fields that cannot be written in TOML.
            others: further keys that the table may contain.

        Raises:
            Exception: the type's `__post_init__` raised it.
        """
        values = self.fields(type_, table, path, given=given, hidden=hidden, others=others)
        return None if WRONG in values.values() else type_(**values)

    def fields(
        self,
        type_: type[msgspec.Struct],
        table: Mapping[str, Any],
        path: KeyPath,
        *,
        given: Mapping[str, Any] | None = None,
        hidden: Collection[str] = (),
        others: Collection[str] = (),
    ) -> dict[str, Any]:
        """Return a record's values, `WRONG` where something was reported; arguments as in `struct`."""
        values = dict(given or {})
        fields = _fields_of(type_)
        keys = {key for key in fields if key not in hidden}
        known = keys.union(others)
        for key in table:
            if key not in known:
                advice = guess(key, known) or f"; known here: {', '.join(sorted(known))}"
                self.report((*path, key), f"unknown key{advice}")
        for key, field in fields.items():
            name = field.name  # of the attribute; a record may give its key another name
            if key in keys and key in table:
                values[name] = self.value(field.type, table[key], (*path, key), base=values.get(name))
                if field.required and isinstance(values[name], Secrets) and not values[name]:
                    self.report((*path, key), "an empty list refuses every request")
            elif field.required and name not in values:
                self.report((*path, key), "missing; it has no default")
                values[name] = WRONG
        return values

    def value(self, kind: Any, value: Any, path: KeyPath, *, base: Any = None) -> Any:
        """Return a value of a type, or `WRONG` after reporting why not; `base` completes a nested record."""
        try:
            result = self._convert(kind, value, path, base)
        except (ValueError, ExceptionGroup) as error:
            for key, text in faults_of(error):
                self.report((*path, *key), text)
            return WRONG
        if isinstance(result, Absent):
            self.absent.append(self.document.problem(path, result.why))
        return result

    def tables(self, key: str) -> dict[str, dict[str, Any]]:
        """Return the tables below a key by name, `[key.NAME]`; report values that are not tables."""
        value = self.document.data.get(key, {})
        if not isinstance(value, dict):
            self.report((key,), f"expected tables such as [{key}.NAME], got {kind_of(value)}")
            return {}
        for name, table in value.items():
            if not isinstance(table, dict):
                self.report((key, name), f"expected a table [{key}.{name}], got {kind_of(table)}")
        return {name: table for name, table in value.items() if isinstance(table, dict)}

    def _convert(self, kind: Any, value: Any, path: KeyPath, base: Any) -> Any:
        origin, args = get_origin(kind), get_args(kind)
        result: Any
        if origin is Annotated:
            result = self._annotated(args[0], args[1:], value, path, base)
        elif origin in (Union, types.UnionType):
            result = self._convert(_arm(args, value), value, path, base)
        elif origin is Literal:
            result = _one_of(args, value)
        elif origin is tuple and args[1:] == (...,):
            result = self._tuple(args[0], value, path)
        elif origin is dict:
            result = self._dict(args[0], args[1], value, path)
        else:
            result = self._plain(kind, value, path, base)
        return result

    def _plain(self, kind: Any, value: Any, path: KeyPath, base: Any) -> Any:
        if kind in SCALARS:
            result = SCALARS[kind](value)
            return self.origin.visible(self.origin.folder / result) if kind is Path else result
        if kind is Secret:
            return self.origin.secret(value)
        if kind is Url:
            return self.origin.url(value)
        if kind is Secrets:
            return self._secrets(value, path)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self._nested(kind, value, path, base)
        if kind is Any:
            return value
        raise ValueError(f"config.toml cannot express this type: {kind}")

    def _annotated(self, kind: Any, notes: tuple[Any, ...], value: Any, path: KeyPath, base: Any) -> Any:
        metas = [note for note in notes if isinstance(note, msgspec.Meta)]
        extra: dict[str, Any] = {}
        for meta in metas:
            extra |= meta.extra or {}
        if "unit" in extra:
            result = UNITS[extra["unit"]](value)
        elif kind is Secret:
            result = self.origin.secret(value, literal=extra.get("literal", False))
        else:
            result = self._convert(kind, value, path, base)
        if result is WRONG or isinstance(result, Absent):
            return result
        for meta in metas:
            within(meta, result)
        if "check" not in extra or (self._lenient and extra.get("reads")):
            return result
        return extra["check"](result)

    def _tuple(self, kind: Any, value: Any, path: KeyPath) -> Any:
        if not isinstance(value, list):
            raise ValueError(f"expected a list, got {kind_of(value)}")  # noqa: TRY004 - the caller reports values
        items = [self.value(kind, item, (*path, index)) for index, item in enumerate(value)]
        return WRONG if WRONG in items else tuple(items)

    def _dict(self, key_kind: Any, kind: Any, value: Any, path: KeyPath) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"expected a table, got {kind_of(value)}")  # noqa: TRY004 - the caller reports values
        items = {
            self.value(key_kind, key, (*path, key)): self.value(kind, item, (*path, key))
            for key, item in value.items()
        }
        return WRONG if WRONG in items or WRONG in items.values() else items

    def _nested(self, kind: type[msgspec.Struct], value: Any, path: KeyPath, base: Any) -> Any:
        given, table = msgspec.structs.asdict(base) if isinstance(base, kind) else None, value
        if (expand := getattr(kind, "expand", None)) is not None:  # a record with a short form
            table, given = expand(value)
        if not isinstance(table, dict):
            raise ValueError(f"expected a table, got {kind_of(value)}")  # noqa: TRY004 - the caller reports values
        found = len(self.problems), len(self.absent)
        record = self.struct(kind, table, path, given=given)
        if table is not value:  # the keys of the table are not in the file
            for problems, first in zip((self.problems, self.absent), found, strict=True):
                problems[first:] = [self.document.problem(path, each.problem) for each in problems[first:]]
        return WRONG if record is None else record

    def _secrets(self, value: Any, path: KeyPath) -> Any:
        if not isinstance(value, list):
            raise ValueError(f"expected a list of secrets, got {kind_of(value)}")  # noqa: TRY004 - as above
        items = [self._credential(item, (*path, index)) for index, item in enumerate(value)]
        return WRONG if WRONG in items else Secrets(*items)

    def _credential(self, value: Any, path: KeyPath) -> Any:
        long = isinstance(value, dict) and bool({"secret", "scopes", "name"} & value.keys())
        token = self.value(_Token if long else Secret, value, path)
        if token is WRONG:
            return WRONG
        if isinstance(token, Secret):
            token = _Token(secret=token)
        if isinstance(token.secret, Absent):
            return Credential(digest=os.urandom(32), name=token.name)  # no token has this digest
        # Presented tokens are trimmed (relay.source), so one with spaces around it could never match.
        return Credential(
            digest=digest(token.secret.reveal().strip().encode()),
            name=token.name or token.secret.name,
            usage=token.secret.usage,
            scopes=None if token.scopes is None else frozenset(token.scopes),
        )


def _arm(kinds: tuple[Any, ...], value: Any) -> Any:
    """Return the type in a union that fits a table, a list or a single value; if none fits, the first one."""
    arms = [kind for kind in kinds if kind is not types.NoneType]
    form = type(value) if isinstance(value, dict | list) else None
    return next((arm for arm in arms if _form(arm) is form), arms[0])


def _form(kind: Any) -> type | None:
    """Return how a type is written in TOML: dict, list, or None for a single value."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _form(get_args(kind)[0])
    if origin is tuple or kind is Secrets:
        return list
    return dict if origin is dict or (isinstance(kind, type) and issubclass(kind, msgspec.Struct)) else None


def _one_of(choices: tuple[Any, ...], value: Any) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return value
    *rest, last = (f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices)
    listed = f"{', '.join(rest)} or {last}" if rest else last
    raise ValueError(f"expected {listed}, got {shown(value)}")


T = TypeVar("T")
_LARGEST = 2**63 - 1
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _of(kind: type, value: Any, wanted: str) -> Any:
    if type(value) is not kind:  # bool is an int to Python, not to an operator
        raise ValueError(f"expected {wanted}, got {shown(value)}")
    return value


def _bool(value: Any) -> bool:
    return bool(_of(bool, value, "true or false"))


def _int(value: Any) -> int:
    return int(_of(int, value, "a whole number"))


def _float(value: Any) -> float:
    number = float(value) if type(value) is int and abs(value) <= _LARGEST else value
    if not math.isfinite(_of(float, number, "a number")):
        raise ValueError(f"expected a finite number, got {shown(value)}")
    return float(number)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a string, got {kind_of(value)}")  # noqa: TRY004 - the binder reports values
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value or _CONTROL.search(value):
        raise ValueError(f"expected a path, got {shown(value)}")
    return Path(value)


def _duration(value: Any) -> float:
    if type(value) in (int, float):
        raise ValueError(f'expected a duration such as "{shown(value)}s", got {shown(value)}')
    return _unit(parse_duration, value, "a duration", "90s")


def _size(value: Any) -> int:
    return _unit(parse_size, value, "a size", "2 MiB")


def _rate(value: Any) -> Rate:
    return _unit(parse_rate, value, "a rate", "50/s")


def _unit(parse: Callable[[str], T], value: Any, wanted: str, example: str) -> T:
    try:
        if isinstance(value, str):
            return parse(value)
    except ValueError as error:
        if not str(error).startswith("expected"):
            raise ValueError(f"{error}: {shown(value)}") from None
    raise ValueError(f'expected {wanted} such as "{example}", got {shown(value)}')


def within(meta: msgspec.Meta, value: Any) -> None:
    """Check the bounds of one `Meta`.

    Raises:
        ValueError: the value is outside; the message contains only numbers, never text.
    """
    if meta.ge is not None and not value >= meta.ge:
        raise ValueError(f"must be at least {meta.ge}, got {shown(value)}")
    if meta.gt is not None and not value > meta.gt:
        raise ValueError(f"must be more than {meta.gt}")
    if meta.le is not None and not value <= meta.le:
        raise ValueError(f"must be at most {meta.le}, got {shown(value)}")
    if meta.lt is not None and not value < meta.lt:
        raise ValueError(f"must be less than {meta.lt}, got {shown(value)}")
    if meta.multiple_of is not None and value % meta.multiple_of:
        raise ValueError(f"must be a multiple of {meta.multiple_of}, got {shown(value)}")
    # A `$` of a plugin's pattern matches before a line break at the end as well; not before one of two.
    ends = (value, f"{value}\n") if meta.pattern is not None and value.endswith("\n") else (value,)
    if meta.pattern is not None and not all(re.search(meta.pattern, each) for each in ends):
        raise ValueError(f"must match {meta.pattern}")
    if meta.min_length is not None and len(value) < meta.min_length:
        least = f"have at least {meta.min_length} entries or characters"
        raise ValueError("must not be empty" if meta.min_length == 1 else f"must {least}")
    if meta.max_length is not None and len(value) > meta.max_length:
        raise ValueError(f"must have at most {meta.max_length} entries or characters")


SCALARS: Mapping[type, Callable[[Any], Any]] = {
    bool: _bool, int: _int, float: _float, str: _str, Path: _path, Rate: _rate,
}  # fmt: skip
"""Readers by type; each raises ValueError with a sentence."""

UNITS: Mapping[str, Callable[[Any], Any]] = {"duration": _duration, "size": _size}
"""Readers by the unit that `relay.units` puts on a number."""
