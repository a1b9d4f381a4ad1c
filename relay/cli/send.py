"""`relay send`: a source's documented request, sent to the public listener."""

import http.client
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import msgspec

from relay.base.units import render_duration
from relay.cli import screen
from relay.cli.api_client import daemon_at
from relay.cli.completion import complete
from relay.cli.config import demand, load_without_secrets, source_named
from relay.cli.main import FAILED, NOTHING, UNREACHABLE, CommandError
from relay.cli.options import config_option, env_file_option, json_option, read_data
from relay.cli.output import print_json, print_page
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.installed_service import Given, Service, listen_streams, service_of, start_command
from relay.config.paths import find_config
from relay.config.problems import guess
from relay.config.schema import SourceConfig
from relay.config.secrets import Secret
from relay.config.tokens import tokens_of
from relay.demo.samples import accept
from relay.errors import RelayError
from relay.source import Incoming

TIMEOUT = 60.0  # seconds
ASKING = 5.0
"""Seconds within which the daemon must return its address."""

COLUMNS = ("type", "method", "path")
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104 - a listen address, not bound here


@click.command()
@click.argument("source", required=False, shell_complete=complete("source"))
@click.argument("type_", metavar="[TYPE]", required=False)
@click.option("--data", help="Send the body in @FILE instead, or standard input with -.")
@click.option("--list", "list_", is_flag=True, help="Only list the samples of SOURCE, or of all sources.")
@click.option(
    "--to",
    help='URL of the listener, such as "http://127.0.0.1:8080".  [default: that of the running daemon, else'
    " of its socket unit, else `[server] listen`]",
)
@config_option
@env_file_option
@json_option
def send(
    source: str | None,
    type_: str | None,
    *,
    data: str | None,
    list_: bool,
    to: str | None,
    config: Path | None,
    env_files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Send a sample event through the public listener.

    Example: relay send adorn image.shared

    The request carries the source's configured secret. TYPE is one of the samples that --list prints; the
    default is the first one.
    """
    if source is None and not list_:
        raise click.UsageError("Missing argument 'SOURCE'.")
    path = find_config(config)
    loaded, given = load_without_secrets(path, env_files)
    setup = loaded.config
    if source is None:
        _list(setup.sources.values(), ("source", *COLUMNS), as_json=as_json)
        return
    configured = source_named(source, setup.sources)
    samples = samples_of(configured)
    if list_:
        _list([configured], COLUMNS, as_json=as_json)
        return
    sample = choose(samples, source, type_)
    demand(loaded, given, f"sources.{source}")
    query = f"?{sample.query}" if sample.query else ""
    request = msgspec.structs.replace(
        sample,
        body=sample.body if data is None else read_data(data),
        target=configured.prefix + sample.path + query,
        received_at=time.time_ns() // 1000,
    )
    if (token := _token(path, configured, given)) is not None:
        request = request.with_headers({"Authorization": f"Bearer {token.reveal()}"})
    signed = configured.settings.sign(request)
    url = to or _listener(path, setup.server.listen)
    status = _exchange(url, signed, as_json=as_json, service=None if to else service_of(path))
    if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        hint = "the response above names the reason; `relay refused list` shows refused requests"
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            hint = "name the public listener with --to URL; check that the daemon runs with this config.toml"
        if status == HTTPStatus.UNAUTHORIZED and signed.headers == request.headers:
            hint = f"only the sender of {source} can sign requests: let it send a test event"
        raise CommandError(f"{signed.method} {signed.target} returned {status}", hint=hint, code=FAILED)
    if sample in (samples.get("register"), samples.get("heartbeat")) and "unregister" in samples:
        silence = f"offline after {render_duration(configured.workers.offline_after)} without a heartbeat"
        click.echo(f"the sample worker is reported {silence}", err=True)
        click.echo(f"  remove it with `relay send {source} unregister`", err=True)


def _list(sources: Iterable[SourceConfig], columns: Sequence[str], *, as_json: bool) -> None:
    """Print the samples of sources."""
    items = [
        {"source": each.name, "type": name, "method": sample.method, "path": each.prefix + sample.path}
        for each in sources
        for name, sample in samples_of(each).items()
    ]
    shown = [{name: item[name] for name in columns} for item in items]
    shape = [screen.text(name, least=16, long="middle") for name in columns]
    print_page({"items": shown, "next_cursor": None}, columns, shape, as_json=as_json, quiet=False)


def samples_of(source: SourceConfig) -> dict[str, Incoming]:
    """Return the documented requests of a source by label or event type; their paths are below its prefix."""
    return {sample.label or _type_of(source, sample): sample for sample in source.settings.samples()}


def choose(samples: Mapping[str, Incoming], source: str, type_: str | None) -> Incoming:
    """Return the sample of a type, the first one without a type.

    Raises:
        CommandError: the sample does not exist.
    """
    if not samples:
        raise CommandError(f'the plugin of source "{source}" has no samples', code=NOTHING)
    if type_ is None:
        return next(iter(samples.values()))
    if type_ not in samples:
        hint = f"samples: {', '.join(samples)}"
        raise CommandError(f'unknown sample "{type_}"{guess(type_, samples)}', hint=hint, code=NOTHING)
    return samples[type_]


def _type_of(source: SourceConfig, sample: Incoming) -> str:
    """Return the event type of a sample, or the worker operation if it creates no event."""
    if (accepted := accept(source.settings, sample)) is not None:
        if (event := accepted.event or next(iter(accepted.events), None)) is not None:
            return event.type
        if accepted.worker is not None:
            return accepted.worker.__class__.__name__.lower()
    return f"{sample.method} {sample.path}"


def _token(path: Path, source: SourceConfig, given: Given) -> Secret | None:
    """Return the first token that the source accepts."""
    first = next(tokens_of(Binder(read(path), given, lenient=True), source), None)
    return None if first is None else first.secret


def _listener(path: Path, listen: str) -> str:
    """Return the URL of the public listener for a client on this machine.

    The running daemon knows it. Otherwise an enabled socket unit of the service has priority over `listen`.
    """
    with suppress(RelayError, click.ClickException):  # it does not run, or this user may not ask it
        found = daemon_at(path, None, None, None, timeout=ASKING).get("status")["addresses"]
        if "public" in found:
            return _reachable(found["public"].removeprefix("http://"))
    stream = listen_streams().get("public", "") if service_of(path) else ""
    return _reachable(listen if not stream or stream.startswith("/") else stream)


def _reachable(address: str) -> str:
    """Return the URL by which this machine reaches an address on which a listener waits.

    >>> _reachable("0.0.0.0:80"), _reachable("[::]:80"), _reachable("8080"), _reachable("[2001:db8::1]:80")
    ('http://127.0.0.1:80', 'http://[::1]:80', 'http://127.0.0.1:8080', 'http://[2001:db8::1]:80')
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    host = _LOOPBACK.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _exchange(
    url: str,
    request: Incoming,
    *,
    as_json: bool,
    service: Service | None,
) -> int:
    """Send a request, print the response, and return its status."""
    parts = urlsplit(url)
    kind: Any = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        with closing(kind(parts.hostname or "", parts.port, timeout=TIMEOUT)) as connection:
            connection.request(request.method, request.target, request.body, dict(request.headers))
            response = connection.getresponse()
            status: int = response.status
            text = response.read().decode("utf-8", "replace")
    except (OSError, ValueError, http.client.HTTPException) as error:
        start = "`relay serve`" if service is None else f"`{start_command()}`"
        hint = f"start the daemon with {start}, or name its listener with --to URL"
        raise CommandError(f"cannot connect to {url}: {error}", hint=hint, code=UNREACHABLE) from None
    print_json({"status": status, "body": text}) if as_json else click.echo(f"{status}\t{text}")
    return status
