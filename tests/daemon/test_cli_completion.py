"""Completion of names and ids in the shell, from a daemon that runs."""

import asyncio
import fcntl
import json
import math
import os
import pty
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import time

import pytest
from click.shell_completion import BashComplete
from daemons import SOURCES, adorn, destination, running, write_config
from machines import needs
from test_workers import register
from wire import exchange, request

from relay.cli import completion, main


@pytest.fixture
async def relay(tmp_path):
    crm = destination("crm", "http://127.0.0.1:1", "paused = true")
    config = write_config(tmp_path, SOURCES, crm, destination("crm2", "http://127.0.0.1:1"))
    async with running(config) as relay:
        for session in ("s-1", "s-2", "s-3"):
            await relay.exchange(request("POST", "/v1/events", adorn(session)))
        yield relay


def complete(words, typed, *options):
    """Return the completions of a word after other words, with their descriptions."""
    shell = BashComplete(main, {}, "relay", "_RELAY_COMPLETE")
    return {each.value: each.help for each in shell.get_completions([*words.split(), *options], typed)}


async def test_names_and_ids_are_completed(relay, monkeypatch):
    monkeypatch.setenv("RELAY_SOCKET", str(relay.addresses.socket))
    event = (await relay.operator("GET", "/api/events"))["items"][0]["id"]
    delivery = (await relay.operator("GET", "/api/deliveries"))["items"][0]["id"]
    first = next(row["id"] for row in await relay.rows())
    bare, plain = event.removeprefix("evt_"), event.removeprefix("evt_").replace("-", "")
    nobody = json.dumps({"filter": {"subject": "nobody"}}).encode()
    replay = (await exchange(relay.addresses.socket, request("POST", "/api/replays", nobody))).json["id"]
    cases = (
        ("destinations show", "", {"crm", "crm2"}),
        ("destinations pause --for 1h", "crm2", {"crm2"}),
        ("events replay --to", "c", {"crm", "crm2"}),
        ("deliveries list --destination", "x", set()),
        ("sources pause", "ad", {"adorn"}),
        ("tail --source", "ado", {"adorn"}),
        ("events list --type", "adorn.s", {"adorn.session.started"}),
        ("deliveries list --type", "moddy", set()),
        ("send", "lazy", {"lazychat"}),
        ("explain --source", "mod", {"moddy"}),
        ("verify --destination", "crm", {"crm", "crm2"}),
        ("jobs run", "ret", {"retention"}),
        ("events show", event[:-1], {event}),
        ("events show", bare[:-1], {bare}),
        ("events body", plain[:-1], {plain}),
        (f"events delete {event}", first, {first}),
        ("events show", "evt_x", set()),
        ("explain", event, {event}),
        ("deliveries show", delivery[:-1], {delivery}),
        ("deliveries retry", delivery, {delivery}),
        ("deliveries list --event", event, {event}),
        ("replays show", "rp", {replay}),
        ("replays cancel", replay.removeprefix("rpl_")[:-1], {replay.removeprefix("rpl_")}),
        ("replays show", "rpl_x", set()),
    )
    for words, typed, expected in cases:
        found = await asyncio.to_thread(complete, words, typed)
        assert found.keys() == expected, (words, typed)
    before = {row["id"] for row in await relay.rows()}
    found = await asyncio.to_thread(complete, "events delete", "ev")
    after = {row["id"] for row in await relay.rows()}  # with what the relay itself reports meanwhile
    assert before <= found.keys() <= after
    assert (await asyncio.to_thread(complete, "destinations show", "crm"))["crm"] == "paused in config.toml"
    [about] = (await asyncio.to_thread(complete, "deliveries show", delivery)).values()
    assert about.startswith("adorn.session.started to crm")
    # An old id is completed if its beginning is unique.
    monkeypatch.setattr("relay.api.names.RECENT", 1)
    oldest = next(row["id"] for row in await relay.rows())
    assert (await asyncio.to_thread(complete, "events show", oldest[:-1])).keys() == {oldest}
    assert await asyncio.to_thread(complete, "events show", oldest[:6]) != {}  # the latest one
    delivery = (await relay.rows("deliveries"))[0]["id"]
    assert (await asyncio.to_thread(complete, "deliveries cancel", delivery)).keys() == {delivery}


async def test_workers_are_completed_by_their_source_and_the_line_names_the_relay(relay):
    for worker in ("worker-1", "worker-2", "other"):
        await relay.exchange(register(worker))
    socket_ = ("--socket", str(relay.addresses.socket))
    for words in ("workers show whatsapp", "workers forget whatsapp", "workers maintenance whatsapp"):
        assert (await asyncio.to_thread(complete, words, "w", *socket_)).keys() == {"worker-1", "worker-2"}
    assert await asyncio.to_thread(complete, "workers show adorn", "w", *socket_) == {}
    assert (await asyncio.to_thread(complete, "workers show", "wh", *socket_)).keys() == {"whatsapp"}


class Bash:
    """Runs the function that `relay completion bash` registers."""

    describes_from = math.inf  # candidates: with fewer, the shell shows no texts beside them

    def __init__(self, environment):
        self._environment = environment

    def complete(self, line):
        """Return the candidates for the last word of a line, with their descriptions."""
        at = len(line.split(" ")) - 1
        ask = f'COMP_WORDS=({line}); COMP_CWORD={at}; _relay_completion relay; echo "${{COMPREPLY[@]}}"'
        return dict.fromkeys(self._run("bash", "-c", f'eval "$(relay completion bash)"; {ask}').split(), "")

    def _run(self, *command):
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stderr == ""
        return done.stdout


class Fish(Bash):
    """Runs `complete -C` of fish, which returns what TAB offers."""

    describes_from = 1

    def complete(self, line):
        text = self._run("fish", "-c", f"relay completion fish | source; complete -C {shlex.quote(line)}")
        return dict(each.partition("\t")[::2] for each in text.splitlines())


class Zsh(Bash):
    """Types a line into an interactive zsh on a terminal, and presses TAB."""

    describes_from = 2
    _START = (
        'autoload -U compinit && compinit -u; eval "$(relay completion zsh)"; unsetopt LIST_AMBIGUOUS; '
        """LISTMAX=1000; shown() { print -r -- "<$BUFFER>E""ND" }; zle -N shown; """
        "bindkey '^I' complete-word; bindkey '^X' shown\n"
    )

    def complete(self, line):
        process, terminal = pty.fork()
        if process == 0:
            os.execvpe("zsh", ["zsh", "-f", "-i"], self._environment)
        try:
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
            os.write(terminal, self._START.encode())
            os.write(terminal, b"\x18")
            self._read_until(terminal, "<>END")
            os.write(terminal, f"{line}\t\x18".encode())
            text = self._read_until(terminal, ">END")
        finally:
            os.close(terminal)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        listing, _, buffer = text.removesuffix(">END").rpartition("<")
        if buffer.endswith(" "):  # of a unique candidate
            return {buffer.split()[-1]: ""}
        rows = listing.split("\n")[1:-1]  # a row has all candidates with one text
        return {name: listing for row in rows for name in row.partition(" -- ")[0].split()}

    @staticmethod
    def _read_until(terminal, end):
        text, deadline = "", time.monotonic() + 60
        while not text.rstrip("\r\n").endswith(end):
            assert time.monotonic() < deadline, repr(text)
            if select.select([terminal], [], [], 0.1)[0]:
                text += os.read(terminal, 65_536).decode()
        return text.rstrip("\r\n")


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param(Bash, id="bash", marks=needs("bash")),
        pytest.param(Zsh, id="zsh", marks=needs("zsh")),
        pytest.param(Fish, id="fish", marks=needs("fish")),
    ],
)
async def test_a_shell_completes_names_and_ids_from_the_running_daemon(relay, tmp_path, shell):
    command = tmp_path / "bin" / "relay"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom relay.cli import main\nmain(prog_name='relay')\n")
    command.chmod(0o755)
    paths = f"{command.parent}:{os.environ['PATH']}"
    socket_, home = str(relay.addresses.socket), str(tmp_path)
    shell = shell({"PATH": paths, "HOME": home, "RELAY_SOCKET": socket_, "TERM": "dumb", "LC_ALL": "C.UTF-8"})
    for worker in ("w,1", "w,2"):
        await relay.exchange(register(worker))
    event = (await relay.operator("GET", "/api/events"))["items"][-1]["id"]
    deliveries = (await relay.operator("GET", "/api/deliveries"))["items"]
    cases = (
        ("relay destinations show cr", {"crm": "paused in config.toml", "crm2": ""}),
        (f"relay events show {event[:-1]}", {event: ""}),
        ("relay deliveries show dlv", {each["id"]: f"{each['destination']}, pending" for each in deliveries}),
        ("relay workers show whatsapp w", {"w,1": "whatsapp, ONLINE", "w,2": "whatsapp, ONLINE"}),
    )
    for line, expected in cases:
        found = await asyncio.to_thread(shell.complete, line)
        assert found.keys() == expected.keys(), line
        if len(expected) >= shell.describes_from:
            assert all(about in found[name] for name, about in expected.items()), found


@pytest.mark.parametrize("listens", [False, True], ids=["no relay", "a relay that hangs"])
def test_without_an_answer_nothing_is_completed_and_nothing_is_printed(
    tmp_path, monkeypatch, capsys, listens
):
    monkeypatch.setattr(completion, "TIMEOUT", 0.1)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        if listens:
            listener.bind(str(path))
            listener.listen()
        monkeypatch.setenv("RELAY_SOCKET", str(path))
        began = time.monotonic()
        assert complete("destinations show", "") == {}
    assert time.monotonic() - began < 5
    assert capsys.readouterr() == ("", "")
