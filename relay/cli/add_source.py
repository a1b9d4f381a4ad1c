"""`relay sources add`: add a source to config.toml, and print the settings for the sender."""

import json
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from relay.cli import screen
from relay.cli.config import given_of
from relay.cli.main import NOTHING, CommandError, OneOf, file_error
from relay.cli.options import config_option, env_file_option, json_option
from relay.cli.output import count, print_json
from relay.cli.plugins import dirs_of
from relay.config import validators
from relay.config.document import read
from relay.config.effective import as_toml
from relay.config.installed_service import Given, service_of
from relay.config.paths import find_config
from relay.config.problems import ConfigError, guess
from relay.plugin_loading.loader import discover, load
from relay.source import Guide, Preset, Source

GENERIC = "generic"
Known = Mapping[str, tuple[type[Source], Preset | None]]
"""The kinds of source, each with its preset if it is one."""

HOST = "https://YOUR-HOST"
"""Placeholder for the public URL of the relay if it is unknown."""

_VERIFY: Mapping[str, Any] = {
    "bearer": "bearer",
    "hmac": {"hmac": {"header": "X-Signature"}},
    "api-key": {"api_key": {"header": "X-API-Key"}},
    "basic": {"basic": {"user": "relay"}},
    "standard-webhooks": "standard-webhooks",
    "none": "none",
}
"""The value of `verify` that `--verify` writes for a generic source."""


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about a kind of source that its table and its instructions need."""

    guide: Guide
    verify: Any
    handshakes: Sequence[Mapping[str, Any]] = ()
    tokens: bool = False  # a source whose plugin defines its paths, with the key `tokens`

    @property
    def signs_url(self) -> bool:
        """Whether the signature covers the URL, so that the relay must know it."""
        return isinstance(self.verify, dict) and any(
            "{url}" in method.get("signed", "") for method in self.verify.values()
        )

    @property
    def secrets_key(self) -> str:
        """The key that holds its secrets; "" without a secret."""
        if self.tokens:
            return "tokens"
        if self.verify == "none":
            return ""
        is_public = isinstance(self.verify, dict) and not {"ed25519", "ecdsa"}.isdisjoint(self.verify)
        return "public_keys" if is_public else "secrets"

    @property
    def has_verify_token(self) -> bool:
        """Whether one of its handshakes contains a token."""
        return any("token" in handshake for handshake in self.handshakes)


class Needed(msgspec.Struct, frozen=True):
    """A secret that the operator stores."""

    place: str  # env, file or credential
    name: str  # of the variable, the file or the credential
    what: str  # in the vendor's words


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """A new source."""

    name: str
    url: str
    table: str  # its lines of config.toml
    secrets: tuple[Needed, ...]
    title: str
    docs: str
    steps: tuple[str, ...]


def presets(dirs: Sequence[Path] = ()) -> dict[str, Preset]:
    """Return all presets by name, the bundled ones and those of plugins."""
    return {name: preset for name, (_, preset) in offered(dirs).items() if preset is not None}


def offered(dirs: Sequence[Path]) -> dict[str, tuple[type[Source], Preset | None]]:
    """Return the source and the preset of every kind by name.

    Raises:
        ConfigError: a plugin cannot be loaded.
    """
    offers, problems = discover(dirs)
    if problems:
        raise ConfigError(problems)
    return {name: (kind.source, kind.preset) for name, kind in sorted(offers.kinds.items())}


def kind_of(preset: Preset) -> Kind:
    """Return a preset's instructions for setting up its source."""
    rules = preset.read()
    return Kind(
        guide=rules.guide,
        verify=rules.defaults.get("verify", "none"),
        handshakes=rules.defaults.get("handshakes", ()),
    )


@click.command()
@click.argument("kind", required=False)
@click.option("--name", help="Name of the source.  [default: the preset's name]")
@click.option("--path", help='Path that senders post to, such as "/hooks/github".')
@click.option("--public-url", help='Scheme and host that senders use, such as "https://hooks.example".')
@click.option("--secret-env", metavar="NAME", help="Environment variable with the secret.")
@click.option("--secret-file", metavar="FILE", help="File with the secret.")
@click.option("--secret-credential", metavar="NAME", help="systemd credential with the secret.")
@click.option("--verify", type=OneOf(tuple(_VERIFY)), help="With generic: how senders are verified.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set another key of the source. Repeatable."
)
@click.option("--print", "only_print", is_flag=True, help="Print the table and write nothing.")
@config_option
@env_file_option
@json_option
def add(
    kind: str | None,
    *,
    name: str | None,
    path: str | None,
    public_url: str | None,
    secret_env: str | None,
    secret_file: str | None,
    secret_credential: str | None,
    verify: str | None,
    settings: tuple[str, ...],
    only_print: bool,
    config: Path | None,
    env_files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Add a source to config.toml.

    Example: relay sources add github --public-url https://hooks.example

    KIND is `generic`, a preset such as github, or another kind that `relay plugins list` lists; on a terminal
    without KIND, the command asks. It checks the new table and appends it to the file. Then it prints where
    to store the secret, and how to set up the sender. `relay reload` adds the source to the running daemon.
    """
    file = find_config(config)
    known = offered(dirs_of(file))
    is_interactive = kind is None
    if kind is None:
        kind = _ask_kind(known)
    chosen = chosen_kind(kind, known, verify)
    if is_interactive:
        name = name or click.prompt("Name of the source", default=kind)
    name = checked_name(name or kind)
    if is_interactive and kind == GENERIC and verify is None:
        choice = click.prompt("Verification", default="hmac", type=OneOf(tuple(_VERIFY)))
        chosen = chosen_kind(kind, known, choice)
    default_path = path_of(chosen, kind, name)
    if is_interactive:
        path = path or (click.prompt("Path", default=default_path) if default_path else None)
        public_url = public_url or click.prompt("Public URL of the relay", default=HOST)
    given = _place(chosen, name, secret_env, secret_file, secret_credential)
    if is_interactive and "env" in given and secret_env is None:
        given = {"env": click.prompt("Environment variable with the secret", default=given["env"])}
    added = make_source(
        kind, chosen, name, path=path or default_path, public_url=public_url, place=given, settings=settings
    )
    if not only_print:
        _append(file, added, given_of(file, env_files))
    _report(added, file, is_written=not only_print, as_json=as_json)


def is_terminal() -> bool:
    """Return whether somebody can answer questions."""
    return sys.stdin.isatty()


def _ask_kind(known: Known) -> str:
    if not is_terminal():
        raise click.UsageError(f"name the kind of source: {', '.join(known)}")
    print_kinds(known)
    answer: str = click.prompt("Kind", type=OneOf(tuple(known)), show_choices=False)
    return answer


def print_kinds(known: Known) -> None:
    """Print a line for each kind of source, or only the names if the lines do not fit the screen."""
    if sys.stdout.isatty() and len(known) >= shutil.get_terminal_size().lines:
        names = ", ".join(known)
        click.echo("\n".join(screen.wrap(f"Kinds of sender: {names}", screen.terminal_width())))
        click.echo(f"`{GENERIC}` reads any other sender's requests.")
        return
    for each, (_, preset) in known.items():
        title = (
            "Any other sender" if each == GENERIC else "" if preset is None else kind_of(preset).guide.title
        )
        click.echo(f"  {each:<22} {title}".rstrip())


def path_of(chosen: Kind, kind: str, name: str) -> str:
    """Return the path that a source has by default; "" for a kind with its own paths."""
    path = chosen.guide.default_path.replace("{name}", name)
    return path if kind == name else path.replace(f"/{kind}", f"/{name}")


def chosen_kind(kind: str, known: Known, verify: str | None) -> Kind:
    """Return the facts about a kind; `verify` is the method of a generic source.

    Raises:
        CommandError: the kind does not exist.
        UsageError: `verify` is given for a kind other than generic.
    """
    if kind == GENERIC:
        steps: tuple[str, ...] = ("Set the URL of the webhook to {url}",)
        if verify in (None, "bearer"):
            steps += ("Set the header `Authorization` to `Bearer`, a space and the value of {secret}",)
        secret = "the secret that the sender uses"  # noqa: S105 - a description
        guide = Guide(title="the sender", docs="", secret=secret, default_path="/hooks/{name}", steps=steps)
        return Kind(guide=guide, verify=_VERIFY[verify or "bearer"])
    if kind not in known:
        hint = f"kinds: {', '.join(known)}; `generic` reads any sender's requests"
        raise CommandError(f'unknown kind of source "{kind}"{guess(kind, known)}', hint=hint, code=NOTHING)
    if verify is not None:
        raise click.UsageError(f"--verify applies only to generic; {kind} has its own verification")
    source, preset = known[kind]
    if preset is not None:
        return kind_of(preset)
    guide = Guide(
        title="the sender",
        docs="",
        secret="a token that you choose",  # noqa: S106 - a description
        default_path="",
        steps=(
            "Set its base URL to {url}; docs/sources.md has the paths",
            "Set its token to the value of {secret}",
        ),
    )
    return Kind(guide=guide, verify="none", tokens="tokens" in source.__struct_fields__)


def checked_name(name: str) -> str:
    """Return the name of a source.

    Raises:
        BadParameter: it is not a valid name.
    """
    try:
        return validators.name(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--name") from None


def _place(
    kind: Kind, name: str, variable: str | None, file: str | None, credential: str | None
) -> dict[str, str]:
    """Return the reference to the secret for config.toml; empty without a secret."""
    named = {"env": variable, "file": file, "credential": credential}
    given = {key: value for key, value in named.items() if value is not None}
    if len(given) > 1:
        raise click.UsageError("give only one of --secret-env, --secret-file and --secret-credential")
    if not kind.secrets_key:
        if given:
            raise click.UsageError("senders are not verified, so there is no secret")
        return {}
    suffix = {"public_keys": "PUBLIC_KEY", "tokens": "TOKEN"}.get(kind.secrets_key, "WEBHOOK_SECRET")
    return given or {"env": variable_for(name, suffix)}


def variable_for(name: str, suffix: str) -> str:
    """Return the name of an environment variable for a secret of a source."""
    text = f"{name}_{suffix}".upper().replace("-", "_")
    return f"_{text}" if text[:1].isdigit() else text


def make_source(
    kind: str,
    chosen: Kind,
    name: str,
    *,
    path: str,
    public_url: str | None,
    place: Mapping[str, str],
    verify_place: Mapping[str, str] | None = None,
    settings: Sequence[str] = (),
) -> Added:
    """Return the new source; `place` refers to its secret, `verify_place` to the token of its handshake.

    Raises:
        UsageError: its sender signs the URL, and `public_url` is missing.
        BadParameter: a setting is not KEY=VALUE.
    """
    if chosen.signs_url and public_url in (None, HOST):
        raise click.UsageError(
            f"{chosen.guide.title} signs the URL: give its scheme and host with --public-url,"
            " such as --public-url https://hooks.example"
        )
    base = (public_url or HOST).rstrip("/")
    table: dict[str, Any] = {"plugin": kind, "path": path} if path else {"plugin": kind}
    secrets: list[Needed] = []
    words = {"url": f"{base}{path}", "secret": "the secret", "verify_token": "the verify token"}
    if place:
        table[chosen.secrets_key] = [dict(place)]
        [(where, words["secret"])] = place.items()
        secrets.append(Needed(where, words["secret"], chosen.guide.secret))
    if chosen.has_verify_token:
        given = verify_place or {"env": variable_for(name, "VERIFY_TOKEN")}
        [(where, words["verify_token"])] = given.items()
        table["verify_tokens"] = [dict(given)]
        secrets.append(Needed(where, words["verify_token"], chosen.guide.verify_token))
    if chosen.signs_url:
        table["public_url"] = base
    if kind == GENERIC:
        table |= {"verify": chosen.verify, "type": "{body:type}"}
    for setting in settings:
        _merge(table, _setting(setting))
    return Added(
        name=name,
        url=words["url"],
        table="\n".join(as_toml({"sources": {name: table}})).strip(),
        secrets=tuple(secrets),
        title=chosen.guide.title,
        docs=chosen.guide.docs,
        steps=tuple(fill(step, words) for step in chosen.guide.steps),
    )


def fill(step: str, words: Mapping[str, str]) -> str:
    """Replace the placeholders of a step."""
    for word, value in words.items():
        step = step.replace(f"{{{word}}}", value)
    return step


def _setting(text: str) -> dict[str, Any]:
    """Read `key=value`: a TOML value, or else text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise click.BadParameter(f'expected KEY=VALUE, got "{text}"', param_hint="--set")
    for written in (value, json.dumps(value)):
        try:
            return tomllib.loads(f"{key} = {written}")
        except tomllib.TOMLDecodeError:
            continue
    raise click.BadParameter(f'"{key}" is not a key of TOML', param_hint="--set")


def _merge(table: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def _append(file: Path, added: Added, given: Given) -> None:
    """Append a source's table to config.toml, if the whole file is valid with it.

    Raises:
        ConfigError: the file has problems, or would have problems with the table; nothing was written.
        CommandError: the file already has a source of this name, or cannot be written.
    """
    document = read(file)
    if added.name in document.data.get("sources", {}):
        hint = "choose another name with --name, or edit the file"
        raise CommandError(f'the source "{added.name}" already exists in {file}', hint=hint)
    content = file.read_bytes()
    newline = "\r\n" if b"\r\n" in content else "\n"
    text = "\n" if content.endswith(b"\n") or not content else "\n\n"
    addition = f"{text}{added.table}\n".replace("\n", newline).encode()
    try:
        check_text(file, content + addition, given)
        with file.open("ab") as end:
            end.write(addition)
    except OSError as error:
        hint = "run the command as a user who may write it, or use --print and paste the table"
        raise file_error(f"cannot write {file}", error, hint) from None


def check_text(file: Path, content: bytes, given: Given, *, what: str = "the new table") -> None:
    """Check a configuration before it is written to `file`; missing secrets are no problem.

    Raises:
        ConfigError: it has problems; `what` names the part that causes them.
        OSError: no file can be written in the folder.
    """
    with tempfile.NamedTemporaryFile(dir=file.absolute().parent, prefix=".", suffix=".toml") as trial:
        trial.write(content)
        trial.flush()
        try:
            load(Path(trial.name), given, lenient=True)
        except ConfigError as error:
            renamed = [
                msgspec.structs.replace(problem, file=str(file)) if problem.file == trial.name else problem
                for problem in error.problems
            ]
            number = count(len(renamed), "problem")
            raise ConfigError(renamed, hint=f"{number} with {what}; nothing was written") from None


def _report(added: Added, file: Path, *, is_written: bool, as_json: bool) -> None:
    if as_json:
        print_json(msgspec.to_builtins(added) | {"file": str(file), "written": is_written})
        return
    if is_written:
        click.echo(f"{file}: added the source {added.name}\n")
    click.echo(f"{added.table}\n\nOn this machine:\n")
    print_steps(_local_steps(added, file))
    click.echo(f"\nAt {added.title}{f', {added.docs}' if added.docs else ''}:\n")
    print_steps(added.steps)
    click.echo(f"\nThen try it: relay send {added.name}")
    if HOST in added.url:
        click.echo(f"replace {HOST} with the public URL of this relay, or set it with --public-url", err=True)


def print_steps(steps: Sequence[str]) -> None:
    """Print a numbered list; on a terminal, in lines that fit."""
    for number, step in enumerate(steps, 1):
        head = f"{number}. "
        lines = screen.wrap(step, screen.terminal_width() - len(head)) if sys.stdout.isatty() else [step]
        click.echo(head + f"\n{' ' * len(head)}".join(lines))


def _local_steps(added: Added, file: Path) -> list[str]:
    """Return the steps on this machine: store the secrets, and apply the file."""
    service = service_of(file)
    steps, needs_restart = [], False
    for secret in added.secrets:
        if secret.place == "env":
            where = "in the environment of `relay serve`"
            if service is not None and service.env_files:
                where = f"in {service.env_files[0][0]}, as a line {secret.name}='…'"
            steps.append(f"Set {secret.name} {where}: {secret.what}")
            needs_restart |= service is None
        elif secret.place == "credential":
            steps.append(f"Add LoadCredential={secret.name}:… to the unit: {secret.what}")
            needs_restart = True
        else:
            steps.append(f"Write {secret.name}: {secret.what}")
        if "you choose" in secret.what:
            steps[-1] += " (for example the output of `openssl rand -hex 32`)"
    restart = "Restart `relay serve`" if service is None else f"Run `systemctl restart {service.name}`"
    return [
        *steps,
        f"{restart}, which reads environment and credentials" if needs_restart else "Run `relay reload`",
    ]
