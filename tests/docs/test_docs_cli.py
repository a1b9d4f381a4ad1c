"""The commands match their help pages and docs/cli.md.

`make docs` rewrites the help pages and the table of docs/cli.md; read the difference
before you commit it.
"""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from commands import EVERY, LEAVES

from relay.cli import COMMANDS, exit_codes, main

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden" / "help"
PAGE_FILE = ROOT / "docs" / "cli.md"
PAGE = PAGE_FILE.read_text()
TABLE = re.compile(r"(<!-- begin: .*? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
HEAVY = ("aiohttp", "aiosqlite", "apscheduler", "pluggy", "prometheus_client")


NAMES = [" ".join(path) for path in EVERY]


def help_of(path):
    return CliRunner().invoke(main, [*path, "--help"], prog_name="relay", terminal_width=100).output


def golden(path):
    return GOLDEN / f"{'-'.join(('relay', *path))}.txt"


@pytest.mark.parametrize("path", EVERY, ids=NAMES)
def test_the_help_of_a_command_is_its_golden_page(path):
    assert help_of(path) == golden(path).read_text()


@pytest.mark.parametrize("path", LEAVES, ids=[" ".join(path) for path in LEAVES])
def test_help_begins_with_an_example_after_one_sentence(path):
    lines = [line.strip() for line in help_of(path).splitlines()]
    example = next(number for number, line in enumerate(lines) if line.startswith("Example: "))
    assert "relay " + " ".join(path) in lines[example]
    assert len([line for line in lines[:example] if not line]) == 2  # the usage and the sentence


def test_every_golden_page_belongs_to_a_command():
    assert {file.name for file in GOLDEN.iterdir()} == {golden(path).name for path in EVERY}


def table():
    """Return the table of docs/cli.md: each command with its arguments and the first sentence of its help."""
    rows = ["| command | effect |", "|---|---|"]
    for path, command in LEAVES.items():
        usage = command.collect_usage_pieces(click.Context(command))
        words = " ".join(["relay", *path, *(piece for piece in usage if piece != "[OPTIONS]")])
        sentence = " ".join(command.help.partition("\n\n")[0].split()).removesuffix(".")
        cells = [cell.replace("|", "\\|") for cell in (f"`{words}`", sentence)]
        rows.append(f"| {cells[0]} | {cells[1]} |")
    return "".join(f"{row}\n" for row in rows)


def test_the_page_has_every_command_with_the_first_sentence_of_its_help():
    assert TABLE.search(PAGE)[2] == table()


def test_every_option_on_the_page_exists():
    options = {option for command in LEAVES.values() for each in command.params for option in each.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE)) - {"--help"} <= options


@pytest.mark.parametrize("path", LEAVES, ids=[" ".join(path) for path in LEAVES])
def test_every_command_that_prints_has_json(path):
    silent = {("serve",), ("completion",), ("config", "init")}
    has = any("--json" in each.opts for each in LEAVES[path].params)
    assert has is (path not in silent)


def test_the_page_has_every_exit_code():
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    rows = re.findall(r"^\| (\d+) \| ", PAGE, re.MULTILINE)
    assert {int(row) for row in rows} == codes | {0, 2}  # 2 is click's own


def modules_of(code):
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.splitlines()[-1].split())


def test_help_imports_neither_a_command_nor_anything_heavy():
    modules = modules_of("from relay.cli import main\nmain(['--help'], standalone_mode=False)")
    assert not modules & {*HEAVY, "relay.plugin_loading.loader", "relay.store"}
    assert not modules & {where.partition(":")[0] for where, _ in COMMANDS.values()}


def test_importing_a_command_does_not_import_aiohttp():
    modules = sorted(where.partition(":")[0] for where, _ in COMMANDS.values())
    code = f"import {', '.join(modules)}"
    assert not modules_of(code) & {"aiohttp", "aiosqlite"}


if __name__ == "__main__":
    for file in GOLDEN.iterdir():
        file.unlink()
    for way in EVERY:
        golden(way).write_text(help_of(way))
    PAGE_FILE.write_text(TABLE.sub(lambda old: old[1] + table() + old[3], PAGE))
