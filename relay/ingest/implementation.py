"""The two implementations of the public listener, and the choice between them.

This module imports neither of them, so that `relay check-config` can name the choice without aiohttp.
"""

import re
from functools import cache
from importlib.metadata import version
from typing import Literal

Implementation = Literal["fast", "aiohttp"]

TESTED = ("3.14.4", "3.15")
"""Versions of aiohttp that the fast listener is tested with: from the first, up to but without the second.

The fast listener drives aiohttp's HTTP parser itself. aiohttp exports its parser without documenting it, so
a minor release may change it. `relay/ingest/reference.py` uses aiohttp's server and works with any 3.x.
"""


def is_tested(aiohttp: str) -> bool:
    """Return whether the fast listener is tested with this version of aiohttp."""
    return _numbers(TESTED[0]) <= _numbers(aiohttp) < _numbers(TESTED[1])


def implementation_of(wanted: Implementation, aiohttp: str | None = None) -> tuple[Implementation, str]:
    """Return the implementation that the relay uses, and a warning if it is not the wanted one.

    Args:
        wanted: `[server] implementation` of config.toml.
        aiohttp: a version of aiohttp; by default the installed one.
    """
    installed = _installed() if aiohttp is None else aiohttp
    if wanted == "aiohttp" or is_tested(installed):
        return wanted, ""
    return "aiohttp", (
        f"the fast listener is not tested with aiohttp {installed}; the relay uses the listener"
        f' "aiohttp", which needs more CPU. Install aiohttp>={TESTED[0]},<{TESTED[1]} or a newer hookferry'
    )


@cache
def _installed() -> str:
    return version("aiohttp")


def _numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a version; a pre-release counts as its release."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()
