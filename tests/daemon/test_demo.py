"""`relay serve --demo`, as the real command."""

import asyncio
import io
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import aiohttp
import pytest
from click.testing import CliRunner
from postgres import database_of, name_of, needs_postgres, server
from samples import sources

from relay.cli import main
from relay.config.secrets import Secret
from relay.demo import keeper
from relay.demo.cluster import _refuse_used
from relay.demo.receiver import Receiver
from relay.demo.run import choose_listen, write_config
from relay.demo.server import binaries
from relay.demo.story import Arrival, DemoReceiver, Narrator, steps_of
from relay.errors import RelayError
from relay.plugin_loading.loader import load
from relay.signing import Signer

SECRET = Secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
ARRIVALS = [
    "adorn.image.shared",
    "compozy.user.created",
    "lazychat.plugin.updated",
    "moddy.member_joined",
    "whatsapp.qr_ready",
    "whatsapp.worker.registered",
    "whatsapp.worker.offline",
    "whatsapp.worker.unregistered",
]
"""The events of the bundled sources in the order of their delivery."""
PATIENCE = 30  # seconds, for a machine that is busy with other things
LATE = """
from relay.cli import main
from relay.demo import story
story.PATIENCE = 0.2
steps_of = story.steps_of
story.steps_of = lambda source: [
    story.Step(step.sample, ("moddy.never",), None) if source.name == "moddy" else step
    for step in steps_of(source)
]
main(["serve", "--demo", "--exit"])
"""


@asynccontextmanager
async def demo(folder, *arguments, code="from relay.cli import main; main()", patience=PATIENCE):
    """Run the command in `folder`, its temporary files beneath; it is killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        *arguments,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(patience):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()  # closes the pipe as well


async def read_until(process, text):
    lines = []
    while line := (await process.stdout.readline()).decode():
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"it ended before it printed {text!r}:\n{''.join(lines)}")


async def test_with_exit_the_demo_ends_with_0_after_every_sample_arrived(tmp_path):
    async with demo(tmp_path, "serve", "--demo", "--exit") as process:
        output = (await process.communicate())[0].decode()
        assert process.returncode == 0, output
    delivered = re.findall(r"delivered +([a-z._]+)(?: \(.+\))?, signature valid, \d+ ms\n", output)
    assert [type_ for type_ in delivered if type_ in ARRIVALS] == ARRIVALS, output
    assert output.count(" response   20") == output.count(" sent ") > len(ARRIVALS) - 1
    assert f"{len(delivered)} events delivered, every signature valid." in output
    assert "\x1b" not in output
    assert list(tmp_path.iterdir()) == []


async def test_with_exit_a_missing_sample_ends_the_demo_with_1(tmp_path):
    async with demo(tmp_path, code=LATE) as process:
        output = (await process.communicate())[0].decode()
        assert process.returncode == 1, output
    assert "moddy.never did not arrive within 0.2 s" in output
    assert "every signature valid." not in output


async def test_the_demo_serves_until_ctrl_c_and_leaves_nothing_behind(tmp_path):
    async with demo(tmp_path, "serve", "--demo") as process:
        lines = await read_until(process, "curl -i")
        await post(shlex.split(lines[-1]))
        arrived = await read_until(process, "compozy.hello.world")
        assert re.search(r"delivered +compozy\.hello\.world, signature valid", arrived[-1])
        [folder] = tmp_path.glob("hookferry-demo-*")
        assert any(str(folder) in line for line in lines)
        process.send_signal(signal.SIGINT)
        rest = (await process.communicate())[0].decode()
        assert (process.returncode, rest) == (0, "")
    assert list(tmp_path.iterdir()) == []


async def post(curl):
    """Send the request of the printed command."""
    options = list(itertools.pairwise(curl))
    headers = dict(value.split(": ", 1) for option, value in options if option == "-H")
    [body] = [value for option, value in options if option == "-d"]
    async with (
        aiohttp.ClientSession() as session,
        session.post(curl[2], data=body.encode(), headers=headers) as response,
    ):
        assert response.status == 202, await response.text()


def test_exit_needs_demo():
    result = CliRunner().invoke(main, ["serve", "--exit"])
    assert result.exit_code == 2
    assert "--exit needs --demo" in result.output


def test_the_demo_configures_every_bundled_source_and_knows_the_events_of_its_samples(tmp_path):
    config = load(write_config(tmp_path, listen="127.0.0.1:0", receiver="http://127.0.0.1:9", secret=SECRET))
    assert set(config.config.sources) == set(sources())
    for source in config.config.sources.values():
        steps = steps_of(source)
        assert [step.sample for step in steps] == list(source.settings.samples())
        assert any(step.types for step in steps)
    whatsapp = steps_of(config.config.sources["whatsapp"])
    assert [step.types for step in whatsapp] == [
        ("whatsapp.qr_ready",),
        ("whatsapp.worker.registered",),
        (),
        ("whatsapp.worker.unregistered",),
    ]


def test_the_demo_uses_the_default_port_or_a_free_one():
    with socket.socket() as rival:
        rival.bind(("127.0.0.1", 0))
        usual = f"127.0.0.1:{rival.getsockname()[1]}"
        assert choose_listen(usual) == "127.0.0.1:0"
    assert choose_listen(usual) == usual
    assert choose_listen(usual, leave=True) == "127.0.0.1:0"


async def test_the_receiver_detects_a_forged_signature():
    body = b'{"type": "moddy.member_left", "timestamp": "2024-01-20T15:30:00.000Z", "subject": "1"}'
    other = Secret("whsec_" + "B" * 32)
    async with DemoReceiver(SECRET) as receiver, aiohttp.ClientSession() as session:
        now = int(time.time())
        answers = []
        for secret in (SECRET, other):
            headers = Signer((secret,)).headers("evt_1", now, body)
            async with session.post(receiver.url, data=body, headers=headers) as response:
                answers.append(response.status)
        arrivals = [await receiver.arrivals.get() for _ in answers]
    assert urlsplit(receiver.url).hostname == "127.0.0.1"
    assert answers == [204, 401]
    assert [arrival.problem is None for arrival in arrivals] == [True, False]
    assert arrivals[0].type == "moddy.member_left"
    assert "no signature matches" in str(arrivals[1].problem)


def test_the_receiver_prints_no_traceback_for_a_sender_that_disconnects(capsys):
    def fail(error):
        raise error

    with Receiver((), lambda _: None) as receiver:
        for error in (ConnectionResetError, ZeroDivisionError):
            try:
                fail(error)
            except error:
                receiver.handle_error(None, ("127.0.0.1", 1))
    shown = capsys.readouterr().err
    assert "ZeroDivisionError" in shown
    assert "ConnectionResetError" not in shown


@pytest.mark.parametrize(
    ("terminal", "environ", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {"FORCE_COLOR": "1"}, True),
    ],
)
def test_colour_is_for_terminals_and_force_color(terminal, environ, coloured):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    Narrator(stream, environ).arrived(Arrival(type="a.b", subject=None, milliseconds=2.5, problem=None))
    assert ("\x1b[32msignature valid\x1b[0m" in stream.getvalue()) is coloured
    assert ("\x1b" in stream.getvalue()) is coloured


def test_on_a_terminal_no_line_is_wider_than_the_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    stream.isatty = lambda: True
    narrator = Narrator(stream, {"NO_COLOR": "1"})
    narrator.step("lazychat", "response", "200 " + "x" * 200)
    narrator.arrived(Arrival(type="a.b", subject="s" * 200, milliseconds=2.5, problem=None))
    response, delivered = stream.getvalue().splitlines()
    assert (len(response), response[-3:]) == (80, "...")
    assert (len(delivered), delivered[-29:]) == (80, "sss..., signature valid, 2 ms")


def test_an_invalid_signature_and_a_long_response_print_one_line_each():
    stream = io.StringIO()
    narrator = Narrator(stream, {})
    narrator.step("moddy", "response", "x" * 500)
    narrator.arrived(Arrival(type="a.b", subject="s", milliseconds=1, problem="no signature matches"))
    long, refused = stream.getvalue().splitlines()
    assert len(long) < 120
    assert long.endswith("x...")
    assert refused.split() == ["refused", "a.b", "(s),", "no", "signature", "matches"]


def test_an_event_type_that_the_terminal_cannot_show_does_not_end_the_demo():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Narrator(stream, {}).step("", "delivered", "compozy.größe")
    assert raw.getvalue() == b"          delivered  compozy.gr\\xf6\\xdfe\n"


# --- a cluster ----------------------------------------------------------------------------------------


SHORT = """
from relay.cli import main
from relay.demo import cluster
cluster.RATE, cluster.WARM_UP, cluster.AFTERWARDS = 15.0, 1.0, 0.5
main()
"""


@needs_postgres
async def test_a_cluster_loses_nothing_when_a_node_is_killed_and_ctrl_c_ends_it(tmp_path):
    command = ("serve", "--demo", "--nodes", "2")
    async with demo(tmp_path, *command, code=SHORT, patience=6 * PATIENCE) as process:
        lines = []
        while not lines or "the cluster runs for" not in lines[-1]:
            line = (await process.stdout.readline()).decode()
            assert line, "".join(lines)
            lines.append(line)
        text = "".join(lines)
        [acknowledged, delivered, of] = re.findall(
            r"acknowledged (\d+) events, delivered (\d+) of (\d+) deliveries, lost 0", text
        )[0]
        assert int(acknowledged) > 50
        assert int(delivered) == int(of) == 6 * int(acknowledged)
        assert re.search(r"killed (node-\d) with SIGKILL; it ran \w+", text)
        assert "nothing was lost" in text
        for line in (await process.stdout.readline(), await process.stdout.readline()):
            config = re.search(rb"-c (\S+)", line)[1]
            assert os.stat(config).st_mode & 0o77 == 0  # noqa: PTH116 - other users must not read it
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
    assert list(tmp_path.iterdir()) == []
    assert not _processes_below(tmp_path)


KEPT = """
import asyncio, os, sys, tempfile
from relay.demo import keeper
keeper.KEEP = f"from relay.demo import keeper; keeper.SHORT = {tempfile.gettempdir()!r}; keeper.main()"
NODE = "from relay.demo.keeper import end_with_the_demo; end_with_the_demo(); import time; time.sleep(600)"
async def demo():
    async with keeper.kept(with_server=True) as kept:
        node = await asyncio.create_subprocess_exec(sys.executable, "-c", NODE, "node", stdin=kept.pipe)
        print(os.getpid(), kept.folder, kept.url, flush=True)
        await asyncio.sleep(600)
asyncio.run(demo())
"""
KEPT_AS_NOBODY = """
import os, sys, tempfile
from relay.demo import keeper
keeper.SHORT = tempfile.gettempdir()
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
keeper.main()
"""


@pytest.fixture
def temporary():
    """A folder for temporary files that the users postgres and nobody may enter, with a short path."""
    with TemporaryDirectory(prefix="relay-keeper-", dir="/tmp") as name:
        Path(name).chmod(0o1777)
        yield Path(name)


@needs_postgres
async def test_the_next_demo_removes_the_files_of_a_killed_demo_and_keeper(temporary, monkeypatch):
    with _program(temporary, KEPT) as process:
        line = process.stdout.readline().decode()
        assert "hookferry-postgres-" in line
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        monkeypatch.setattr(keeper, "SHORT", str(temporary))
        monkeypatch.setattr(keeper, "UNLOCKED", 0.0)
        assert keeper.remove_abandoned() == []  # both run
        [keeping] = [pid for pid, arguments in _children(process.pid) if "keeper.main" in arguments]
        [node] = [pid for pid, arguments in _children(process.pid) if "keeper.main" not in arguments]
        [pid_file] = temporary.glob("hookferry-postgres-*/data/postmaster.pid")
        server_pid = int(pid_file.read_text().split()[0])
        os.kill(keeping, signal.SIGKILL)
        os.kill(process.pid, signal.SIGKILL)
        await _until_gone(node, keeping)
    assert _runs(server_pid)
    assert len(keeper.remove_abandoned()) == 2
    await _until_gone(server_pid)
    assert list(temporary.iterdir()) == []


@needs_postgres
async def test_a_user_without_rights_gets_a_server_that_ends_with_the_demo(temporary):
    with _program(temporary, KEPT_AS_NOBODY, "server") as process:
        first = json.loads(process.stdout.readline())
        assert first["error"] is None, first
        [pid_file] = temporary.glob("hookferry-postgres-*/data/postmaster.pid")
        server_pid = int(pid_file.read_text().split()[0])
        process.stdin.close()  # as if the demo had been killed
        assert process.wait(PATIENCE) == 0
    await _until_gone(server_pid)
    assert list(temporary.iterdir()) == []


@contextmanager
def _program(folder, code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "TMPDIR": str(folder)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _children(pid):
    """Return the ids and arguments of a process's children."""
    ids = [
        int(each)
        for path in Path(f"/proc/{pid}/task").iterdir()
        for each in (path / "children").read_text().split()
    ]
    return [(each, Path(f"/proc/{each}/cmdline").read_bytes().decode()) for each in ids]


async def _until_gone(*pids):
    async with asyncio.timeout(PATIENCE):
        while any(_runs(pid) for pid in pids):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.02)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--nodes", "3"], "--nodes needs --demo"),
        (["--demo", "--storage", "postgresql://db/relay"], "--storage needs --nodes"),
        (["--demo", "--nodes", "1"], 'expected a number from 2 to 9, got "1"'),
        (["--demo", "--nodes", "2", "--storage", "postgresql://a:hunter2@db/relay"], "contains a password"),
        (["--demo", "--nodes", "2", "--storage", "mysql"], 'expected "postgresql://USER@HOST'),
    ],
)
def test_wrong_uses_of_the_cluster_demo_are_refused(arguments, problem):
    result = CliRunner().invoke(main, ["serve", *arguments])
    assert result.exit_code == 2
    assert problem in result.output
    assert "hunter2" not in result.output


def test_a_missing_server_is_explained(monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RelayError) as caught:
        binaries()
    assert "apt-get install postgresql" in caught.value.hint


def test_a_missing_package_is_explained_before_a_server_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    result = CliRunner().invoke(main, ["serve", "--demo", "--nodes", "2", "--exit"])
    assert result.exit_code == 1
    assert f"install it: {sys.executable} -m pip install asyncpg" in result.output
    assert "temporary" not in result.output


@needs_postgres
def test_the_cluster_demo_uses_only_an_empty_database(tmp_path):
    url = database_of(tmp_path)
    _refuse_used(url)
    server().run("CREATE TABLE meta (name text, value text); CREATE TABLE events ()", name_of(url))
    server().run("INSERT INTO meta VALUES ('version', '2')", name_of(url))
    with pytest.raises(RelayError):
        _refuse_used(url)


def _processes_below(folder):
    """Return the ids of processes with a path in the folder among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(path.parent.name)
    return found
