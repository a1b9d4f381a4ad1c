"""`relay verify`."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from relay.base.clock import SECOND, moment
from relay.cli.config import demand, env_file_option, load_without_secrets
from relay.cli.exit_codes import FAILED, NOTHING, CommandError
from relay.cli.options import config_option, json_option
from relay.cli.output import print_json
from relay.cli.samples import read_data, read_file, source_named
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.paths import find_config
from relay.config.problems import guess
from relay.config.schema import DestinationConfig
from relay.config.secrets import Absent
from relay.config.tokens import all_tokens
from relay.diagnosis import incoming, signature
from relay.diagnosis.captured import Captured, read_captured
from relay.diagnosis.finding import Finding, Report


@click.command()
@click.option("--source", help="A request that this source was sent: is its token right, and all else?")
@click.option("--destination", help="A delivery that this destination received: does it verify?")
@click.option(
    "--request", "request_", required=True, metavar="FILE", help="The request; - for the standard input."
)
@click.option("--data", help="Its body, where that was kept apart: @FILE, or @- or - for the standard input.")
@click.option("--at", help='With --destination: when it was received, else now; "2h" ago, or RFC 3339.')
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
    """Tell why a request's token or signature does not match: which of secret, encoding, bytes, clock.

    Example: relay verify --destination crm --request captured.http

    FILE holds a request as it was on the wire, what `curl -v` prints, or JSON with method, path, headers
    and body. Judged by config.toml, its secrets and its plugins; no relay need run. No secret is ever
    printed. The exit code is 0 when all is well with the request, else 1.
    """
    if (source is None) == (destination is None):
        raise click.UsageError("say whose request it is: --source or --destination")
    if at is not None and destination is None:
        raise click.UsageError("--at goes with --destination")
    captured = _captured(request_, data)
    path = find_config(config)
    loaded, given = load_without_secrets(path, env_files)
    setup = loaded.config
    if source is not None:
        source_named(source, setup.sources)
        demand(loaded, given, f"sources.{source}")
        tokens = all_tokens(Binder(read(path), given, lenient=True), setup)
        report = incoming.diagnose(captured, source, setup.sources, tokens)
    else:
        name = str(destination)
        if name not in setup.destinations:
            hint = f"there are {', '.join(setup.destinations) or 'none'}"
            wrong = f'no destination "{name}"{guess(name, setup.destinations)}'
            raise CommandError(wrong, hint=hint, code=NOTHING)
        demand(loaded, given, f"destinations.{name}")
        report = signature.diagnose(captured, name, _with_secrets(setup.destinations), _moment(at))
    if as_json:
        print_json({"source": source, "destination": destination, **_item(captured, report)})
    else:
        _tell(captured, report)
    if not report.ok:
        ctx.exit(FAILED)


def _with_secrets(destinations: Mapping[str, DestinationConfig]) -> dict[str, DestinationConfig]:
    """Leave out the secrets that cannot be had, all of other destinations."""
    return {
        name: msgspec.structs.replace(
            each, secrets=tuple(secret for secret in each.secrets if not isinstance(secret, Absent))
        )
        for name, each in destinations.items()
    }


def _captured(name: str, data: str | None) -> Captured:
    if name == "-" and data in ("-", "@-"):
        raise click.UsageError("--request and --data cannot both be the standard input")
    content = sys.stdin.buffer.read() if name == "-" else read_file(Path(name), "--request")
    try:
        return read_captured(content, None if data is None else read_data(data))
    except ValueError as error:
        raise CommandError(f"{'the standard input' if name == '-' else name}: {error}") from None


def _moment(at: str | None) -> int:
    now = time.time_ns() // 1000
    try:
        return (now if at is None else moment(at, now)) // SECOND
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--at") from None


def _item(captured: Captured, report: Report) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "request": _clean(f"{captured.method} {captured.target.partition('?')[0]}".rstrip()),
        "fits": report.fits,
        "signature": report.signature,
        "type": report.type,
        "subject": report.subject,
        "findings": [dict(zip(_HEADINGS, _texts(finding), strict=True)) for finding in report.findings],
        "notes": list(captured.notes),
    }


def _tell(captured: Captured, report: Report) -> None:
    for note in captured.notes:
        click.echo(f"note: {note}", err=True)
    for finding in report.findings:
        click.echo(_written(finding))
    if report.fits is not None:
        which = f", signature {report.signature}" if report.signature else ""
        click.echo(f"{'verifies' if report.ok else 'fits'}: {report.fits}{which}")
    elif report.ok:
        click.echo("verifies: it asks for no token")
    if report.type is not None:
        about = f" about {report.subject}" if report.subject else ""
        click.echo(f"would be: {report.type}{about}")


def _written(finding: Finding) -> str:
    """Write a finding in two lines for people, and in one, tab-separated, for a pipe."""
    cause, where, what, do = _texts(finding)
    if sys.stdout.isatty():
        return f"{cause}: {where}: {what}\n  {do}"
    return f"{cause}\t{where}\t{what}\t{do}"


_HEADINGS = Finding.__struct_fields__


def _texts(finding: Finding) -> list[str]:
    return [_clean(text) for text in msgspec.structs.astuple(finding)]


def _clean(text: str) -> str:
    """Keep what a request holds from steering the terminal, or from being no text at all."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
