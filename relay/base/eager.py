"""Coroutines that begin at once, as in Python 3.12: what never waits needs no task, no turn of the loop."""

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any


def begin(coroutine: Coroutine[Any, Any, object]) -> asyncio.Task[None] | None:
    """Run a coroutine up to where it first waits; return a task for the rest, None if there is none.

    Up to there it is in no task: it must not ask for the current one, as `asyncio.timeout` does.
    """
    try:
        awaited = coroutine.send(None)
    except StopIteration:
        return None
    rest = _go_on(coroutine, awaited)
    rest.send(None)  # into its `try`: a task that is cancelled before its first turn throws it there
    return asyncio.get_running_loop().create_task(rest)


async def _go_on(coroutine: Coroutine[Any, Any, object], awaited: Any) -> None:
    await _rest(coroutine, awaited)


@types.coroutine
def _rest(coroutine: Coroutine[Any, Any, object], awaited: Any) -> Generator[Any, None, None]:
    """Wait for what the coroutine waits for, in its stead, until it ends."""
    try:
        try:
            yield  # to `begin`
        except BaseException as error:  # noqa: BLE001 - thrown into it, as a cancellation is: its own affair
            awaited = coroutine.throw(error)
        while True:
            try:
                yield awaited
            except BaseException as error:  # noqa: BLE001 - likewise
                awaited = coroutine.throw(error)
            else:
                awaited = coroutine.send(None)
    except StopIteration:
        return
