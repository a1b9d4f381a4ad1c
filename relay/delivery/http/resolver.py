"""Name look-ups that hold up nobody else, not even the end of the process."""

import asyncio
import errno
import socket
import threading
from contextlib import suppress

from aiohttp.abc import AbstractResolver, ResolveResult

_LITERAL = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
_Found = asyncio.Future[list[ResolveResult]]
_Info = tuple[
    socket.AddressFamily,
    socket.SocketKind,
    int,
    str,
    tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes],
]


class Resolver(AbstractResolver):
    """The system's resolver, on a thread of its own per look-up.

    `getaddrinfo` can hang for half a minute and cannot be cancelled: in a shared pool, 12 dead names
    held every other thread job for 18 s; in any `concurrent.futures` pool they would also hold the
    exit of the process, which joins those threads. aiohttp joins concurrent look-ups of one name, so
    a destination has one such thread at a time.
    """

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Look a name up.

        Raises:
            OSError: it has no address, or the resolver failed.
        """
        found: _Found = asyncio.get_running_loop().create_future()
        look_up = (found, host, port, family)
        try:
            threading.Thread(target=_look_up, args=look_up, name=f"dns {host}", daemon=True).start()
        except RuntimeError as error:  # the limit of threads, or of memory
            raise OSError(errno.ENOMEM, str(error)) from error
        return await found

    async def close(self) -> None:
        """Do nothing: a look-up still under way ends on its own and is forgotten."""


def _look_up(found: _Found, host: str, port: int, family: socket.AddressFamily) -> None:
    results: list[ResolveResult] = []
    failure: OSError | None = None
    try:
        infos = socket.getaddrinfo(
            host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
        results = [_result(host, info) for info in infos]
    except OSError as error:
        failure = error
    except UnicodeError as error:  # a label that IDNA cannot encode
        failure = OSError(f"not a host name: {error}")
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        found.get_loop().call_soon_threadsafe(_settle, found, results, failure)


def _settle(found: _Found, results: list[ResolveResult], failure: OSError | None) -> None:
    if found.done():  # cancelled: the client was closed meanwhile
        return
    if failure is None:
        found.set_result(results)
    else:
        found.set_exception(failure)


def _result(host: str, info: _Info) -> ResolveResult:
    family, _, proto, _, address = info
    literal, port = str(address[0]), int(address[1])
    if len(address) == 4 and address[3]:  # noqa: PLR2004 - a link-local one needs its zone
        literal = f"{literal}%{address[3]}"
    return ResolveResult(hostname=host, host=literal, port=port, family=family, proto=proto, flags=_LITERAL)
