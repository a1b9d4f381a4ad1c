"""The HTTP client that deliveries go out with: whatever a receiver does becomes an `Answer`."""

import asyncio
import errno
import socket
import time
from collections.abc import Collection, Mapping
from contextvars import ContextVar

from aiohttp import (
    ClientConnectionResetError,
    ClientConnectorDNSError,
    ClientConnectorError,
    ClientError,
    ClientOSError,
    ConnectionTimeoutError,
    ServerDisconnectedError,
)
from aiohttp.abc import AbstractResolver
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from relay.base.units import render_duration
from relay.config.schema import DestinationConfig
from relay.delivery.http.connector import AddressInfo, open_connector, tls_of
from relay.delivery.http.exchange import Exchange
from relay.delivery.http.proxy import Proxy
from relay.delivery.http.resolver import Resolver
from relay.delivery.http.response import Reply
from relay.delivery.http.result import Answer, of_failure, of_status, one_line
from relay.delivery.http.ssrf import Blocked, refused
from relay.delivery.http.timings import Times
from relay.model import AttemptResult
from relay.process.descriptors import LACK

MAX_AGE = 60.0
"""Seconds that a connection is used: a destination whose name moves is followed, however busy it is."""

DISTRUST = 600.0
"""Seconds without kept connections after a receiver sent more than it had announced.

What comes late would be taken for the answer to the next request.
"""

_STEERING = ("retry-after", "webhook-delivery")  # the headers that a delivery's fate may hang on
_STEERING_LIMIT = 200  # characters; a date needs 29

_course: ContextVar["_Course"] = ContextVar("course")
"""How the attempt at hand goes."""

_times: ContextVar[Times | None] = ContextVar("times", default=None)
"""What the attempt at hand notes its steps in, where somebody wants to know."""


class LackError(Exception):
    """This machine had no descriptor or memory left for an attempt: it says nothing of the receiver."""

    def __init__(self, number: int | None) -> None:
        self.what = "out of file descriptors" if number in (errno.EMFILE, errno.ENFILE) else "out of memory"
        super().__init__(f"this machine is {self.what}")


class _Course:
    """How one attempt goes."""

    __slots__ = ("dialled", "lack", "reply")

    def __init__(self) -> None:
        self.dialled: list[str] = []  # addresses; none: it got a kept-alive connection
        self.lack: OSError | None = None  # why no socket could be made
        self.reply = Reply()


class Client:
    """One destination's way out: its own pool, resolver, timeouts and trust.

    To be built inside the running loop, and closed when nothing is being sent any more.

    Args:
        destination: its method, timeouts, `allow_private`, `ca_file`, `client_cert` and `proxy` are used.
        own: the relay's own listeners, as (address, port); never dialled.
        resolver: stands in for the system's.

    Raises:
        RelayError: a certificate's file cannot be read or used.
    """

    def __init__(
        self,
        destination: DestinationConfig,
        *,
        own: Collection[tuple[str, int]] = (),
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._method = destination.method
        self._timeout = destination.timeout
        self._connect_timeout = destination.connect_timeout
        self._allow_private = destination.allow_private
        self._own = tuple(own)
        self._proxy = None
        if destination.proxy is not None:
            self._proxy = Proxy(destination.proxy, allow_private=self._allow_private, own=self._own)
        tls, names = tls_of(destination), resolver or Resolver()
        self._exchange = Exchange(destination.method, destination.connect_timeout, self._proxy)
        self._pooled, self._fresh = (
            open_connector(sockets=self._socket, resolver=names, tls=tls, keep=keep, unasked=self._distrust)
            for keep in (True, False)
        )
        self._renewed = 0.0  # no connection made before is used (perf_counter)
        self._distrusted_until = 0.0  # no connection is kept before (perf_counter)

    async def send(
        self, url: str | URL, headers: Mapping[str, str], body: bytes, times: Times | None = None
    ) -> Answer:
        """Send one request and say what came of it; a receiver can make this raise nothing.

        The total timeout spans look-up, connect, handshake, upload and answer. A status once received
        decides the result, even where the body then breaks off or stalls.

        Args:
            url: where to; a string goes out as written (a `%2F` in its query stays one).
            headers: content type, signatures and what the destination wants besides.
            body: the bytes that were signed.
            times: filled in, on a connection of the request's own, so that every step is made.

        Raises:
            ValueError: a header holds a line break.
            LackError: this machine has run out of descriptors or memory; nothing was sent.
        """
        started = time.perf_counter()
        course = _Course()
        _course.set(course)
        failure: Exception | None = None
        try:
            async with asyncio.timeout(self._timeout):
                if times is None:
                    await self._request(url, headers, body, course, started)
                else:
                    times.began = started
                    await self._request_anew(url, headers, body, course, times)
        except (ClientError, HttpProcessingError, OSError) as error:
            failure = error.with_traceback(None)  # aiohttp's frames and this one hold it: a cycle
        duration_ms = (time.perf_counter() - started) * 1000
        reply = course.reply
        try:
            if reply.status is None:
                return self._failed(failure, course, duration_ms)
            return Answer(
                result=of_status(reply.status),
                status=reply.status,
                error=self._remark(reply, failure),
                headers=_steering(reply),
                body=bytes(reply.body),
                truncated=not reply.whole,
                duration_ms=duration_ms,
            )
        finally:
            failure = None  # the traceback of its cause holds this frame: a cycle that keeps the body

    def renew(self) -> None:
        """Look names up again, and use no connection any more that was made before."""
        self._renewed = time.perf_counter()
        for connector in (self._pooled, self._fresh):
            connector.clear_dns_cache()

    async def close(self) -> None:
        """Close every connection; requests under way end as failures."""
        await self._pooled.close()
        await self._fresh.close()

    async def _request(
        self, url: str | URL, headers: Mapping[str, str], body: bytes, course: _Course, started: float
    ) -> None:
        """Get an answer; when a kept-alive connection had died meanwhile, ask once more.

        Receivers close idle connections at the very moment of a send: without this, 20 of 40 POSTs
        failed. The second try has a connection of its own, so it cannot meet the same fate. The same
        goes for one that carries what a receiver has sent behind its answer before.
        """
        oldest = max(self._renewed, started - MAX_AGE)
        if started >= self._distrusted_until:
            try:
                await self._exchange.ask(self._pooled, url, headers, body, course.reply, oldest=oldest)
            except ClientConnectorError:
                raise
            except (ClientOSError, ClientConnectionResetError, ServerDisconnectedError):
                if course.dialled or course.reply.has_begun:
                    raise
            except HttpProcessingError:
                if course.dialled or not course.reply.is_garbage:
                    raise
                self._distrust()
            else:
                if course.reply.excess:
                    self._distrust()
                return
            course.reply = Reply()
        await self._exchange.ask(self._fresh, url, headers, body, course.reply, oldest=oldest)

    async def _request_anew(
        self, url: str | URL, headers: Mapping[str, str], body: bytes, course: _Course, times: Times
    ) -> None:
        """Get an answer over a new connection, its name looked up anew, and note when each step was done."""
        _times.set(times)
        self._fresh.clear_dns_cache()
        try:
            await self._exchange.ask(self._fresh, url, headers, body, course.reply, oldest=0.0, times=times)
        finally:
            _times.set(None)

    def _distrust(self) -> None:
        """Keep no connection for a while."""
        self._distrusted_until = time.perf_counter() + DISTRUST

    def _socket(self, info: AddressInfo) -> socket.socket:
        """Make the socket of one connect, unless the guard refuses its address."""
        family, kind, protocol, _, address = info
        host, port = str(address[0]), int(address[1])
        course = _course.get()
        try:
            reason = refused(host, port, allow_private=self._allow_private, own=self._own)
            made = socket.socket(family, kind, protocol) if reason is None else None
        except OSError as error:
            course.lack = error
            raise
        if made is None:
            raise Blocked(reason or "")
        course.dialled.append(host)
        if (times := _times.get()) is not None:
            times.dialled = times.dialled or time.perf_counter()
        return made

    def _failed(self, failure: Exception | None, course: _Course, duration_ms: float) -> Answer:
        """Say why there is no answer.

        Raises:
            LackError: the failure is this machine's own.
        """
        if isinstance(failure, ClientConnectorError):
            for connector in (self._pooled, self._fresh):  # the name may lead elsewhere by now
                connector.clear_dns_cache()
        lack = _lack(failure, course)
        if lack is not None:
            raise LackError(lack) from failure
        result, text = self._name(failure, course.dialled)
        return Answer(result=result, error=one_line(text), duration_ms=duration_ms)

    def _name(self, failure: Exception | None, dialled: list[str]) -> tuple[AttemptResult, str]:
        """Name a failure without an answer."""
        result: AttemptResult
        if isinstance(failure, ConnectionTimeoutError):
            limit = render_duration(self._connect_timeout)
            if not dialled:
                result, text = "dns", f"the name was not resolved within {limit}"
            else:  # of a proxy, what was dialled may well have taken the connection
                peer = "" if self._proxy else f" to {', '.join(dialled)}"
                result, text = "timeout", f"no connection{peer} within {limit}"
        elif failure is None or isinstance(failure, TimeoutError):
            result, text = "timeout", f"no answer within {render_duration(self._timeout)}"
        else:
            result, text = of_failure(failure)
        return result, text if self._proxy is None else f"through the proxy {self._proxy.name}: {text}"

    def _remark(self, reply: Reply, failure: Exception | None) -> str | None:
        """Say what the operator should know of an answer; None when all is well."""
        status = reply.status or 0
        result, trouble = of_status(status), ""
        if reply.trouble is not None:
            trouble = f"; {reply.trouble}"
        elif not reply.is_over and failure is not None:
            trouble = f"; its body was not complete within {render_duration(self._timeout)}"
        if result == "ok" and not trouble:
            return None
        line = f"HTTP {status} {reply.reason}".rstrip()
        if result == "3xx":
            line += f" to {reply.headers.get('location', 'nowhere')}: redirects are never followed"
        return one_line(line + trouble)


def _lack(failure: Exception | None, course: _Course) -> int | None:
    """Return the error number of what this machine had run out of in a failed attempt; None: of nothing."""
    if not isinstance(failure, ClientConnectorError):
        return None
    number = course.lack.errno if course.lack is not None else failure.os_error.errno
    if number not in LACK and isinstance(failure, ClientConnectorDNSError):
        # Without a descriptor the C library cannot read its files, and says that there is no such name.
        try:
            socket.socket().close()
        except OSError as error:
            number = error.errno
    return number if number in LACK else None


def _steering(reply: Reply) -> dict[str, str]:
    """Pick the headers that steer deliveries, where their values are plain ASCII of sane length."""
    found = {}
    for name in _STEERING:
        value = reply.headers.get(name)
        if value is not None and len(value) <= _STEERING_LIMIT and value.isascii() and value.isprintable():
            found[name] = value
    return found
