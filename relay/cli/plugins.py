"""`relay plugins`."""

import importlib.util
import json
import keyword
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from relay.cli import screen
from relay.cli.main import CommandError, Group, file_error
from relay.cli.options import config_option, json_option, quiet_option
from relay.cli.output import print_json, print_page
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.installed_service import directories_of
from relay.config.paths import look_for_config
from relay.config.problems import ConfigError
from relay.config.tables import bind_tables
from relay.plugin_loading.loader import discover

COLUMNS = ("name", "offer", "door", "version", "file")
_SHAPE = (
    screen.text("name", least=12, long="middle"), screen.word("offer", "kind"),
    screen.text("door", "origin", least=10), screen.word("version"),
    screen.text("file", least=20, rank=1, long="middle"),
)  # fmt: skip
TEMPLATES = Path(__file__).with_name("templates")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)


@click.group(cls=Group)
def plugins() -> None:
    """List plugins and create a new one."""


@plugins.command("list")
@config_option
@quiet_option
@json_option
def list_(config: Path | None, *, as_json: bool, quiet: bool) -> None:
    """List plugins: kinds of source, formats, jobs and hooks.

    Example: relay plugins list -c /etc/relay/config.toml

    Lists the bundled plugins, those in installed packages, and those in `[plugins] dirs` of the
    configuration.
    """
    path = look_for_config(config)
    offers, problems = discover(dirs_of(path))
    found = [offering.shown() for offering in offers.listed()]
    page = {"items": found, "next_cursor": None}
    print_page(page, COLUMNS, _SHAPE, as_json=as_json, quiet=quiet, key="name")
    if problems:
        raise ConfigError(problems)


@plugins.command()
@click.argument("name")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Folder of the new files.")
@config_option
@json_option
def new(name: str, *, folder: Path | None, config: Path | None, as_json: bool) -> None:
    """Create a working source plugin NAME and its test.

    Example: relay plugins new parcels

    The default folder is the first of `[plugins] dirs`, else plugins.d beside the configuration. Existing
    files are not overwritten.
    """
    path = look_for_config(config)
    dirs = dirs_of(path)
    _check(name, dirs)
    place = folder or (dirs[0] if dirs else Path("plugins.d"))
    plugin, test = place / f"{name}.py", place / f"test_{name}.py"
    _write({plugin: filled("plugin.py", name), test: filled("test_plugin.py", name)})
    known = {known.resolve() for known in dirs} or {Path("plugins.d").resolve()}
    table = filled("source.toml", name)
    if place.resolve() not in known:
        table = f"[plugins]\ndirs = {_listed((*dirs, place))}\n\n{table}"
    if as_json:
        print_json({"name": name, "plugin": str(plugin), "test": str(test), "config": table})
        return
    click.echo(f"{plugin}: written\n{test}: written, run it with `{_python()} {test}`")
    click.echo(f"\nAdd to {path or 'config.toml'}:\n\n{table}")
    click.echo(f"Then run `relay check-config`, restart the daemon, and run `relay send {name}`.")


def _python() -> str:
    """Return the Python interpreter that has the relay installed; the test needs no other package."""
    return shlex.quote(sys.executable)


def filled(file: str, name: str) -> str:
    """Return a template of `templates/`, filled in for a kind of source such as `parcels`."""
    template = (TEMPLATES / f"{file}.template").read_text()
    class_ = "".join(word.capitalize() for word in name.split("_"))
    return template.replace("@name@", name).replace("@NAME@", name.upper()).replace("@Class@", class_)


def dirs_of(path: Path | None) -> Sequence[Path]:
    """Return the folders of plugins that a configuration names."""
    return bind_tables(Binder(read(path), directories_of(path))).plugins.dirs if path else ()


def _check(name: str, dirs: Sequence[Path]) -> None:
    """Check that a kind of source, a module and a class can have this name, and that it is free."""
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or name.startswith("test_"):
        hint = f"for example `relay plugins new {_suggested(name)}`"
        raise click.UsageError(
            f'"{name}" is not a valid module name: expected a-z first, then a-z, 0-9 or _; {hint}'
        )
    offers, _ = discover(dirs)
    if (rival := offers.kinds.get(name)) is not None:
        hint = "choose another name; `relay plugins list` lists the kinds of source"
        raise CommandError(f'a source of the kind "{name}" already exists: {rival.file}', hint=hint)
    if importlib.util.find_spec(name) is not None:
        hint = "choose another name; otherwise the plugin's test would import that module instead"
        raise CommandError(f'"{name}" is a module of Python or of an installed package', hint=hint)


def _suggested(name: str) -> str:
    """Return a valid name similar to an invalid one."""
    words = re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("test_")).strip("_0123456789")
    return words if _NAME.fullmatch(words) and not keyword.iskeyword(words) else "parcels"


def _write(files: dict[Path, str]) -> None:
    """Write all files; if one fails, leave no file behind."""
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
            raise CommandError(f"{error.filename} already exists", hint=hint) from None
        where = error.filename or next(iter(files))
        raise file_error(f"cannot write {where}", error, "choose another folder with --dir DIR") from None


def _listed(dirs: Sequence[Path]) -> str:
    return f"[{', '.join(json.dumps(str(folder)) for folder in dirs)}]"
