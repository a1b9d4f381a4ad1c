"""A start with a configuration that cannot be used: exit code 78, or held sockets until it is corrected."""

import asyncio
import os
import signal
import socket
import time
from contextlib import asynccontextmanager

import pytest
from commands import run
from daemons import SERVE, SOURCES, Daemon, Manager, adorn, write_config
from machines import NOBODY, needs_other_users
from support import until
from wire import exchange, request

BROKEN = '[server]\nlisten_on = "x"\n'
SECRET = '[sources.moddy]\nplugin = "moddy"\ntokens = [{ env = "HOLD_TEST_TOKEN" }]\n'

HANDED = """\
exec 3<&"$1" 4<&"$2"
shift 2
export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=public:admin
exec "$@"
"""


@pytest.mark.parametrize("kind", ["broken", "absent", "no secret", "no plugin", "a folder", "none named"])
async def test_without_sockets_the_exit_code_is_78_and_every_problem_is_reported(tmp_path, kind):
    config = tmp_path / "config.toml"
    if kind == "a folder":
        config.mkdir()
    elif kind not in ("absent", "none named"):
        config.write_text(
            {"broken": BROKEN, "no secret": SECRET, "no plugin": '[sources.a]\nplugin = "nix"\n'}[kind]
        )
    daemon = Daemon(config)
    if kind == "none named":
        lines = "from relay.config import paths; paths.PLACES = (); from relay.cli import main; main()"
        daemon = Daemon(config, (SERVE[0], "-c", lines, "serve", "-c", "/nowhere/config.toml", "--force"))
    await daemon.start()
    assert await daemon.exit() == 78
    assert "Traceback" not in daemon.output
    assert str(config) in daemon.output or "/nowhere" in daemon.output


@needs_other_users
async def test_an_unreadable_config_exits_with_78(tmp_path):
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "config.toml").chmod(0o600)
    drop = (
        f"import os; import relay.app, relay.cli.serve; os.setgid({NOBODY}); os.setuid({NOBODY}); "
        "from relay.cli import main; main()"
    )
    daemon = Daemon(tmp_path / "config.toml", (SERVE[0], "-c", drop, "serve"))
    await daemon.start()
    assert await daemon.exit() == 78
    assert "cannot be read: Permission denied" in daemon.output


async def test_other_failures_to_start_exit_with_1(tmp_path):
    config = write_config(tmp_path, SOURCES)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        text = config.read_text().replace("127.0.0.1:0", f"127.0.0.1:{taken.getsockname()[1]}", 1)
        config.write_text(text)
        daemon = Daemon(config)
        await daemon.start()
        assert await daemon.exit() == 1


class Held:
    """A `relay serve` with sockets that outlive it, and requests to them."""

    def __init__(self, config, public, admin, process, lines):
        self.config = config
        self.public = "http://{}:{}".format(*public.getsockname())
        self.admin = "http://{}:{}".format(*admin.getsockname())
        self.process = process
        self.lines = lines

    async def send(self):
        return await exchange(self.public, request("POST", "/v1/events", adorn()))

    async def typed(self, *words, code=0):
        door = self.config.parent / "state" / "relay.sock"
        return await asyncio.to_thread(lambda: run(*words, "--socket", door, code=code))

    async def end(self, seconds=10):
        async with asyncio.timeout(seconds):
            return await self.process.wait()


@asynccontextmanager
async def holding(config, notify, **environ):
    lines = []
    with (
        socket.create_server(("127.0.0.1", 0), backlog=1024) as public,
        socket.create_server(("127.0.0.1", 0), backlog=1024) as admin,
    ):
        state = config.parent / "state"
        process = await asyncio.create_subprocess_exec(
            *(
                "bash",
                "-c",
                HANDED,
                "bash",
                str(public.fileno()),
                str(admin.fileno()),
                *SERVE,
                "-c",
                str(config),
            ),
            pass_fds=[public.fileno(), admin.fileno()],
            env={**os.environ, "STATE_DIRECTORY": str(state), **environ},
            stderr=asyncio.subprocess.PIPE,
        )

        async def read():
            while line := await process.stderr.readline():
                lines.append(line.decode())

        reader = asyncio.create_task(read())
        try:
            await until(lambda: notify.values("READY"))
            yield Held(config, public, admin, process, lines)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            await reader


def broken(config):
    good = config.read_text()
    config.write_text(good + BROKEN.replace("[server]", "[nonsense]"))
    return lambda: config.write_text(good)


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """The other end of a notify socket."""
    manager = Manager(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield manager
    manager.close()


@pytest.fixture
def file(tmp_path):
    return write_config(tmp_path, SOURCES)


async def test_with_sockets_senders_get_503_until_a_reload_finds_no_problem(file, manager):
    mend = broken(file)
    async with holding(file, manager) as held:
        answer = await held.send()
        assert (answer.status, answer.headers["retry-after"]) == (503, "30")
        assert answer.json["error"]["code"] == "unavailable"
        assert "nonsense" not in str(answer.json)  # senders do not learn the problem
        [status] = manager.values("STATUS")
        assert status.startswith(f"not serving: {file}:")
        assert "nonsense: unknown key" in status

        for words in (("status",), ("events", "list"), ("reload",)):
            result = await held.typed(*words, code=1)
            assert "nonsense: unknown key" in result.err, words
        assert "correct it, then `relay reload`" in (await held.typed("status", code=1)).err
        ready = await exchange(held.admin, request("GET", "/ready"))
        assert (ready.status, ready.json["ready"]) == (503, False)
        assert "nonsense: unknown key" in ready.json["reasons"][0]
        metrics = await exchange(held.admin, request("GET", "/metrics"))
        assert b"relay_config_last_reload_successful 0.0" in metrics.body
        assert (await exchange(held.admin, request("POST", "/api/reload", b"{}"))).status == 503
        assert (await held.send()).status == 503

        mend()
        result = await held.typed("reload", "--dry-run")
        assert f"a reload of {file} would make these changes: added sources.adorn" in result.out
        assert (await held.send()).status == 503
        result = await held.typed("reload")
        assert f"reloaded {file}: added sources.adorn" in result.out
        await until(lambda: manager.values("STATUS")[-1].startswith("serving"))
        assert (await held.send()).status == 200
        assert (await held.typed("status", "--json")).json["ready"] is True
        held.process.terminate()
        assert await held.end() == 0
    text = "".join(held.lines)
    assert text.count("answering 503 until") == 1
    assert text.count("sources.adorn: open to everyone") == 1  # each warning of the start once
    listens = f"has no effect: systemd listens on {held.public.removeprefix('http://')}; change ListenStream="
    assert text.count(listens) == text.count("server.listen: ") == 1
    assert text.count("admin.listen: ") == 1
    assert "relay.audit" in text or "POST /api/reload" in text
    assert "Traceback" not in text


async def test_in_standby_the_probe_of_shops_gets_200(file, manager):
    broken(file)
    async with holding(file, manager) as held:
        probe = request(
            "POST", "/api/woocommerce-plugin/events", b"{}", x_event_type="settings.checking_connection"
        )
        answer = await exchange(held.public, probe)
        assert (answer.status, answer.json) == (200, {"success": True})


async def test_no_connection_is_refused_while_standby_ends(file, manager):
    mend = broken(file)
    statuses = []

    async def send(held):
        while True:
            statuses.append((await held.send()).status)

    async with holding(file, manager) as held:
        senders = [asyncio.create_task(send(held)) for _ in range(4)]
        await until(lambda: len(statuses) > 20)
        mend()
        held.process.send_signal(signal.SIGHUP)
        await until(lambda: 200 in statuses)
        failed = [sender.exception() for sender in senders if sender.done()]
        for sender in senders:
            sender.cancel()
        await asyncio.gather(*senders, return_exceptions=True)
        held.process.terminate()
        assert await held.end() == 0
    assert failed == []
    assert set(statuses) == {503, 200}


async def test_a_sighup_that_finds_problems_stays_in_standby_and_logs_them(file, manager):
    broken(file)
    async with holding(file, manager) as held:
        file.write_text("[worse\n")
        held.process.send_signal(signal.SIGHUP)
        await until(lambda: any("config.toml is still invalid" in line for line in held.lines))
        await until(lambda: "not valid TOML" in manager.values("STATUS")[-1])
        assert (await held.send()).status == 503
        assert "not valid TOML" in (await held.typed("status", code=1)).err


async def test_standby_feeds_the_watchdog_and_stops_on_request(file, manager):
    broken(file)
    async with holding(file, manager, WATCHDOG_USEC="100000") as held:
        fed = len(manager.values("WATCHDOG"))
        await until(lambda: len(manager.values("WATCHDOG")) > fed + 3)
        held.process.terminate()
        assert await held.end() == 0
    assert manager.values("STOPPING") == ["1"]
    assert not (file.parent / "state" / "relay.sock").exists()


async def test_a_reload_finds_a_secret_added_to_the_environment_file(
    tmp_path,
    manager,
    monkeypatch,
):
    file = write_config(tmp_path, SECRET.replace("[sources.moddy]", "[sources.other]"))
    units = tmp_path / "units"
    units.mkdir()
    command = f"ExecStart=/opt/relay/bin/relay serve -c {file}"
    (units / "relay.service").write_text(f"[Service]\n{command}\nEnvironmentFile=-{tmp_path}/environment\n")
    lines = (
        "from pathlib import Path; from relay.config import installed_service as installed",
        f"installed.FOLDERS = (Path({str(units)!r}),)",
        "from relay.cli import main; main()",
    )
    monkeypatch.setattr(f"{__name__}.SERVE", (SERVE[0], "-c", "\n".join(lines), "serve"))
    async with holding(file, manager) as held:
        assert "HOLD_TEST_TOKEN is not set" in (await held.typed("reload", code=1)).err
        (tmp_path / "environment").write_text("HOLD_TEST_TOKEN=t\n")
        await held.typed("reload")
        await until(lambda: manager.values("STATUS")[-1].startswith("serving"))
        await held.typed("reload")  # the daemon itself knows the variable, too
        held.process.terminate()
        assert await held.end() == 0


async def test_hostile_senders_do_not_block_standby_for_others(file, manager):
    broken(file)
    async with holding(file, manager) as held:
        host, port = held.public.removeprefix("http://").split(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(50)]
        began = time.monotonic()
        large = request("POST", "/v1/events", b"x" * 3_000_000)
        assert (await exchange(held.public, large)).status == 503
        assert (await held.send()).status == 503
        assert time.monotonic() - began < 5
        for _, writer in silent:
            writer.close()
