"""`relay listen`: a local receiver that shows what a destination gets."""

import base64
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import click

from relay.base.text import printable
from relay.cli.main import CommandError
from relay.cli.options import json_option
from relay.cli.output import print_json
from relay.config.secrets import Secret
from relay.signing import SignatureError, verify

LARGEST = 16 * 2**20


@click.command()
@click.argument("port", type=click.IntRange(0, 65_535), default=9000)
@click.option(
    "--secret",
    "secrets",
    multiple=True,
    help="Secret that verifies signatures, whsec_… or whpk_…. Repeatable.",
)
@click.option(
    "--status", type=click.IntRange(200, 599), default=204, show_default=True, help="Status of the responses."
)
@json_option
def listen(port: int, *, secrets: tuple[str, ...], status: int, as_json: bool) -> None:
    """Run a local receiver that verifies signatures and prints requests.

    Example: relay listen 9000 --secret whsec_…

    Runs until Ctrl-C. An invalid signature gets a 401. PORT 0 selects a free port. `relay verify` reads
    the output of --json.
    """
    try:
        verify(tuple(map(Secret, secrets)), _PROBE, b"", int(_PROBE["webhook-timestamp"]))
    except SignatureError:
        pass  # the secrets are valid; the probe's signature is not meant to be
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--secret") from None
    try:
        server = Receiver(port, tuple(map(Secret, secrets)), status, as_json=as_json)
    except OSError as error:
        raise CommandError(
            f"cannot listen on port {port}: {error.strerror}",
            hint="choose another port: relay listen 0 selects a free one",
        ) from None
    with server:
        click.echo(f"listening on http://127.0.0.1:{server.server_port}", err=True)
        server.serve_forever()


_PROBE = {"webhook-id": "-", "webhook-timestamp": "0", "webhook-signature": "-"}


class Receiver(ThreadingHTTPServer):
    """Answers on loopback with one status, or 401 to what is not signed as it should be."""

    daemon_threads = True

    def __init__(self, port: int, secrets: tuple[Secret, ...], status: int, *, as_json: bool) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.secrets = secrets
        self.status = status
        self.as_json = as_json
        self.printing = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    server: Receiver
    protocol_version = "HTTP/1.1"
    timeout: ClassVar[float] = 60.0

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or int(length) > LARGEST:
            self.close_connection = True
            self._answer(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE if length.isdigit() else HTTPStatus.LENGTH_REQUIRED
            )
            return
        body = self.rfile.read(int(length))
        problem = self._problem(body)
        self._show(body, problem)
        self._answer(self.server.status if problem in (None, "") else HTTPStatus.UNAUTHORIZED)

    do_PUT = do_POST  # noqa: N815 - likewise

    def log_message(self, *_: object) -> None:
        """Say nothing: what arrives is printed already."""

    def _problem(self, body: bytes) -> str | None:
        """Return what is wrong with the signature, "" if nothing; None where nothing was to be verified."""
        if not self.server.secrets:
            return None
        try:
            verify(self.server.secrets, dict(self.headers), body, int(time.time()))
        except SignatureError as error:
            return str(error)
        return ""

    def _show(self, body: bytes, problem: str | None) -> None:
        text = body.decode("utf-8", "replace")
        signed = {None: "not verified", "": "signature ok"}.get(problem, f"signature wrong: {problem}")
        id_ = self.headers.get("webhook-id", "")
        with self.server.printing:
            if self.server.as_json:
                print_json({"id": id_, "signature": signed, **self._captured(body, text)})
            else:
                shown = "\n".join(map(printable, text.splitlines()))
                click.echo(f"{printable(id_)}\t{signed}\t{shown}")

    def _captured(self, body: bytes, text: str) -> dict[str, object]:
        """Write the request down as `relay verify` reads it."""
        headers = {name: self.headers.get_all(name, []) for name in self.headers}
        exact = {} if text.encode() == body else {"body_base64": base64.b64encode(body).decode()}
        return {
            "method": self.command,
            "path": self.path,
            "headers": {name: found[0] if len(found) == 1 else found for name, found in headers.items()},
            "body": text,
            **exact,
        }

    def _answer(self, status: int) -> None:
        self.send_response(status)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", "0")
        self.end_headers()
