"""Work in threads that block neither the event loop nor the exit of the process."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(name: str, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    """Start a function in a new thread; return a future for its result.

    Work that may hang needs this: the process waits for the threads of a pool before it exits, but not for a
    daemon thread. If the future is cancelled, the function continues and its result is ignored.

    Raises:
        RuntimeError: the system cannot start another thread.
    """
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    threading.Thread(target=_run, args=(future, work, args), name=name, daemon=True).start()
    return future


def _run(future: asyncio.Future[T], work: Callable[..., T], args: tuple[Any, ...]) -> None:
    try:
        _report(future, future.set_result, work(*args))
    except BaseException as error:  # noqa: BLE001 - the future passes it on
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            _report(future, future.set_exception, error)
        else:  # SystemExit would end the event loop; a future refuses StopIteration
            failure = RuntimeError(f"the work of a thread ended with {error!r}")
            failure.__cause__ = error
            _report(future, future.set_exception, failure)
            del failure
    finally:
        del future  # it has the failure, which refers to this frame: the cycle would keep `args`


def _report(future: asyncio.Future[T], settle: Callable[[Any], None], outcome: T | BaseException) -> None:
    with suppress(RuntimeError):  # the loop is closed
        future.get_loop().call_soon_threadsafe(_settle, future, settle, outcome)


def _settle(future: asyncio.Future[T], settle: Callable[[Any], None], outcome: T | BaseException) -> None:
    if not future.done():  # cancelled, because nobody waits any more
        settle(outcome)
