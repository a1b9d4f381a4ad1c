"""`relay verify`."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from relay.base.clock import SECOND, moment
from relay.cli.completion import complete
from relay.cli.config import demand, load_without_secrets, source_named
from relay.cli.main import FAILED, NOTHING, CommandError
from relay.cli.options import config_option, env_file_option, json_option, read_data, read_file
from relay.cli.output import count, print_json
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.paths import find_config
from relay.config.problems import guess
from relay.config.schema import DestinationConfig
from relay.config.secrets import Absent, Secret, Url
from relay.config.tokens import all_tokens
from relay.diagnosis import delivery, source_request
from relay.diagnosis.captured import Captured, Report, read_captured
from relay.model import Finding


@click.command()
@click.option("--source", shell_complete=complete("source"), help="Verify a request to this source.")
@click.option(
    "--destination", shell_complete=complete("destination"), help="Verify a delivery to this destination."
)
@click.option(
    "--request", "request_", required=True, metavar="FILE", help="Captured request; - for standard input."
)
@click.option("--data", help="Read the body from @FILE, or from standard input with -.")
@click.option(
    "--at",
    help='Time of receipt, an age such as "2h" or RFC 3339, for signatures with a time.  [default: now]',
)
@config_option
@env_file_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    *,
    source: str | None,
    destination: str | None,
    request_: str,
    data: str | None,
    at: str | None,
    config: Path | None,
    env_files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Diagnose a token or signature that does not match: secret, encoding, bytes or clock.

    Example: relay verify --destination crm --request captured.http

    FILE contains a raw HTTP request, the output of `curl -v`, or JSON with method, path, headers and body.
    The command uses config.toml, its secrets and its plugins; it needs no daemon and never prints a secret.
    The exit code is 0 if the request is valid, else 1.
    """
    if (source is None) == (destination is None):
        raise click.UsageError("give either --source or --destination")
    captured = _captured(request_, data)
    path = find_config(config)
    loaded, given = load_without_secrets(path, env_files)
    setup = loaded.config
    url = None
    if source is not None:
        source_named(source, setup.sources)
        demand(loaded, given, f"sources.{source}")
        tokens = all_tokens(Binder(read(path), given, lenient=True), setup)
        report = source_request.diagnose(captured, source, setup.sources, tokens, _seconds(at))
    else:
        name = str(destination)
        if name not in setup.destinations:
            known = ", ".join(setup.destinations)
            hint = f"destinations: {known}" if known else "config.toml has no destinations"
            wrong = f'unknown destination "{name}"{guess(name, setup.destinations)}'
            raise CommandError(wrong, hint=hint, code=NOTHING)
        signatures, url = setup.destinations[name].signatures, setup.destinations[name].url
        keys = [
            "secrets",
            "signatures",
            *(["url"] if any("{url}" in each.signed for each in signatures) else []),
        ]
        demand(loaded, given, *(f"destinations.{name}.{key}" for key in keys))
        report = delivery.diagnose(captured, name, _without_absent(setup.destinations), _seconds(at))
    if as_json:
        print_json({"source": source, "destination": destination, **_item(captured, report, url)})
    else:
        _print(captured, report)
    if not report.ok:
        ctx.exit(FAILED)


def _without_absent(destinations: Mapping[str, DestinationConfig]) -> dict[str, DestinationConfig]:
    """Return the destinations without their missing secrets, which only other destinations can have."""
    return {
        name: msgspec.structs.replace(
            each,
            secrets=_present(each.secrets),
            signatures=tuple(
                msgspec.structs.replace(scheme, secrets=_present(scheme.secrets))
                for scheme in each.signatures
            ),
        )
        for name, each in destinations.items()
    }


def _present(secrets: tuple[Secret, ...]) -> tuple[Secret, ...]:
    return tuple(secret for secret in secrets if not isinstance(secret, Absent))


def _captured(name: str, data: str | None) -> Captured:
    if name == "-" and data in ("-", "@-"):
        raise click.UsageError("--request and --data cannot both read standard input")
    content = sys.stdin.buffer.read() if name == "-" else read_file(Path(name), "--request")
    try:
        return read_captured(content, None if data is None else read_data(data))
    except ValueError as error:
        raise CommandError(f"{'standard input' if name == '-' else name}: {error}") from None


def _seconds(at: str | None) -> int:
    """Return a time in seconds since the epoch."""
    now = time.time_ns() // 1000
    try:
        return (now if at is None else moment(at, now)) // SECOND
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--at") from None


def _item(captured: Captured, report: Report, url: Secret | None) -> dict[str, Any]:
    target = captured.target.partition("?")[0]
    if isinstance(url, Url):  # of the destination; it may be a secret
        target = url.hide(target.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")
    return {
        "ok": report.ok,
        "request": _clean(f"{captured.method} {target}".rstrip()),
        "fits": report.fits,
        "signature": report.signature,
        "type": report.type,
        "subject": report.subject,
        "more": report.more,
        "findings": [dict(zip(_HEADINGS, _texts(finding), strict=True)) for finding in report.findings],
        "notes": list(captured.notes),
    }


def _print(captured: Captured, report: Report) -> None:
    for note in captured.notes:
        click.echo(f"note: {note}", err=True)
    for finding in report.findings:
        click.echo(_line(finding))
    if report.fits is not None:
        which = f", signature {report.signature}" if report.signature else ""
        click.echo(f"{'valid' if report.ok else 'matches'}: {report.fits}{which}")
    elif report.ok:
        click.echo(f"valid: {report.because or 'the source needs no token'}")
    if report.type is not None:
        about = f", subject {report.subject}" if report.subject else ""
        more = f", and {count(report.more, 'more event')}" if report.more else ""
        click.echo(f"event: {report.type}{about}{more}")


def _line(finding: Finding) -> str:
    """Return a finding as two lines for a terminal, or one tab-separated line for a pipe."""
    cause, where, what, do = _texts(finding)
    if sys.stdout.isatty():
        return f"{cause}: {where}: {what}\n  {do}"
    return f"{cause}\t{where}\t{what}\t{do}"


_HEADINGS = Finding.__struct_fields__


def _texts(finding: Finding) -> list[str]:
    return [_clean(text) for text in msgspec.structs.astuple(finding)]


def _clean(text: str) -> str:
    """Escape control characters and lone surrogates of a captured request."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
