"""`relay send`: a documented request through the front door, as the sender itself would."""

import http.client
import os
import sys
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from relay.cli.exits import FAILED, NOTHING, UNREACHABLE, CommandError
from relay.cli.options import config_option, json_option
from relay.cli.output import print_json, print_table
from relay.config.bind import Binder
from relay.config.document import read
from relay.config.find import find_config
from relay.config.model import SourceConfig
from relay.config.problem import guess
from relay.config.secret import Secret, Secrets
from relay.incoming import Incoming
from relay.loader import load
from relay.source import Accepted

SECONDS = 60.0
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104 - what is listened on, not bound here


@click.command()
@click.argument("source")
@click.argument("type_", metavar="[TYPE]", required=False)
@click.option("--data", help="Another body: @FILE, or @- or - for the standard input.")
@click.option("--list", "list_", is_flag=True, help="Only list the source's samples.")
@click.option("--to", help='Where it listens, such as "http://127.0.0.1:8080"; else `[server] listen`.')
@config_option
@json_option
def send(
    source: str,
    type_: str | None,
    *,
    data: str | None,
    list_: bool,
    to: str | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Send a sample event through the front door.

    Example: relay send adorn image.shared

    It carries the secret that the configuration has. TYPE is one of those that --list names;
    without it, the first is sent.
    """
    path = find_config(config)
    setup = load(path).config
    if source not in setup.sources:
        hint = f"there are {', '.join(setup.sources)}"
        raise CommandError(f'no source "{source}"{guess(source, setup.sources)}', hint=hint, code=NOTHING)
    configured = setup.sources[source]
    samples = {_type_of(configured, sample): sample for sample in configured.settings.samples()}
    if list_:
        rows = [(name, sample.method, configured.prefix + sample.path) for name, sample in samples.items()]
        if as_json:
            print_json([dict(zip(_HEADINGS, row, strict=True)) for row in rows])
        else:
            print_table(_HEADINGS, rows)
        return
    sample = _choose(samples, source, type_)
    headers = dict(sample.headers)
    if (token := _token(path, source, configured)) is not None:
        headers["Authorization"] = f"Bearer {token.reveal()}"
    body = sample.body if data is None else _read(data)
    url = to or _front_door(setup.server.listen)
    where = configured.prefix + sample.path
    _exchange(url, where, sample.method, headers, body, as_json=as_json)


_HEADINGS = ("type", "method", "path")


def _choose(samples: dict[str, Incoming], source: str, type_: str | None) -> Incoming:
    if not samples:
        raise CommandError(f'the plugin of source "{source}" has no samples', code=NOTHING)
    if type_ is None:
        return next(iter(samples.values()))
    if type_ not in samples:
        hint = f"there are {', '.join(samples)}"
        raise CommandError(f'no sample "{type_}"{guess(type_, samples)}', hint=hint, code=NOTHING)
    return samples[type_]


def _type_of(source: SourceConfig, sample: Incoming) -> str:
    """Return the type of a sample's event; of one that has none, what it does to a worker."""
    for method, template, handler in source.settings.routes():
        if method == sample.method and _fits(template, sample.path):
            accepted = getattr(source.settings, handler)(sample)
            if isinstance(accepted, Accepted):
                if accepted.event is not None:
                    return accepted.event.type
                if accepted.worker is not None:
                    return accepted.worker.__class__.__name__.lower()
    return f"{sample.method} {sample.path}"


def _fits(template: str, path: str) -> bool:
    here, there = template.split("/"), path.split("/")
    return len(here) == len(there) and all(
        one.startswith("{") or one == other for one, other in zip(here, there, strict=True)
    )


def _token(path: Path, name: str, source: SourceConfig) -> Secret | None:
    """Return the first token that the source accepts; what is bound of it is a digest only."""
    binder = Binder(read(path), os.environ)
    for field in source.settings.__struct_fields__:
        if isinstance(getattr(source.settings, field), Secrets):
            for given in binder.document.data["sources"][name].get(field, ()):
                place = given["secret"] if isinstance(given, dict) and "secret" in given else given
                return binder.origin.secret(place)
    return None


def _read(data: str) -> bytes:
    name = data.removeprefix("@")
    if name == "-":
        return sys.stdin.buffer.read()
    if name == data:
        raise click.BadParameter(f"expected @FILE or -, as in --data @{data}", param_hint="--data")
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise click.BadParameter(f"{name} cannot be read: {error.strerror}", param_hint="--data") from None


def _front_door(listen: str) -> str:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    host = _ANYWHERE.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _exchange(
    url: str, path: str, method: str, headers: dict[str, str], body: bytes, *, as_json: bool
) -> None:
    parts = urlsplit(url)
    kind: Any = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        with closing(kind(parts.hostname or "", parts.port, timeout=SECONDS)) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            status, text = response.status, response.read().decode("utf-8", "replace")
    except (OSError, ValueError, http.client.HTTPException) as error:
        hint = "start one with `relay serve`, or say where it listens with --to URL"
        raise CommandError(f"no relay answers at {url}: {error}", hint=hint, code=UNREACHABLE) from None
    print_json({"status": status, "body": text}) if as_json else click.echo(f"{status}\t{text}")
    if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        raise CommandError(f"{method} {path} was answered with {status}", code=FAILED)
