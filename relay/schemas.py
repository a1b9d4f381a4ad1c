"""JSON Schemas of events' data: read at load, checked before an event is stored."""

import re
from collections.abc import Mapping
from fnmatch import translate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from relay.base.json_text import read
from relay.errors import Invalid

if TYPE_CHECKING:
    from jsonschema.protocols import Validator
    from referencing import Resource

_LONGEST_ISSUE = 300
_WILD = frozenset("*?[")


class Schemas:
    """The schemas of one source, by event type without its name, or by shell-style pattern."""

    def __init__(self, paths: Mapping[str, Path], field: str = "data") -> None:
        """Read the schemas.

        Args:
            paths: files by type or pattern.
            field: name of the checked value in the sender's words, for refusals.

        Raises:
            ValueError: as `compile_schema`.
        """
        self._field = field
        self._exact: dict[str, Validator] = {}
        self._patterns: list[tuple[re.Pattern[str], Validator]] = []
        for type_, path in paths.items():
            validator = compile_schema(path)
            if _WILD & set(type_):
                self._patterns.append((re.compile(translate(type_)), validator))
            else:
                self._exact[type_] = validator

    def check(self, type_: str, data: bytes) -> None:
        """Check an event's data (JSON) by the schema of its type, else of the first pattern that fits.

        Raises:
            Invalid: it does not satisfy the schema; names the path, such as `data.items[1].quantity`.
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


def compile_schema(path: Path) -> "Validator":
    """Read a JSON Schema (draft of its `$schema`, else 2020-12); it may contain references to itself only.

    Raises:
        ValueError: the file cannot be read or is no such schema, or `jsonschema` is not installed.
    """
    try:
        from jsonschema import SchemaError, validators  # noqa: PLC0415 - an optional extra
        from referencing import Registry, Resource  # noqa: PLC0415 - comes with jsonschema
        from referencing.exceptions import Unresolvable  # noqa: PLC0415 - likewise
        from referencing.jsonschema import DRAFT202012  # noqa: PLC0415 - likewise
    except ImportError:
        raise ValueError('schemas need jsonschema: pip install "hookferry[schemas]"') from None
    try:
        schema = msgspec.json.decode(path.read_bytes(), type=dict)
        kind = validators.validator_for(schema, default=validators.Draft202012Validator)
        kind.check_schema(schema)
        resource = Resource.from_contents(schema, default_specification=DRAFT202012)
        registry: Registry[Any] = Registry()  # empty: nothing is fetched from the network
        _follow(resource, registry.resolver_with_root(resource))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON object: {error}") from None
    except SchemaError as error:
        raise ValueError(f"{path}: no JSON Schema: {error.json_path}: {error.message}") from None
    except Unresolvable as error:
        raise ValueError(f"{path}: $ref leads nowhere: {error.ref}") from None
    validator: Validator = kind(schema, registry=registry)
    return validator


def _follow(resource: "Resource[Any]", resolver: Any) -> None:
    """Resolve every reference once, so that a dangling reference fails at start."""
    if isinstance(resource.contents, dict) and "$ref" in resource.contents:
        resolver.lookup(resource.contents["$ref"])
    for part in resource.subresources():
        _follow(part, resolver.in_subresource(part))
