"""`relay init`: write config.toml, the files of its secrets and, where the unit needs one, a drop-in."""

import base64
import ipaddress
import os
import secrets as random
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import click
import msgspec

from relay.cli.add_source import (
    GENERIC,
    HOST,
    Added,
    Kind,
    Known,
    check_text,
    checked_name,
    chosen_kind,
    is_terminal,
    make_source,
    offered,
    path_of,
    print_kinds,
    print_steps,
)
from relay.cli.config import STARTER, given_of
from relay.cli.main import NOT_ALLOWED, CommandError, OneOf, file_error
from relay.cli.options import FILE, checked, json_option, read_file
from relay.cli.output import print_json, print_note
from relay.config import validators
from relay.config.effective import as_toml
from relay.config.installed_service import FOLDERS, Service, installed
from relay.config.json_schema import SCHEMA
from relay.config.schema import Admin, Server
from relay.config.secrets import Url

RECEIVER = "http://127.0.0.1:9000/"
"""The default destination: `relay listen` receives there."""

_PRIVILEGED = 1024  # ports below need a capability
_BIND = "CAP_NET_BIND_SERVICE"


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the new installation."""

    path: Path
    content: str
    mode: int
    is_secret: bool = False
    about: str = ""  # the value that the operator must still write into it


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A command to try."""

    command: str
    keeps_running: bool = False


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A destination."""

    name: str
    url: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The answers to all questions."""

    folder: Path
    sources: Mapping[str, str]  # kinds by name
    targets: Sequence[Target]
    public_url: str
    listen: str
    admin_listen: str
    service: Service | None  # None: in the foreground, here

    @property
    def config(self) -> Path:
        """The new configuration."""
        return self.folder / "config.toml"


@click.command()
@click.argument("folder", type=FILE, required=False)
@click.option(
    "--source",
    "named",
    multiple=True,
    metavar="[NAME=]KIND",
    help="Accept a kind of sender: generic, github, … Repeatable.",
)
@click.option(
    "--to", "urls", multiple=True, metavar="[NAME=]URL", help="Deliver all events to this URL. Repeatable."
)
@click.option(
    "--run", type=OneOf(("here", "service")), help="In the foreground, or as the installed service."
)
@click.option("--public-url", help=f'Scheme and host that senders use.  [default: "{HOST}"]')
@click.option(
    "--listen",
    callback=checked(validators.listen),
    default=Server().listen,
    show_default=True,
    help="Address of the public listener.",
)
@click.option(
    "--admin-listen",
    callback=checked(validators.listen),
    default=Admin().listen,
    show_default=True,
    help="Address of the admin listener.",
)
@click.option(
    "--secret",
    "secret_files",
    multiple=True,
    metavar="NAME=FILE",
    help="Take the secret of a source or destination from a file. Repeatable.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace existing files, and keep the old ones with the suffix .old."
)
@click.option("-y", "--yes", is_flag=True, help="Ask nothing; use the defaults.")
@json_option
def init(
    folder: Path | None,
    *,
    named: tuple[str, ...],
    urls: tuple[str, ...],
    run: str | None,
    public_url: str | None,
    listen: str,
    admin_listen: str,
    secret_files: tuple[str, ...],
    overwrite: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Set up a relay: config.toml, secrets and, for a service, its unit.

    Example: relay init --source github --to https://crm.example.com/hooks

    FOLDER is the current folder, or for a service the folder of its configuration. On a terminal, the command
    asks for missing values. Without a terminal, it needs --yes. It writes new secrets to files that only the
    user of the relay can read, and keeps an existing secret. Then it prints how to set up the senders, and
    commands to try.
    """
    asks = not yes
    if asks and not is_terminal():
        raise click.UsageError("standard input is not a terminal: add --yes, and set values with options")
    service = _service(run, asks=asks)
    folder = folder or (service.config.parent if service else Path())
    known = offered(())
    sources = _sources(named, known, asks=asks)
    plan = Plan(
        folder=folder,
        sources=sources,
        public_url=public_url or (click.prompt("Public URL of the relay", default=HOST) if asks else HOST),
        targets=_targets(urls, sources, asks=asks),
        listen=listen,
        admin_listen=admin_listen,
        service=service,
    )
    _check_place(plan)
    kinds = {name: chosen_kind(kind, known, None) for name, kind in plan.sources.items()}
    added = [_source(plan, name, kind) for name, kind in kinds.items()]
    files = [*_secrets(plan, kinds, _given(secret_files), asks=asks), *_rest(plan, added)]
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        check_text(
            plan.config, files[-1].content.encode(), given_of(plan.config, ()), what="this configuration"
        )
    except OSError as error:
        raise file_error(f"cannot write {plan.folder}", error, "choose another FOLDER") from None
    states = _write(plan, files, overwrite=overwrite, asks=asks)
    _report(plan, added, files, states, as_json=as_json)


# --- questions ------------------------------------------------------------------------------------------


def _service(run: str | None, *, asks: bool) -> Service | None:
    """Return the service that runs the relay, or None."""
    service = installed()
    if run is None and asks and service is not None:
        run = click.prompt(
            "Run it here in the foreground, or as the service", "service", type=OneOf(("here", "service"))
        )
    if run != "service":
        return None
    if service is None:
        hint = "install the package or the unit first: docs/install.md; or use --run here"
        raise CommandError("relay.service is not installed", hint=hint)
    if os.geteuid() != 0:
        hint = "run the command as root, or use --run here"
        raise CommandError(f"only root can set up {service.name}", hint=hint, code=NOT_ALLOWED)
    return service


def _sources(named: Sequence[str], known: Known, *, asks: bool) -> dict[str, str]:
    """Return the kind of each source by its name."""
    if not named and asks:
        print_kinds(known)
        named = click.prompt("Senders, separated by commas", default=GENERIC).replace(",", " ").split()
    found: dict[str, str] = {}
    for text in named or (GENERIC,):
        name, _, kind = text.rpartition("=")
        chosen_kind(kind, known, None)
        name = checked_name(name or kind)
        if name in found:
            raise click.BadParameter(
                f'two sources have the name "{name}"; write NAME=KIND', param_hint="--source"
            )
        found[name] = kind
    return found


def _targets(urls: Sequence[str], taken: Collection[str], *, asks: bool) -> list[Target]:
    """Return the destinations. Their names differ from those of sources: both are names of secret files."""
    if not urls and asks:
        urls = (click.prompt("Deliver to this URL", default=RECEIVER),)
    found: dict[str, Target] = {}
    for text in urls or (RECEIVER,):
        name, equals, url = text.partition("=")
        if not equals or "://" in name:
            name, url = "", text
        try:
            url = validators.url(Url(url)).reveal()
            name = validators.name(name or _name_of(url))
        except ValueError as error:
            raise click.BadParameter(f"{text}: {error}", param_hint="--to") from None
        if name in found or name in taken:
            raise click.BadParameter(f'the name "{name}" is taken; write NAME=URL', param_hint="--to")
        found[name] = Target(name=name, url=url)
    return list(found.values())


def _name_of(url: str) -> str:
    """Return the name of a destination by the first label of its host, such as "crm"."""
    host = urlsplit(url).hostname or ""
    return "receiver" if _is_private(host) else host.partition(".")[0]


def _is_private(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def _given(secret_files: Sequence[str]) -> dict[str, str]:
    """Return the secrets that files contain, by the name of their source or destination."""
    found = {}
    for text in secret_files:
        name, equals, file = text.partition("=")
        if not equals or not name or not file:
            raise click.BadParameter(f'expected NAME=FILE, got "{text}"', param_hint="--secret")
        found[name] = read_file(Path(file), "--secret").decode("utf-8", "replace").strip()
    return found


def _check_place(plan: Plan) -> None:
    """Check that the service can see the folder."""
    if plan.service is None:
        return
    folder = plan.folder.absolute()
    for hidden, why in plan.service.given().hidden.items():
        if folder.is_relative_to(hidden):
            hint = "choose another folder, such as /etc/relay"
            raise CommandError(f"{folder} is hidden from {plan.service.name} by {why}", hint=hint)


# --- files ----------------------------------------------------------------------------------------------


def _source(plan: Plan, name: str, kind: Kind) -> Added:
    """Return a source whose steps name the files of its secrets as this shell finds them."""
    added = make_source(
        plan.sources[name],
        kind,
        name,
        path=path_of(kind, plan.sources[name], name),
        public_url=plan.public_url,
        place={"file": f"secrets/{name}"} if kind.secrets_key else {},
        verify_place={"file": f"secrets/{name}-verify-token"},
    )
    steps = tuple(
        step.replace(f"secrets/{name}", str(plan.folder / "secrets" / name)) for step in added.steps
    )
    title = f"the sender of {name}" if added.title == "the sender" else added.title
    return msgspec.structs.replace(added, steps=steps, title=title)


def _secrets(
    plan: Plan, kinds: Mapping[str, Kind], given: Mapping[str, str], *, asks: bool
) -> Iterator[Written]:
    """Yield the file of each secret; an existing file stays unchanged."""
    unknown = given.keys() - kinds.keys() - {target.name for target in plan.targets}
    if unknown:
        names = ", ".join((*kinds, *(target.name for target in plan.targets)))
        raise click.BadParameter(
            f'"{min(unknown)}" has no secret here; names: {names}', param_hint="--secret"
        )
    for name, kind in kinds.items():
        if kind.secrets_key:
            is_ours = "you choose" in kind.guide.secret or plan.sources[name] == GENERIC
            about = "" if is_ours else kind.guide.secret
            value = given.get(name, "")
            if about and not value and asks and not (plan.folder / "secrets" / name).exists():
                what = f"{kind.guide.title}: {about} (leave it empty to set it later)"
                value = click.prompt(what, default="", hide_input=True, show_default=False)
            if (
                not value
                and kind.secrets_key == "public_keys"
                and not (plan.folder / "secrets" / name).exists()
            ):
                raise click.UsageError(
                    f"{name} needs {about}: write it to a file and add --secret {name}=FILE"
                )
            yield _secret(plan, name, value or _generated(about), about="" if value else about)
        if kind.has_verify_token:
            yield _secret(plan, f"{name}-verify-token", random.token_hex(32))
    for target in plan.targets:
        yield _secret(plan, target.name, given.get(target.name) or _generated("whsec_"))


def _generated(about: str) -> str:
    if "whsec_" in about:
        return f"whsec_{base64.b64encode(random.token_bytes(32)).decode()}"
    return random.token_hex(32)


def _secret(plan: Plan, name: str, value: str, *, about: str = "") -> Written:
    path = plan.folder / "secrets" / name
    return Written(path=path, content=f"{value}\n", mode=0o600, is_secret=True, about=about)


def _rest(plan: Plan, added: Sequence[Added]) -> Iterator[Written]:
    """Yield the drop-in, if the unit needs one, and then config.toml."""
    if plan.service is not None and (lines := list(_dropin(plan, plan.service))):
        path = FOLDERS[0] / f"{plan.service.name}.d" / "init.conf"
        yield Written(path=path, content="".join(f"{line}\n" for line in lines), mode=0o644)
    mode = 0o644 if plan.service is None else 0o640
    yield Written(path=plan.config, content=_config(plan, added), mode=mode)


def _dropin(plan: Plan, service: Service) -> Iterator[str]:
    lines = []
    if os.path.realpath(service.config) != os.path.realpath(plan.config):
        program = shlex.split(service.settings["ExecStart"][-1])[0].lstrip("@-:+!")
        config = plan.config.absolute()
        lines += ["ExecStart=", f"ExecStart={program} serve -c {config}"]
        lines += ["ExecReload=", f"ExecReload={program} reload -c {config}"]
    ports = [int(text.rpartition(":")[2]) for text in (plan.listen, plan.admin_listen)]
    if any(0 < port < _PRIVILEGED for port in ports):
        lines += [f"AmbientCapabilities={_BIND}", f"CapabilityBoundingSet={_BIND}"]
    if lines:
        yield from ("# Written by `relay init`.", "[Service]", *lines)


def _config(plan: Plan, added: Sequence[Added]) -> str:
    """Return the text of config.toml: the head of the starter file, and the tables."""
    starter, _, _ = STARTER.read_text().partition("[sources.")
    _, _, head = starter.partition("\n\n")
    for former, listen in ((Server().listen, plan.listen), (Admin().listen, plan.admin_listen)):
        head = head.replace(f'listen = "{former}"', f'listen = "{listen}"')
    destinations = {
        target.name: {
            "url": target.url,
            "events": ["*"],
            "secrets": [{"file": f"secrets/{target.name}"}],
        }
        | ({"allow_private": True} if _is_private(urlsplit(target.url).hostname or "") else {})
        for target in plan.targets
    }
    return "\n".join(
        [
            f"#:schema {SCHEMA.as_uri()}",
            "# Written by `relay init`. `relay config show` has all keys; `relay sources add` adds a source.",
            *(() if plan.service else ('state_dir = "state"', "")),
            head.strip(),
            *(f"\n{each.table}" for each in added),
            *as_toml({"destinations": destinations}),
            "",
        ]
    )


def _write(plan: Plan, files: Sequence[Written], *, overwrite: bool, asks: bool) -> dict[Path, str]:
    """Write all files; return the state of each: written, replaced or kept."""
    states = {}
    for file in files:
        states[file.path] = "written"
        if file.path.exists():
            states[file.path] = "kept" if file.is_secret else "replaced"
    for path in (path for path, state in states.items() if state == "replaced" and not overwrite):
        if not asks or not click.confirm(
            f"{path} exists. Replace it (the previous one becomes {path.name}.old)?"
        ):
            hint = "--overwrite replaces it; `relay sources add` adds a sender to it"
            raise CommandError(f"{path} already exists; nothing was written", hint=hint)
    for file in files:
        if states[file.path] != "kept":
            try:
                _put(plan, file)
            except OSError as error:
                raise file_error(f"cannot write {file.path}", error, "choose another FOLDER") from None
            except LookupError as error:
                raise CommandError(
                    f"cannot write {file.path}: {error}", hint="systemd-sysusers relay.conf"
                ) from None
    return states


def _put(plan: Plan, file: Written) -> None:
    """Write a file under another name, then move it to its place."""
    folder = file.path.parent
    if not folder.is_dir():
        folder.mkdir(parents=True, mode=0o700 if file.is_secret else 0o755)
        if plan.service and file.is_secret:
            shutil.chown(folder, plan.service.user, plan.service.group)
    part = file.path.with_name(f".{file.path.name}.part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)
    part.write_text(file.content)
    if plan.service and file.is_secret:
        shutil.chown(part, plan.service.user, plan.service.group)
    elif plan.service and file.path == plan.config:
        shutil.chown(part, group=plan.service.group)
    part.chmod(file.mode)
    if file.path.exists():
        file.path.replace(file.path.with_name(f"{file.path.name}.old"))
    part.replace(file.path)


# --- output ---------------------------------------------------------------------------------------------


def _steps(plan: Plan, files: Sequence[Written]) -> Iterator[Step]:
    """Yield the commands to try, in their order."""
    config = shlex.quote(str(plan.config))
    yield Step(command=f"relay check-config {config}")
    for target in plan.targets:
        address = urlsplit(target.url)
        if address.scheme == "http" and address.hostname in ("127.0.0.1", "localhost"):
            secret = shlex.quote(str(plan.folder / "secrets" / target.name))
            yield Step(
                command=f'relay listen {address.port or 80} --secret "$(cat {secret})"', keeps_running=True
            )
    if plan.service is None:
        yield Step(command=f"relay serve -c {config}", keeps_running=True)
    else:
        if any(file.path.suffix == ".conf" for file in files):
            yield Step(command="systemctl daemon-reload")
        yield Step(command=f"systemctl enable {plan.service.name}")
        yield Step(command=f"systemctl restart {plan.service.name}")
    yield Step(command=f"relay status -c {config}")
    for name in plan.sources:
        yield Step(command=f"relay send {shlex.quote(name)} -c {config}")
    yield Step(command=f"relay deliveries list -c {config}")


def _report(
    plan: Plan, added: Sequence[Added], files: Sequence[Written], states: Mapping[Path, str], *, as_json: bool
) -> None:
    steps = list(_steps(plan, files))
    later = [file for file in files if file.about and states[file.path] == "written"]
    if as_json:
        print_json(
            {
                "files": [{"path": str(path), "state": state} for path, state in states.items()],
                "sources": [msgspec.to_builtins(each) for each in added],
                "destinations": [msgspec.to_builtins(each) for each in plan.targets],
                "later": [{"path": str(file.path), "secret": file.about} for file in later],
                "commands": [msgspec.to_builtins(each) for each in steps],
            }
        )
        return
    for path, state in states.items():
        click.echo(f"{path}: {state}")
    for each in added:
        click.echo(f"\nAt {each.title}{f', {each.docs}' if each.docs else ''}:\n")
        print_steps(each.steps)
    if later:
        click.echo("\nRandom for now; replace them with the senders' own secrets, then run `relay reload`:\n")
        for file in later:
            click.echo(f"  {file.path}: {file.about}")
    click.echo("\nTry it (a command with … keeps running: use another terminal):\n")
    for step in steps:
        click.echo(f"  {step.command}{'   # …' if step.keeps_running else ''}")
    if plan.public_url == HOST:
        click.echo(err=True)
        print_note(f"replace {HOST} with the public URL of this relay, or set it with --public-url")
