"""The HTTP client of one destination: every behaviour of a receiver becomes an `HttpResult`."""

import asyncio
import errno
import socket
import ssl
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, cast

import msgspec
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

from relay.base.clock import SECOND
from relay.base.units import render_duration
from relay.config.schema import DestinationConfig
from relay.delivery.http.connector import AddressInfo, open_connector, tls_of
from relay.delivery.http.exchange import Exchange
from relay.delivery.http.proxy import Proxy
from relay.delivery.http.resolver import Resolver
from relay.delivery.http.response import ResponseParser
from relay.delivery.http.result import HttpResult, Timing, of_failure, of_status, one_line
from relay.delivery.http.ssrf import Blocked, refused
from relay.model import AttemptResult
from relay.process.descriptors import LACK

MAX_AGE = 60.0
"""Seconds that a connection is used. A busy connection, too, must follow a name that moves."""

DISTRUST = 600.0
"""Seconds without kept connections after a receiver sent more bytes than it announced.

Bytes that arrive late would be read as the response to the next request.
"""

DELIVERY_HEADERS = ("retry-after", "webhook-delivery")
"""Response headers that change the outcome of a delivery."""

_HEADER_LIMIT = 200  # characters of such a header; a date needs 29

_current: ContextVar["_Request"] = ContextVar("current")
"""The request that this task makes: `HttpClient._socket` is called without it."""


class OutOfResourcesError(Exception):
    """This machine has no descriptor or memory left for a request; not a fault of the receiver."""

    def __init__(self, number: int | None) -> None:
        self.what = "out of file descriptors" if number in (errno.EMFILE, errno.ENFILE) else "out of memory"
        super().__init__(f"this machine is {self.what}")


class Certificate(msgspec.Struct, frozen=True):
    """The period for which a receiver's certificate is valid, by the wall clock."""

    begins: int
    ends: int

    @property
    def renewal_overdue(self) -> int:
        """When it should have been renewed: a quarter of the period before its end, at most 14 days.

        Authorities ask for a renewal when a third of the period is left; some periods last six days.
        """
        return self.ends - min((self.ends - self.begins) // 4, 14 * 86_400 * SECOND)


class _Request(msgspec.Struct):
    """The facts that are known about a request so far."""

    timing: Timing | None
    parser: ResponseParser
    dialled: tuple[str, ...] = ()  # addresses; empty: it uses a kept connection
    is_late: bool = False  # its timeout has expired
    socket_error: OSError | None = None  # why no socket could be made

    def stop(self, task: "asyncio.Task[Any]") -> None:
        """Cancel the task that makes the request, because its timeout has expired."""
        self.is_late = True
        task.cancel()


class HttpClient:
    """One destination's connections, resolver, timeouts and trusted certificates.

    Create it inside the running loop, and close it when no request is in flight.

    Args:
        destination: uses its method, timeouts, `allow_private`, `ca_file`, `client_cert` and `proxy`; results
            contain no part of its URL if that is a secret.
        own: the relay's listeners as (address, port), to which the client never connects.
        resolver: replaces the system's resolver.

    Raises:
        RelayError: a certificate file cannot be read or used.
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
        self._secret_url = destination.url if destination.url.is_hidden else None
        self._proxy = None
        if destination.proxy is not None:
            self._proxy = Proxy(destination.proxy, allow_private=self._allow_private, own=self._own)
        tls, names = tls_of(destination), resolver or Resolver()
        self._exchange = Exchange(destination.method, destination.connect_timeout, self._proxy)
        self._pooled, self._fresh = (
            open_connector(
                sockets=self._socket,
                resolver=names,
                tls=tls,
                keep=keep,
                unexpected=self._distrust,
                verified=self._note_certificate,
            )
            for keep in (True, False)
        )
        self.certificate: Certificate | None = None  # of the latest connection; None: no TLS connection yet
        self._loop = asyncio.get_running_loop()
        self._renewed = 0.0  # older connections are not used (perf_counter)
        self._distrusted_until = 0.0  # no connection is kept until then (perf_counter)

    async def send(
        self, url: str | URL, headers: Mapping[str, str], body: bytes, timing: Timing | None = None
    ) -> HttpResult:
        """Send one request and return its result; no behaviour of a receiver raises an exception.

        The timeout spans look-up, connect, handshake, upload and response. A status line that has arrived
        decides the result, even if the body then breaks off or stalls.

        Args:
            url: the target; a string is sent as written (a `%2F` in its query stays one).
            headers: content type, signatures and the headers that the destination configures.
            body: the signed bytes.
            timing: filled in; the request then uses a new connection, so that every step takes place.

        Raises:
            ValueError: a header contains a line break.
            OutOfResourcesError: this machine has no descriptor or memory left; nothing was sent.
        """
        started = time.perf_counter()
        request = _Request(timing, ResponseParser())
        _current.set(request)
        failure: Exception | None = None
        # As `asyncio.timeout`, which looks up the running loop with three system calls in Python 3.11.
        task = cast("asyncio.Task[Any]", asyncio.current_task(self._loop))
        cancelled = task.cancelling()
        timer = self._loop.call_later(self._timeout, request.stop, task)
        try:
            await self._request(url, headers, body, request, started)
        except (ClientError, HttpProcessingError, OSError) as error:
            failure = error.with_traceback(None)  # aiohttp's frames and this one hold it: a cycle
        except asyncio.CancelledError:
            if not request.is_late or task.cancelling() > cancelled + 1:  # cancelled by others
                raise
            failure = TimeoutError()
        finally:
            timer.cancel()
            if request.is_late:
                task.uncancel()
        duration_ms = (time.perf_counter() - started) * 1000
        response = request.parser
        status, body = response.status, bytes(response.body)
        try:
            if status is None:
                return self._failed(failure, request, duration_ms)
            ok = 200 <= status < 300  # noqa: PLR2004 - HTTP's own numbers
            clean = ok and response.is_over and response.trouble is None
            return HttpResult(
                result="ok" if ok else of_status(status),
                status=status,
                error=None if clean else self._error(response, failure),
                headers={} if ok else _delivery_headers(response),
                body=body if self._secret_url is None else self._secret_url.hide(body),
                truncated=not response.whole,
                duration_ms=duration_ms,
            )
        finally:
            failure = None  # break the cycle of its traceback and this frame, which would keep the body

    def renew(self) -> None:
        """Resolve names again, and use no connection that exists now for later requests."""
        self._renewed = time.perf_counter()
        for connector in (self._pooled, self._fresh):
            connector.clear_dns_cache()

    async def close(self) -> None:
        """Close every connection; requests in flight fail."""
        await self._pooled.close()
        await self._fresh.close()

    async def _request(
        self, url: str | URL, headers: Mapping[str, str], body: bytes, request: _Request, started: float
    ) -> None:
        """Get a response; if a kept connection turns out to be closed, send once more on a new one.

        Receivers close idle connections at the very moment of a request: without the second try, 20 of 40
        POSTs failed. A kept connection with extra bytes after an earlier response counts as closed, too.
        """
        oldest = max(self._renewed, started - MAX_AGE)
        if request.timing is not None:
            request.timing.began, oldest = started, 0.0
            self._fresh.clear_dns_cache()
        elif started >= self._distrusted_until:
            response = request.parser
            try:
                await self._exchange.run(self._pooled, url, headers, body, response, oldest=oldest)
            except ClientConnectorError:
                raise
            except (ClientOSError, ClientConnectionResetError, ServerDisconnectedError):
                if request.dialled or response.has_begun:
                    raise
            except HttpProcessingError:
                if request.dialled or not response.is_garbage:
                    raise
                self._distrust()
            else:
                if response.excess:
                    self._distrust()
                return
            request.parser = ResponseParser()
        await self._exchange.run(
            self._fresh, url, headers, body, request.parser, oldest=oldest, timing=request.timing
        )

    def _note_certificate(self, certificate: Mapping[str, Any]) -> None:
        """Note the period of a receiver's certificate; a tunnel through a proxy shows the receiver's."""
        with suppress(KeyError, ValueError):
            begins, ends = (ssl.cert_time_to_seconds(certificate[name]) for name in ("notBefore", "notAfter"))
            self.certificate = Certificate(begins * SECOND, ends * SECOND)

    def _distrust(self) -> None:
        """Keep no connection for the next 10 minutes."""
        self._distrusted_until = time.perf_counter() + DISTRUST

    def _socket(self, info: AddressInfo) -> socket.socket:
        """Return the socket for one connect, unless its address is refused."""
        family, kind, protocol, _, address = info
        host, port = str(address[0]), int(address[1])
        request = _current.get()
        try:
            reason = refused(host, port, allow_private=self._allow_private, own=self._own)
            made = socket.socket(family, kind, protocol) if reason is None else None
        except OSError as error:
            request.socket_error = error
            raise
        if made is None:
            raise Blocked(reason or "")
        request.dialled += (host,)
        if request.timing is not None and not request.timing.dialled:
            request.timing.dialled = time.perf_counter()
        return made

    def _failed(self, failure: Exception | None, request: _Request, duration_ms: float) -> HttpResult:
        """Return the result of a request without a response.

        Raises:
            OutOfResourcesError: this machine has no descriptor or memory left.
        """
        if isinstance(failure, ClientConnectorError):
            for connector in (self._pooled, self._fresh):  # the name may have moved
                connector.clear_dns_cache()
        lack = _lack(failure, request)
        if lack is not None:
            raise OutOfResourcesError(lack) from failure
        result: AttemptResult
        if isinstance(failure, ConnectionTimeoutError):
            limit = render_duration(self._connect_timeout)
            if not request.dialled:
                result, text = "dns", f"the name was not resolved within {limit}"
            else:  # behind a proxy, the dialled address may well have accepted the connection
                peer = "" if self._proxy else f" to {', '.join(request.dialled)}"
                result, text = "timeout", f"no connection{peer} within {limit}"
        elif failure is None or isinstance(failure, TimeoutError):
            result, text = "timeout", f"no response within {render_duration(self._timeout)}"
        else:
            result, text = of_failure(failure)
        if self._proxy is not None:
            text = f"through the proxy {self._proxy.name}: {text}"
        return HttpResult(result=result, error=self._line(text), duration_ms=duration_ms)

    def _line(self, text: str) -> str:
        """Return an error text as one line without the secret parts of the destination's URL."""
        if self._secret_url is not None:
            text = self._secret_url.hide(text.encode("utf-8", "surrogateescape")).decode("utf-8", "replace")
        return one_line(text)

    def _error(self, response: ResponseParser, failure: Exception | None) -> str | None:
        """Return the error text of a response, or None if it has no error."""
        status = response.status or 0
        result, trouble = of_status(status), ""
        if response.trouble is not None:
            trouble = f"; {response.trouble}"
        elif not response.is_over and failure is not None:
            trouble = f"; the body was incomplete after {render_duration(self._timeout)}"
        if result == "ok" and not trouble:
            return None
        line = f"HTTP {status} {response.reason}".rstrip()
        if result == "3xx":
            target = response.headers.get("location")
            line += f"{'' if target is None else f' to {target}'}: redirects are never followed"
        return self._line(line + trouble)


def _lack(failure: Exception | None, request: _Request) -> int | None:
    """Return the error number if this machine ran out of descriptors or memory, else None."""
    if not isinstance(failure, ClientConnectorError):
        return None
    number = request.socket_error.errno if request.socket_error is not None else failure.os_error.errno
    if number not in LACK and isinstance(failure, ClientConnectorDNSError):
        # Without a descriptor the C library cannot read its files, and reports that the name is unknown.
        try:
            socket.socket().close()
        except OSError as error:
            number = error.errno
    return number if number in LACK else None


def _delivery_headers(response: ResponseParser) -> dict[str, str]:
    """Return the `DELIVERY_HEADERS` of a response whose values are short printable ASCII."""
    found = {}
    for name in DELIVERY_HEADERS:
        value = response.headers.get(name)
        if value is not None and len(value) <= _HEADER_LIMIT and value.isascii() and value.isprintable():
            found[name] = value
    return found
