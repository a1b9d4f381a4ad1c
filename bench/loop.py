"""The event loop of all benchmarks: uvloop if it is installed, as in `relay serve`."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with suppress(ImportError):
        from uvloop import new_event_loop as loop_factory  # noqa: PLC0415 - optional
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)
