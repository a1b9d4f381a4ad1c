"""The pages that are generated from the commands: help pages, and the table in docs/cli.md.

`python -m tests.golden` rewrites both. Read the difference before you commit it.
"""

import re
from pathlib import Path

import click
from click.testing import CliRunner
from commands import EVERY, LEAVES

from relay.cli import main

HELP = Path(__file__).parent / "help"
PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
TABLE = re.compile(r"(<!-- begin: .*? -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def help_of(path):
    """Return the help page of a command."""
    return CliRunner().invoke(main, [*path, "--help"], prog_name="relay", terminal_width=100).output


def file_of(path):
    """Return the file of a command's help page."""
    return HELP / f"{'-'.join(('relay', *path))}.txt"


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


def write():
    """Rewrite the help pages and the table."""
    for file in HELP.iterdir():
        file.unlink()
    for path in EVERY:
        file_of(path).write_text(help_of(path))
    PAGE.write_text(TABLE.sub(lambda match: match[1] + table() + match[3], PAGE.read_text()))
