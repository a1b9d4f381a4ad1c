"""`relay plugins`."""

import importlib.util
import json
import keyword
import re
from collections.abc import Sequence
from pathlib import Path

import click

from relay.cli.exit_codes import CommandError
from relay.cli.main import Group
from relay.cli.options import config_option, json_option, quiet_option
from relay.cli.output import print_json, print_page
from relay.cli.templates import PLUGIN, TABLE, TEST, filled
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.installed_service import directories_of
from relay.config.paths import look_for_config
from relay.config.problems import ConfigError
from relay.config.tables import bind_tables
from relay.plugin_loading.loader import discover


@click.group(cls=Group)
def plugins() -> None:
    """What plugins are there, where they come from, and a new one."""


COLUMNS = ("name", "offer", "door", "version", "file")


@plugins.command("list")
@config_option
@quiet_option
@json_option
def list_(config: Path | None, *, as_json: bool, quiet: bool) -> None:
    """List what plugins offer: kinds of source, formats, jobs, and the hooks that they are told by.

    Example: relay plugins list -c /etc/relay/config.toml

    Reads `[plugins] dirs` of the configuration; without one, there are the installed and the bundled plugins.
    """
    path = look_for_config(config)
    offers, problems = discover(_dirs(path))
    found = [offering.shown() for offering in offers.listed()]
    print_page({"items": found, "next_cursor": None}, COLUMNS, as_json=as_json, quiet=quiet, key="name")
    if problems:
        raise ConfigError(problems)


@plugins.command()
@click.argument("name")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Write it there.")
@config_option
@json_option
def new(name: str, *, folder: Path | None, config: Path | None, as_json: bool) -> None:
    """Write a plugin that works, a source called NAME, and its passing test.

    Example: relay plugins new parcels

    They go into the first of `[plugins] dirs`, which is plugins.d beside the configuration unless it
    says otherwise. What is there already is not touched.
    """
    path = look_for_config(config)
    dirs = _dirs(path)
    _check(name, dirs)
    place = folder or (dirs[0] if dirs else Path("plugins.d"))
    plugin, test = place / f"{name}.py", place / f"test_{name}.py"
    _write({plugin: filled(PLUGIN, name), test: filled(TEST, name)})
    known = {known.resolve() for known in dirs} or {Path("plugins.d").resolve()}
    table = filled(TABLE, name)
    if place.resolve() not in known:
        table = f"[plugins]\ndirs = {_listed((*dirs, place))}\n\n{table}"
    if as_json:
        print_json({"name": name, "plugin": str(plugin), "test": str(test), "config": table})
        return
    click.echo(f"{plugin}: written\n{test}: written, run it with `python -m pytest {test}`")
    click.echo(f"\nAdd to {path or 'config.toml'}:\n\n{table}")
    click.echo(f"Then `relay check-config`; and once the relay is started again, `relay send {name}`.")


_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)


def _dirs(path: Path | None) -> Sequence[Path]:
    return bind_tables(Binder(read(path), directories_of(path))).plugins.dirs if path else ()


def _check(name: str, dirs: Sequence[Path]) -> None:
    """Demand that a kind, a module and a class may be called so, and none is yet."""
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or name.startswith("test_"):
        hint = f"for example `relay plugins new {_suggested(name)}`"
        raise click.UsageError(
            f'"{name}" cannot be the name of a module: a-z first, then a-z, 0-9, _; {hint}'
        )
    offers, _ = discover(dirs)
    if (rival := offers.kinds.get(name)) is not None:
        hint = "choose another name, or look at that one: `relay plugins list`"
        raise CommandError(f'there is a source of the kind "{name}" already: {rival.file}', hint=hint)
    if importlib.util.find_spec(name) is not None:
        hint = "its test could not import it; choose another name"
        raise CommandError(f'"{name}" is a module of Python or of an installed package', hint=hint)


def _suggested(name: str) -> str:
    """Make a name that will do of one that will not."""
    words = re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("test_")).strip("_0123456789")
    return words if _NAME.fullmatch(words) and not keyword.iskeyword(words) else "parcels"


def _write(files: dict[Path, str]) -> None:
    """Write all of the files, or none."""
    written: list[Path] = []
    try:
        for file, content in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x") as new_file:
                written.append(file)
                new_file.write(content)
    except OSError as error:
        for file in written:
            file.unlink(missing_ok=True)
        if isinstance(error, FileExistsError) and error.filename in set(map(str, files)):
            hint = "choose another name, or another folder with --dir"
            raise CommandError(f"{error.filename} is there already", hint=hint) from None
        where = error.filename or next(iter(files))
        raise CommandError(
            f"{where} cannot be written: {error.strerror}", hint="say where: --dir DIR"
        ) from None


def _listed(dirs: Sequence[Path]) -> str:
    return f"[{', '.join(json.dumps(str(folder)) for folder in dirs)}]"
