"""The result of one HTTP request: a label from a closed list, the response, an error text, and times."""

import os
import socket
import ssl
from collections.abc import Mapping

import msgspec
from aiohttp import (
    ClientConnectionResetError,
    ClientConnectorCertificateError,
    ClientConnectorDNSError,
    ClientConnectorError,
    ClientConnectorSSLError,
    ClientHttpProxyError,
    ClientOSError,
    ClientPayloadError,
    ClientResponseError,
    InvalidURL,
    NonHttpUrlClientError,
    ServerDisconnectedError,
)
from aiohttp.http_exceptions import HttpProcessingError

from relay.delivery.http.ssrf import Blocked
from relay.model import AttemptResult

_ERROR_LENGTH = 300  # characters of an error line: enough for a sentence with a host name in it


class HttpResult(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """The result of one request: the receiver's response if there is one, else the error."""

    result: AttemptResult
    status: int | None = None  # None: no response
    error: str | None = None  # one line for the operator; also set if the body of a 2xx is incomplete
    headers: Mapping[str, str] = {}  # of a response other than 2xx: those of `DELIVERY_HEADERS`, lower-case
    body: bytes = b""  # first 16 KiB as sent, never decompressed
    truncated: bool = False  # the body is longer than `body`, or incomplete
    duration_ms: float = 0.0  # from the call to the last byte that was read


class Timing(msgspec.Struct):
    """When each step of a request was done, by `time.perf_counter`; 0: the request did not get that far."""

    began: float = 0.0
    dialled: float = 0.0  # the name was resolved and the first connect began
    connected: float = 0.0  # through a proxy: to the receiver, by the tunnel
    ready: float = 0.0  # with TLS: the handshake was done
    answered: float = 0.0  # the status line of the response had arrived

    def steps(self, *, tls: bool) -> dict[str, float | None]:
        """Return the milliseconds of each step; None: the request did not get that far, or skipped it."""
        return {
            "dns": _milliseconds(self.began, self.dialled),
            "connect": _milliseconds(self.dialled, self.connected),
            "tls": _milliseconds(self.connected, self.ready) if tls else None,
            "first_byte": _milliseconds(self.ready, self.answered),
        }


def _milliseconds(start: float, end: float) -> float | None:
    return round((end - start) * 1000, 1) if start and end else None


def of_status(status: int) -> AttemptResult:
    """Return the label of an HTTP status.

    >>> of_status(204), of_status(429), of_status(999)
    ('ok', '429', 'protocol')
    """
    if status == 429:  # noqa: PLR2004 - Too Many Requests, RFC 6585 §4
        return "429"
    labels: dict[int, AttemptResult] = {2: "ok", 3: "3xx", 4: "4xx", 5: "5xx"}
    return labels.get(status // 100, "protocol")


def of_failure(error: Exception) -> tuple[AttemptResult, str]:  # noqa: C901, PLR0911, PLR0912 - a table, one row per failure
    """Return the label and a text for an error that aiohttp raised; the client itself labels timeouts."""
    match error:
        case ClientConnectorCertificateError():
            return (
                "tls",
                f"certificate of {error.host} is not trusted: {_verification(error.certificate_error)}",
            )
        case ClientConnectorSSLError():
            return "tls", f"TLS handshake with {_peer(error)} failed: {_tls(error.os_error)}"
        case ClientConnectorDNSError():
            return "dns", f"cannot resolve {error.host}: {_os(error.os_error)}"
        case ClientConnectorError(os_error=Blocked() as blocked) | (Blocked() as blocked):
            return "blocked", f"not connected: {blocked.reason}"
        case ClientConnectorError(os_error=ConnectionResetError() | ConnectionAbortedError()) if error.ssl:
            return "tls", f"{_peer(error)} closed the connection during the TLS handshake"
        case ClientConnectorError():
            return "connect", f"cannot connect to {_peer(error)}: {_os(error.os_error)}"
        case InvalidURL() | NonHttpUrlClientError():  # the text leaves the URL out: it may hold a password
            return "blocked", f"not connected: {getattr(error, 'description', None) or 'not an HTTP URL'}"
        case ServerDisconnectedError():
            return "protocol", "the receiver closed the connection without a response"
        case ClientHttpProxyError():
            return "connect", f"the proxy refused the tunnel: HTTP {error.status} {error.message}".rstrip()
        case ClientResponseError() | HttpProcessingError():
            return "protocol", f"malformed response: {error.message}"
        case ClientPayloadError():
            cause = error.__cause__
            why = cause.message if isinstance(cause, HttpProcessingError) else error
            return "protocol", f"the response body is incomplete: {why}"
        case ClientOSError(__cause__=ssl.SSLError() as alert):
            return "tls", f"the receiver ended TLS: {_tls(alert)}"
        case ClientOSError(__cause__=ClientConnectionResetError()):
            return "connect", "the connection broke before the request was sent"
        case ClientOSError() | OSError():
            return "connect", f"the connection broke: {_os(error)}"
        case _:
            return "protocol", f"no usable response: {error!r}"


def one_line(text: str) -> str:
    r"""Return text as one log line of up to 300 characters: printable ASCII and single spaces.

    >>> one_line("400, message:\n  \x00")
    '400, message: ?'
    """
    line = " ".join(text[: 4 * _ERROR_LENGTH].split())
    return "".join(sign if " " <= sign <= "~" else "?" for sign in line)[:_ERROR_LENGTH]


def _peer(error: ClientConnectorError) -> str:
    return f"{error.host}:{error.port}"


def _verification(error: Exception) -> str:
    message = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else str(error)
    return message.rstrip(".")


def _tls(error: OSError) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return reason.replace("_", " ").lower() if reason else _os(error)


def _os(error: OSError) -> str:
    if isinstance(error, socket.gaierror) or not error.errno or error.errno < 0:
        return str(error.strerror or error)
    return os.strerror(error.errno)
