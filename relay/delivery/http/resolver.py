"""Name look-ups that block neither other work nor the end of the process."""

import errno
import socket

from aiohttp.abc import AbstractResolver, ResolveResult

from relay.base.threads import in_thread

_LITERAL = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
_Info = tuple[
    socket.AddressFamily,
    socket.SocketKind,
    int,
    str,
    tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes],
]


class Resolver(AbstractResolver):
    """The system's resolver, with a separate thread for each look-up.

    `getaddrinfo` can hang for half a minute and cannot be cancelled. In a shared thread pool, 12 dead names
    blocked all other jobs for 18 s; in a `concurrent.futures` pool they would also block the exit of the
    process, which joins those threads. aiohttp combines concurrent look-ups of one name, so a destination has
    one such thread at a time.
    """

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of a name.

        Raises:
            OSError: the name has no address, or the resolver failed.
        """
        try:
            found = in_thread(f"dns {host}", _look_up, host, port, family)
        except RuntimeError as error:  # no more threads, or no more memory
            raise OSError(errno.ENOMEM, str(error)) from error
        return await found

    async def close(self) -> None:
        """Do nothing: the result of a look-up that is still running is ignored."""


def _look_up(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    kind, flags = socket.SOCK_STREAM, socket.AI_ADDRCONFIG
    try:
        infos = socket.getaddrinfo(host, port, family=family, type=kind, flags=flags)
    except UnicodeError as error:  # IDNA cannot encode a label
        raise OSError(f"not a host name: {error}") from error
    return [_result(host, info) for info in infos]


def _result(host: str, info: _Info) -> ResolveResult:
    family, _, proto, _, address = info
    literal, port = str(address[0]), int(address[1])
    if len(address) == 4 and address[3]:  # noqa: PLR2004 - a link-local address needs its zone
        literal = f"{literal}%{address[3]}"
    return ResolveResult(hostname=host, host=literal, port=port, family=family, proto=proto, flags=_LITERAL)
