"""Commands against a running relay, as an operator types them."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from relay.cli import main


@dataclass(frozen=True)
class Said:
    """What a command printed."""

    out: str
    err: str

    @property
    def rows(self):
        """The cells of what was printed, line by line."""
        return [line.split("\t") for line in self.out.splitlines()]

    @property
    def json(self):
        return json.loads(self.out)


def run(*args, code=0, stdin=None):
    """Run a command that ends with this exit code."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return Said(result.stdout, result.stderr)


class Commands:
    """Runs commands in a thread, as they block, so that the relay of this process can answer them."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def __call__(self, *args, code=0):
        return await asyncio.to_thread(run, *args, "--socket", self._socket, code=code)
