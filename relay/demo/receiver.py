"""A local HTTP receiver that verifies signatures. `relay listen` and the demo use it."""

import sys
import time
from collections.abc import Callable, Sequence
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import msgspec

from relay.config.secrets import Secret
from relay.config.signatures import SCHEMES
from relay.signing import SignatureError, verifier_of

MAX_BODY = 16 * 2**20  # bytes


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """One request."""

    method: str
    path: str
    headers: Message
    body: bytes
    verified: bool  # False without a secret
    problem: str | None = None  # why the signature is invalid


class Receiver(ThreadingHTTPServer):
    """Listens on loopback. Responds with one status, or 401 to an invalid signature."""

    daemon_threads = True
    request_queue_size = 128  # a lane sends its whole backlog at once after a takeover

    def __init__(
        self,
        secrets: Sequence[Secret],
        receive: Callable[[Received], None],
        *,
        port: int = 0,
        status: int = HTTPStatus.NO_CONTENT,
        scheme: str = "standard",
    ) -> None:
        """Take `receive`, which is called in a thread for each request, before the response.

        Raises:
            ValueError: one of the secrets is not a key of the signature scheme.
            OSError: the port is in use.
        """
        self.verify = verifier_of(SCHEMES[scheme], tuple(secrets)) if secrets else None
        super().__init__(("127.0.0.1", port), _Handler)
        self.receive = receive
        self.status = status

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of an error, unless the sender has disconnected, as a killed relay does."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Return the URL that deliveries go to."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver
    protocol_version = "HTTP/1.1"
    timeout: ClassVar[float] = 60.0

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or int(length) > MAX_BODY:
            self.close_connection = True
            self._respond(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE if length.isdigit() else HTTPStatus.LENGTH_REQUIRED
            )
            return
        body = self.rfile.read(int(length))
        problem = self._problem(body)
        self.server.receive(
            Received(
                method=self.command,
                path=self.path,
                headers=self.headers,
                body=body,
                verified=self.server.verify is not None,
                problem=problem,
            )
        )
        self._respond(self.server.status if problem is None else HTTPStatus.UNAUTHORIZED)

    do_PUT = do_POST  # noqa: N815 - the name that http.server looks for

    def log_message(self, *_: object) -> None:
        """Log nothing: `receive` reports each request."""

    def _problem(self, body: bytes) -> str | None:
        """Return why the signature is invalid, None for a valid one or without secrets."""
        if self.server.verify is None:
            return None
        try:
            self.server.verify(dict(self.headers), body, int(time.time()))
        except SignatureError as error:
            return str(error)
        return None

    def _respond(self, status: int) -> None:
        self.send_response(status)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", "0")
        self.end_headers()
