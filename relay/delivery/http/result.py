"""What came of one HTTP try, in a closed set of words."""

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

_LINE = 300  # characters of an error line: enough for a sentence with a host name in it


class Answer(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """How one HTTP try ended: the receiver's status where there was one, else what went wrong."""

    result: AttemptResult
    status: int | None = None  # None: no answer
    error: str | None = None  # one line for the operator; also of an ok answer whose body broke off
    headers: Mapping[str, str] = {}  # lower-case; only those that steer deliveries
    body: bytes = b""  # first 16 KiB, as sent (never decompressed)
    truncated: bool = False  # whether the body went on, or broke off
    duration_ms: float = 0.0  # from the call to the last byte that we wanted


def of_status(status: int) -> AttemptResult:
    """Name the class of an HTTP status.

    >>> of_status(204), of_status(429), of_status(999)
    ('ok', '429', 'protocol')
    """
    if 200 <= status < 300:  # noqa: PLR2004 - HTTP's own numbers
        return "ok"
    if status == 429:  # noqa: PLR2004 - HTTP's own number
        return "429"
    classes: dict[int, AttemptResult] = {3: "3xx", 4: "4xx", 5: "5xx"}
    return classes.get(status // 100, "protocol")


def of_failure(error: Exception) -> tuple[AttemptResult, str]:  # noqa: C901, PLR0911, PLR0912 - a table, one row per failure
    """Name what aiohttp raised and say it in the operator's words; time-outs are the client's to name."""
    match error:
        case ClientConnectorCertificateError():
            return (
                "tls",
                f"certificate of {error.host} not accepted: {_verification(error.certificate_error)}",
            )
        case ClientConnectorSSLError():
            return "tls", f"TLS handshake with {_peer(error)} failed: {_tls(error.os_error)}"
        case ClientConnectorDNSError():
            return "dns", f"cannot resolve {error.host}: {_os(error.os_error)}"
        case ClientConnectorError(os_error=Blocked() as blocked) | (Blocked() as blocked):
            return "blocked", f"not dialled: {blocked.reason}"
        case ClientConnectorError(os_error=ConnectionResetError() | ConnectionAbortedError()) if error.ssl:
            return "tls", f"{_peer(error)} broke off the TLS handshake"
        case ClientConnectorError():
            return "connect", f"cannot connect to {_peer(error)}: {_os(error.os_error)}"
        case InvalidURL() | NonHttpUrlClientError():  # the URL itself stays out: it may hold a password
            return "blocked", f"not dialled: {getattr(error, 'description', None) or 'not an HTTP URL'}"
        case ServerDisconnectedError():
            return "protocol", "the receiver closed the connection without an answer"
        case ClientHttpProxyError():
            return "connect", f"the tunnel was refused: HTTP {error.status} {error.message}".rstrip()
        case ClientResponseError() | HttpProcessingError():
            return "protocol", f"malformed answer: {error.message}"
        case ClientPayloadError():
            cause = error.__cause__
            why = cause.message if isinstance(cause, HttpProcessingError) else error
            return "protocol", f"the body broke off: {why}"
        case ClientOSError(__cause__=ssl.SSLError() as alert):
            return "tls", f"the receiver ended TLS: {_tls(alert)}"
        case ClientOSError(__cause__=ClientConnectionResetError()):
            return "connect", "the connection broke before the request was out"
        case ClientOSError() | OSError():
            return "connect", f"the connection broke: {_os(error)}"
        case _:
            return "protocol", f"no usable answer: {error!r}"


def one_line(text: str) -> str:
    r"""Make text of any origin fit for a log line: printable ASCII, single spaces, 300 characters.

    >>> one_line("400, message:\n  \x00")
    '400, message: ?'
    """
    line = " ".join(text[: 4 * _LINE].split())
    return "".join(sign if " " <= sign <= "~" else "?" for sign in line)[:_LINE]


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
