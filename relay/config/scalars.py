"""How single TOML values are read, and the bounds that `msgspec.Meta` sets for them."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from relay.base.units import Rate, parse_duration, parse_rate, parse_size
from relay.config.problems import kind_of, shown

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
        ValueError: the value is outside; the message holds numbers only, never text.
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
