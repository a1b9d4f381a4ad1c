"""The `relay` command as operators run it: in this process, against a running relay, or on a terminal."""

import asyncio
import fcntl
import json
import os
import signal
import struct
import sys
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import click
from click.testing import CliRunner
from support import until

from relay.cli import main


@dataclass(frozen=True)
class Output:
    """The output of a command."""

    out: str
    err: str

    @property
    def rows(self):
        """The cells of each printed line."""
        return [line.split("\t") for line in self.out.splitlines()]

    @property
    def json(self):
        return json.loads(self.out)


def parse(words):
    """Parse a command line without running it; raises click.UsageError if it does not exist."""
    command, context = main, click.Context(main, info_name="relay", **main.context_settings)
    while isinstance(command, click.Group):
        command = command.get_command(context, words[0])
        if command is None:
            raise click.UsageError(f"no command {words[0]}")
        words = words[1:]
    command.make_context("relay", list(words), parent=context).close()


def run(*args, code=0, stdin=None):
    """Run a command, check its exit code, and return its output."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return Output(result.stdout, result.stderr)


class Commands:
    """Runs commands in a thread, so that the relay in this process can respond to them."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def __call__(self, *args, code=0):
        return await asyncio.to_thread(run, *args, "--socket", self._socket, code=code)


# --- every command ------------------------------------------------------------------------------------


def tree(command=main, *path):
    """Yield all commands and groups with the words that call them."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from tree(command.get_command(context, name), *path, name)


EVERY = dict(tree())
LEAVES = {path: command for path, command in EVERY.items() if not isinstance(command, click.Group)}
"""All commands that are not groups, by the words that call them."""


@dataclass(frozen=True)
class Kind:
    """The values of one kind of argument. A word in braces stands for a value that the test has."""

    valid: str
    unknown: str = ""  # a name that nothing has, if the kind is a name
    wrong: str = ""  # a value of another type, if the kind has a type


KINDS = {
    "event": Kind("{event}", "01a201eb"),
    "delivery": Kind("{delivery}", "01a201eb"),
    "replay": Kind("{replay}", "01a201eb"),
    "refused request": Kind("{refused}", "01a201eb"),
    "destination": Kind("crm", "crn"),
    "source": Kind("adorn", "adron"),
    "worker": Kind("{worker}", "worker-9"),
    "source of workers": Kind("whatsapp", "whatsap"),
    "job": Kind("ledger", "legder"),
    "kind of source": Kind("github", "gihtub"),
    "sample": Kind("image.shared", "image.shered"),
    "new plugin": Kind("parcels"),
    "command of a worker": Kind("restart"),
    "object": Kind('{"reason": "update"}', wrong="[1]"),
    "port": Kind("{port}", wrong="many"),
    "config.toml": Kind("{config}"),
    "database": Kind("{database}"),
    "source of a move": Kind("sqlite:{file}", wrong="mysql:relay"),
    "target of a move": Kind("sqlite:{new}", wrong="mysql:relay"),
    "export": Kind("{file}"),
    "new file": Kind("{new}"),
    "new folder": Kind("{folder}"),
}
_KIND_OF = {
    ("EVENT",): "event",
    ("DELIVERY",): "delivery",
    ("REPLAY",): "replay",
    ("REQUEST",): "refused request",
    ("SOURCE",): "source",
    ("WORKER",): "worker",
    ("JSON",): "object",
    ("PORT",): "port",
    ("KIND",): "kind of source",
    ("destinations", "NAME"): "destination",
    ("sources", "NAME"): "source",
    ("jobs", "NAME"): "job",
    ("plugins", "NAME"): "new plugin",
    ("workers", "SOURCE"): "source of workers",
    ("workers", "TYPE"): "command of a worker",
    ("send", "TYPE"): "sample",
    ("check-config", "FILE"): "config.toml",
    ("config", "FILE"): "new file",
    ("db", "backup", "FILE"): "new file",
    ("db", "check", "FILE"): "database",
    ("db", "move", "FROM"): "source of a move",
    ("db", "move", "TO"): "target of a move",
    ("events", "FILE"): "export",
    ("init", "FOLDER"): "new folder",
}
"""The kind of each argument, by its word in the usage line; the words of a command before it go first."""

WANTED = {
    ("config", "init"), ("explain",), ("init",), ("send",), ("sources", "add"), ("workers", "maintenance")
}  # fmt: skip
"""Commands for which the tests pass optional arguments, because otherwise they prompt or write elsewhere."""


def kind_of(path, argument):
    """Return the kind of an argument that is not a choice.

    Raises:
        AssertionError: the argument of a new command is of an unknown kind.
    """
    word = (argument.metavar or argument.name).strip("[].").upper().strip("_")
    for known in ((*path, word), (path[0], word), (word,)):
        if known in _KIND_OF:
            return KINDS[_KIND_OF[known]]
    raise AssertionError(
        f"no test knows a value for {word} of `relay {' '.join(path)}`:"
        " add its kind to _KIND_OF (and KINDS) in tests/helpers/commands.py"
    )


def arguments(path):
    """Yield the arguments that the tests give to a command."""
    for each in LEAVES[path].params:
        if isinstance(each, click.Argument) and (each.required or each.nargs == -1 or path in WANTED):
            yield each


def value_of(path, argument, choose=lambda kind: kind.valid):
    """Return a value of an argument, by default a valid one."""
    if isinstance(argument.type, click.Choice):
        return str(argument.type.choices[0])
    return choose(kind_of(path, argument))


def arguments_of(path):
    """Return arguments with which a command sends a request to the relay; names are unknown."""
    found = [value_of(path, each, lambda kind: kind.unknown or kind.valid) for each in arguments(path)]
    return found + (["--yes"] if any("--yes" in each.opts for each in LEAVES[path].params) else [])


# --- on a terminal ------------------------------------------------------------------------------------

RELAY = (sys.executable, "-c", "from relay.cli import main; main()")
_UNSET = (
    "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES",
    "RELAY_SOCKET", "RELAY_URL", "RELAY_TOKEN", "RELAY_TOKEN_FILE",
)  # fmt: skip


class Terminal:
    """A running `relay` command with stdout on a pseudo-terminal and stderr on a pipe.

    With `keys`, stdin is the pseudo-terminal, too.
    """

    def __init__(self, *args, rows=24, columns=200, keys=False, **environment) -> None:
        self._has_keys = keys
        self._args = [str(arg) for arg in args]
        self._size = (rows, columns)
        inherited = {name: value for name, value in os.environ.items() if name not in _UNSET}
        self._environment = {**inherited, "TERM": "xterm", **environment}
        self.out = ""
        self.err = ""

    async def __aenter__(self) -> Self:
        self._ours, theirs = os.openpty()
        self.resize(*self._size)
        self.mode = termios.tcgetattr(self._ours)
        self.process = await asyncio.create_subprocess_exec(
            *RELAY,
            *self._args,
            stdin=theirs if self._has_keys else asyncio.subprocess.DEVNULL,
            stdout=theirs,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
        )
        os.close(theirs)
        os.set_blocking(self._ours, False)
        self._over = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._ours, self._read)
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.exit()
        os.close(self._ours)

    async def shows(self, text, seconds=30.0):
        """Wait until the terminal has shown the text."""
        await until(lambda: text in self.out, seconds)

    async def reports(self, text, seconds=30.0):
        """Wait until stderr contains the text."""
        await until(lambda: text in self.err, seconds)

    def press(self, keys):
        """Type keys."""
        os.write(self._ours, keys.encode())

    def resize(self, rows, columns):
        """Change the size of the terminal, as its window does."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    async def interrupt(self):
        """Press Ctrl-C, and return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return await self.exit()

    async def exit(self):
        """Wait until the command ends, and return its exit code."""
        async with asyncio.timeout(30):
            await self._over.wait()
            await self._listening
            return await self.process.wait()

    def _read(self) -> None:
        try:
            data = os.read(self._ours, 2**16)
        except OSError:  # on Linux: the other side is closed
            data = b""
        self.out += data.decode()
        if not data:
            asyncio.get_running_loop().remove_reader(self._ours)
            self._over.set()

    async def _listen(self) -> None:
        while data := await self.process.stderr.read(2**16):
            self.err += data.decode()
