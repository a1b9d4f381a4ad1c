"""`relay listen`: a local receiver that prints the requests of a destination."""

import base64
import sys
import threading

import click

from relay.base.text import printable
from relay.cli.main import CommandError, Number, OneOf
from relay.cli.options import json_option
from relay.cli.output import to_json
from relay.config.secrets import Secret
from relay.config.signatures import SCHEMES
from relay.demo.receiver import Received, Receiver


@click.command()
@click.argument("port", type=Number(0, 65_535), default=9000)
@click.option(
    "--secret",
    "secrets",
    multiple=True,
    help="Secret that verifies signatures, such as whsec_… or whpk_…. Repeatable.",
)
@click.option(
    "--scheme",
    type=OneOf(list(SCHEMES)),
    default="standard",
    show_default=True,
    help="Signature scheme to verify.",
)
@click.option(
    "--status", type=Number(200, 599), default=204, show_default=True, help="Status of the responses."
)
@json_option
def listen(port: int, *, secrets: tuple[str, ...], scheme: str, status: int, as_json: bool) -> None:
    """Run a local receiver that verifies signatures and prints requests.

    Example: relay listen 9000 --secret whsec_…

    Runs until Ctrl-C. PORT defaults to 9000; 0 selects a free port. A request with an invalid signature
    gets a 401. With --json, each request is a line of JSON, which `relay verify` reads.
    """
    printing = threading.Lock()

    def show(received: Received) -> None:
        with printing:
            _show(received, as_json=as_json)

    try:
        server = Receiver(tuple(map(Secret, secrets)), show, port=port, status=status, scheme=scheme)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--secret") from None
    except OSError as error:
        hint = "choose another port: relay listen 0 selects a free one"
        raise CommandError(f"cannot listen on port {port}: {error.strerror}", hint=hint) from None
    with server:
        click.echo(f"listening on {server.url}", err=True)
        server.serve_forever()


def _show(received: Received, *, as_json: bool) -> None:
    text = received.body.decode("utf-8", "replace")
    if received.problem is not None:
        signature = f"signature wrong: {received.problem}"
    else:
        signature = "signature ok" if received.verified else "not verified"
    id_ = received.headers.get("webhook-id", "")
    if as_json:
        click.echo(to_json({"id": id_, "signature": signature, **_captured(received, text)}))
    else:
        # In a pipe, each request is one line.
        lines = text.splitlines() if sys.stdout.isatty() else [" ".join(text.split())]
        shown = "\n".join(map(printable, lines))
        click.echo(f"{printable(id_)}\t{signature}\t{shown}")


def _captured(received: Received, text: str) -> dict[str, object]:
    """Return the request in the format that `relay verify` reads."""
    headers = {name: received.headers.get_all(name, []) for name in received.headers}
    exact = (
        {} if text.encode() == received.body else {"body_base64": base64.b64encode(received.body).decode()}
    )
    return {
        "method": received.method,
        "path": received.path,
        "headers": {name: values[0] if len(values) == 1 else values for name, values in headers.items()},
        "body": text,
        **exact,
    }
