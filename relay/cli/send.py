"""`relay send`: a documented request through the front door, as the sender itself would."""

import http.client
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from relay.base.units import render_duration
from relay.cli.config import demand, env_file_option, load_without_secrets
from relay.cli.exit_codes import FAILED, UNREACHABLE, CommandError
from relay.cli.options import config_option, json_option
from relay.cli.output import print_json, print_page
from relay.cli.samples import choose, read_data, samples_of, source_named
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.installed_service import Given, Service, service_of
from relay.config.paths import find_config
from relay.config.schema import SourceConfig
from relay.config.secrets import Secret
from relay.config.tokens import tokens_of

SECONDS = 60.0
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104 - what is listened on, not bound here


@click.command()
@click.argument("source")
@click.argument("type_", metavar="[TYPE]", required=False)
@click.option("--data", help="Another body: @FILE, or @- or - for the standard input.")
@click.option("--list", "list_", is_flag=True, help="Only list the source's samples.")
@click.option("--to", help='Where it listens, such as "http://127.0.0.1:8080"; else `[server] listen`.')
@config_option
@env_file_option
@json_option
def send(
    source: str,
    type_: str | None,
    *,
    data: str | None,
    list_: bool,
    to: str | None,
    config: Path | None,
    env_files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Send a sample event through the front door.

    Example: relay send adorn image.shared

    It carries the secret that the configuration has. TYPE is one of those that --list names;
    without it, the first is sent.
    """
    path = find_config(config)
    loaded, given = load_without_secrets(path, env_files)
    setup = loaded.config
    configured = source_named(source, setup.sources)
    samples = samples_of(configured)
    if list_:
        rows = [(name, sample.method, configured.prefix + sample.path) for name, sample in samples.items()]
        items = [dict(zip(_HEADINGS, row, strict=True)) for row in rows]
        print_page({"items": items, "next_cursor": None}, _HEADINGS, as_json=as_json, quiet=False)
        return
    sample = choose(samples, source, type_)
    headers = dict(sample.headers)
    demand(loaded, given, f"sources.{source}")
    if (token := _token(path, configured, given)) is not None:
        headers["Authorization"] = f"Bearer {token.reveal()}"
    body = sample.body if data is None else read_data(data)
    url = to or _front_door(setup.server.listen)
    where = configured.prefix + sample.path
    service = None if to else service_of(path)
    _exchange(url, where, sample.method, headers, body, as_json=as_json, service=service)
    if sample in (samples.get("register"), samples.get("heartbeat")) and "unregister" in samples:
        silence = f"offline after {render_duration(configured.workers.offline_after)} without a heartbeat"
        click.echo(f"the sample worker is reported {silence}", err=True)
        click.echo(f"  end it with `relay send {source} unregister`", err=True)


_HEADINGS = ("type", "method", "path")


def _token(path: Path, source: SourceConfig, given: Given) -> Secret | None:
    """Return the first token that the source accepts."""
    first = next(tokens_of(Binder(read(path), given, lenient=True), source), None)
    return None if first is None else first.secret


def _front_door(listen: str) -> str:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    host = _ANYWHERE.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _exchange(
    url: str,
    path: str,
    method: str,
    headers: dict[str, str],
    body: bytes,
    *,
    as_json: bool,
    service: Service | None,
) -> None:
    parts = urlsplit(url)
    kind: Any = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        with closing(kind(parts.hostname or "", parts.port, timeout=SECONDS)) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            status, text = response.status, response.read().decode("utf-8", "replace")
    except (OSError, ValueError, http.client.HTTPException) as error:
        start = "start one with `relay serve`" if service is None else "start it with `systemctl start relay`"
        hint = f"{start}, or say where it listens with --to URL"
        raise CommandError(f"no relay answers at {url}: {error}", hint=hint, code=UNREACHABLE) from None
    print_json({"status": status, "body": text}) if as_json else click.echo(f"{status}\t{text}")
    if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        raise CommandError(f"{method} {path} was answered with {status}", code=FAILED)
