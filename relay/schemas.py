"""JSON Schemas of events' data: read at load, checked before an event is stored."""

import re
from collections.abc import Hashable, Iterator
from fnmatch import translate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from relay.base.json_text import read
from relay.errors import Invalid, installing

if TYPE_CHECKING:
    from jsonschema import ValidationError
    from jsonschema.protocols import Validator
    from referencing import Resource

MOST_MEMBERS = 2000
"""Members of a list or object that a schema with `unevaluatedItems` or `unevaluatedProperties` checks."""

_LONGEST_ISSUE = 300
_WILD = frozenset("*?[")


class Schemas:
    """The schemas of one source, by event type without the source's name, or by shell-style pattern.

    Two `Schemas` are equal if their files had the same content, so that a reload notices a changed file.
    """

    def __init__(self, field: str = "data") -> None:
        """Begin without schemas; `field` is the name of the checked value in the sender's words."""
        self._field = field
        self._texts: dict[str, bytes] = {}
        self._exact: dict[str, Validator] = {}
        self._patterns: list[tuple[re.Pattern[str], Validator]] = []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schemas) and self._texts == other._texts

    def __hash__(self) -> int:
        return hash(tuple(self._texts))

    def add(self, type_: str, path: Path) -> None:
        """Read the schema of a type or pattern; the first matching pattern counts.

        Raises:
            ValueError: as `compile_schema`; or the file cannot be read.
        """
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        try:
            validator = compile_schema(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self._texts[type_] = text
        if _WILD & set(type_):
            self._patterns.append((re.compile(translate(type_)), validator))
        else:
            self._exact[type_] = validator

    def check(self, type_: str, data: bytes) -> None:
        """Check an event's data (JSON) by the schema of its type, else of the first matching pattern.

        Raises:
            Invalid: the data does not satisfy the schema; names the path, such as `data.items[1].quantity`.
        """
        validator = self._exact.get(type_) or next((v for p, v in self._patterns if p.match(type_)), None)
        if validator is None:
            return
        try:
            error = next(validator.iter_errors(read(data, exact=True)), None)
        except (ValueError, RecursionError):  # numbers beyond any float, thousands of levels
            raise Invalid(field=self._field, issue="too deep or too large to check") from None
        if error is not None:
            where = f"{self._field}{error.json_path.removeprefix('$')}"
            raise Invalid(field=where[:_LONGEST_ISSUE], issue=error.message[:_LONGEST_ISSUE])


def compile_schema(text: bytes) -> "Validator":
    """Compile a JSON Schema (draft of its `$schema`, else 2020-12); references may only point into itself.

    Raises:
        ValueError: the text is not a valid schema, or `jsonschema` is not installed.
    """
    try:
        from jsonschema import SchemaError, validators  # noqa: PLC0415 - an optional extra
        from referencing import Registry  # noqa: PLC0415 - of jsonschema
        from referencing.exceptions import Unresolvable  # noqa: PLC0415 - of jsonschema
        from referencing.jsonschema import DRAFT202012, specification_with  # noqa: PLC0415 - of jsonschema
    except ImportError:
        raise ValueError(f"schemas need the package jsonschema: {installing('jsonschema')}") from None
    try:
        schema = msgspec.json.decode(text, type=dict)
        kind = validators.validator_for(schema, default=validators.Draft202012Validator)
        kind.check_schema(schema)
        draft = schema.pop("$schema", "")  # the library would use its own class for a `$ref` to the root
        resource = specification_with(draft, default=DRAFT202012).create_resource(schema)
        registry: Registry[Any] = Registry()  # empty: nothing is fetched from the network
        _follow(resource, registry.resolver_with_root(resource))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a JSON object: {error}") from None
    except SchemaError as error:
        raise ValueError(f"not a JSON Schema: {error.json_path}: {error.message}") from None
    except Unresolvable as error:
        raise ValueError(
            f"the target of $ref does not exist: {getattr(error, 'anchor', error.ref)}"
        ) from None
    keywords = {"uniqueItems": _check_unique}
    for name in ("unevaluatedItems", "unevaluatedProperties"):
        if name in kind.VALIDATORS:
            keywords[name] = _limited(kind.VALIDATORS[name])
    faster = validators.extend(kind, keywords)  # type: ignore[no-untyped-call]  # no types
    validator: Validator = faster(schema, registry=registry)
    return validator


def _check_unique(
    validator: "Validator", is_wanted: object, instance: Any, _: object
) -> "Iterator[ValidationError]":
    """Check `uniqueItems` in linear time; jsonschema's own check takes 16 s for 3,000 objects."""
    from jsonschema import ValidationError  # noqa: PLC0415 - an optional extra

    if is_wanted and validator.is_type(instance, "array"):
        seen = set()
        for item in instance:
            identity = _identity(item)
            if identity in seen:
                yield ValidationError(f"{instance!r} has non-unique elements")
                return
            seen.add(identity)


def _limited(check: Any) -> Any:
    """Return the check of a keyword for which jsonschema's time grows with the square of the members."""

    def limited(
        validator: "Validator", wanted: object, instance: Any, schema: Any
    ) -> "Iterator[ValidationError]":
        if isinstance(instance, dict | list) and len(instance) > MOST_MEMBERS:
            raise ValueError(f"more than {MOST_MEMBERS} members")
        yield from check(validator, wanted, instance, schema)

    return limited


def _identity(value: Any) -> Hashable:
    """Return a key that is equal for equal JSON values: 1 equals 1.0, but not true."""
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, list):
        return "array", tuple(map(_identity, value))
    if isinstance(value, dict):
        return "object", frozenset((name, _identity(part)) for name, part in value.items())
    return value  # type: ignore[no-any-return]  # text, a number or null


def _follow(resource: "Resource[Any]", resolver: Any) -> None:
    """Resolve every reference once, so that a dangling reference fails at start."""
    for name in ("$ref", "$dynamicRef"):
        if isinstance(resource.contents, dict) and name in resource.contents:
            resolver.lookup(resource.contents[name])
    for part in resource.subresources():
        _follow(part, resolver.in_subresource(part))
