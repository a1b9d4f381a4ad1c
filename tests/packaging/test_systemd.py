"""Messages between systemd and the daemon, over a real notify socket and inherited sockets."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import threading
import time
import tomllib
from pathlib import Path

import pytest
from daemons import SERVE, SOURCES, Daemon, Manager, Recorder, adorn, destination, running, write_config
from machines import needs
from prometheus_client import ProcessCollector
from support import FakeClock, until
from wire import exchange, request

from relay import app as app_module
from relay.app import App
from relay.cli import COMMANDS
from relay.cli.main import CONFIG
from relay.config.schema import Server
from relay.delivery import dispatcher
from relay.errors import RelayError
from relay.metrics import Metrics
from relay.plugin_loading.loader import load
from relay.process.systemd import Inherited, Notifier
from relay.process.watchdog import Watchdog
from relay.store.sqlite import store as sqlite

ROOT = Path(__file__).parents[2]


@pytest.fixture
def manager(tmp_path, monkeypatch):
    manager = Manager(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    yield manager
    manager.close()


@pytest.fixture
def listening():
    """A listening TCP socket, as a .socket unit opens it."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as sock:
        yield sock


@pytest.fixture
def private():
    """Another one, for the admin side."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as sock:
        yield sock


# --- messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("notify", "expected"),
    [
        (lambda n: n.ready("serving"), {"READY": "1", "STATUS": "serving"}),
        (lambda n: n.stopping("draining"), {"STOPPING": "1", "STATUS": "draining"}),
        (lambda n: n.status("two\nlines"), {"STATUS": "two lines"}),
        (lambda n: n.alive(), {"WATCHDOG": "1"}),
        (lambda n: n.extend(2.5), {"EXTEND_TIMEOUT_USEC": "2500000"}),
    ],
)
def test_each_message_has_the_words_of_sd_notify(manager, notify, expected):
    notify(Notifier())
    manager.values("")
    assert manager.messages == [expected]


def test_a_reload_message_has_the_monotonic_time(manager):
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    Notifier().reloading()
    assert manager.values("RELOADING") == ["1"]
    [moment] = manager.values("MONOTONIC_USEC")
    assert before <= int(moment) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_an_address_with_an_at_sign_is_abstract():
    manager = Manager(f"\0hookferry-test-{os.getpid()}")
    Notifier({"NOTIFY_SOCKET": f"@hookferry-test-{os.getpid()}"}).alive()
    assert manager.values("WATCHDOG") == ["1"]
    manager.close()


def test_an_unreachable_manager_is_logged_once(tmp_path, caplog):
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).alive()
    assert "cannot notify systemd of WATCHDOG=1" in caplog.text


def test_without_a_manager_nothing_is_sent(caplog):
    Notifier({}).ready("serving")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "often"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_fed_only_if_systemd_watches_this_process(environment, seconds):
    assert Notifier(environment).watchdog == seconds


# --- sockets that systemd opened ------------------------------------------------------------------------


def handed(names, pid=None):
    return {"LISTEN_PID": str(pid or os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": names}


def test_an_inherited_socket_is_used_once_by_its_name(listening):
    inherited = Inherited(handed("public"), first=os.dup(listening.fileno()))
    assert inherited.names == {"public"}
    assert inherited.take("admin") is None
    with inherited.take("public") as sock:
        assert sock.getsockname() == listening.getsockname()
        assert not os.get_inheritable(sock.fileno())
    assert inherited.take("public") is None


def test_sockets_for_another_process_are_not_touched(listening):
    assert Inherited(handed("public", pid=1), first=listening.fileno()).names == set()
    assert listening.getsockname()


def test_a_socket_that_does_not_listen_is_refused():
    with socket.socket() as sock, pytest.raises(RelayError, match="not a listening TCP socket"):
        Inherited(handed("public"), first=os.dup(sock.fileno())).take("public")


def test_two_sockets_of_one_name_are_refused(listening):
    first = 200  # and the next one: surely free
    os.dup2(listening.fileno(), first)
    os.dup2(listening.fileno(), first + 1)
    environment = {**handed("public:public"), "LISTEN_FDS": "2"}
    with pytest.raises(RelayError, match="two sockets are called 'public'"):
        Inherited(environment, first=first)
    os.close(first + 1)


# --- the daemon -----------------------------------------------------------------------------------------


async def test_a_daemon_notifies_systemd_of_its_states(tmp_path, manager):
    config = write_config(tmp_path, SOURCES)
    async with Daemon(config) as daemon:
        await until(lambda: manager.values("READY") == ["1"])
        assert "READY" not in manager.messages[0]
        assert manager.values("EXTEND_TIMEOUT_USEC")
        assert manager.values("STATUS") == ["serving 5 sources and 0 destinations"]
        fed = len(manager.values("WATCHDOG"))
        await until(lambda: len(manager.values("WATCHDOG")) > fed + 3)
        daemon.process.send_signal(signal.SIGHUP)
        await until(lambda: manager.values("READY") == ["1", "1"])
        assert manager.values("RELOADING") == ["1"]
        assert manager.values("STOPPING") == []
        assert await daemon.stop() == 0
    assert manager.values("STOPPING") == ["1"]
    assert manager.values("STATUS")[-1] == "draining"


async def test_a_long_migration_requests_more_time(tmp_path, manager, monkeypatch):
    migrate, end = sqlite.migrate, threading.Event()

    async def long(connection, path):
        await connection.create_function("wait", 0, end.wait)
        await connection.execute("SELECT wait()")
        await migrate(connection, path)

    monkeypatch.setattr(sqlite, "migrate", long)
    app = App(load(write_config(tmp_path, SOURCES)))
    life = asyncio.create_task(app.run())
    try:
        await until(lambda: len(manager.values("EXTEND_TIMEOUT_USEC")) > 5)
        assert len(manager.values("WATCHDOG")) > 5
        assert manager.values("READY") == []
        end.set()
        await until(lambda: manager.values("READY"))
        asked = len(manager.values("EXTEND_TIMEOUT_USEC"))
        await beats(app.watchdog, 4)
        assert len(manager.values("EXTEND_TIMEOUT_USEC")) == asked
    finally:
        end.set()
        app.stopping.set()
        await life


async def test_a_long_drain_requests_more_time_while_it_progresses(tmp_path, manager):
    async with Recorder() as receiver:
        receiver.open.clear()
        config = write_config(tmp_path, SOURCES, destination("crm", receiver.url))
        async with running(config) as relay:
            await relay.exchange(request("POST", "/v1/events", adorn()))
            await until(lambda: receiver.busy)
            relay.app.stopping.set()
            await until(lambda: manager.values("STOPPING"))
            asked = len(manager.values("EXTEND_TIMEOUT_USEC"))
            await until(lambda: len(manager.values("EXTEND_TIMEOUT_USEC")) > asked + 3)
            receiver.open.set()


async def test_the_watchdog_starves_while_the_event_loop_is_blocked(tmp_path, manager):
    async with running(write_config(tmp_path, SOURCES)):
        await until(lambda: len(manager.values("WATCHDOG")) > 3)
        fed = len(manager.values("WATCHDOG"))
        threading.Event().wait(0.3)  # three deadlines
        assert len(manager.values("WATCHDOG")) == fed
        await until(lambda: len(manager.values("WATCHDOG")) > fed)


async def beats(watchdog, count):
    """Wait for this many intervals of the watchdog."""
    asked, stuck = [], watchdog._stuck
    watchdog._stuck = lambda: asked.append(1) or stuck()
    await until(lambda: len(asked) > count)


async def test_the_watchdog_starves_while_the_writer_is_stuck(tmp_path, manager, monkeypatch):
    monkeypatch.setattr(app_module, "WRITER_PATIENCE", 0.1)
    async with running(write_config(tmp_path, SOURCES)) as relay:
        writer = relay.app.store.database.writer
        write, let_go = writer._committer.write, asyncio.Event()

        async def wait(transaction, batch):
            await let_go.wait()
            await type(writer._committer).write(writer._committer, transaction, batch)

        monkeypatch.setattr(writer._committer, "write", wait)
        sender = asyncio.create_task(relay.exchange(request("POST", "/v1/events", adorn())))
        await until(lambda: "not ready: the store's writer is stuck" in manager.values("STATUS"))
        fed = len(manager.values("WATCHDOG"))
        await beats(relay.app.watchdog, 4)
        assert len(manager.values("WATCHDOG")) == fed
        answer = await exchange(relay.addresses.admin, request("GET", "/ready"))
        assert (answer.status, answer.json["reasons"]) == (503, ["the store's writer is stuck"])
        let_go.set()
        monkeypatch.setattr(writer._committer, "write", write)
        assert (await sender).status == 200
        await until(lambda: len(manager.values("WATCHDOG")) > fed)


async def test_the_watchdog_starves_while_no_due_delivery_is_picked_up(tmp_path, manager, monkeypatch):
    monkeypatch.setattr(dispatcher, "STUCK_AFTER", 100_000)
    async with Recorder() as receiver:
        config = write_config(tmp_path, SOURCES, destination("crm", receiver.url))
        async with running(config) as relay:
            claim, let_go = relay.app.store.deliveries.claim, asyncio.Event()

            async def stall(*args, **named):
                await let_go.wait()
                return await claim(*args, **named)

            monkeypatch.setattr(relay.app.store.deliveries, "claim", stall)
            relay.app.dispatcher.lanes["crm"].wake()
            wanted = "not ready: due deliveries to crm are not picked up"
            await until(lambda: wanted in manager.values("STATUS"))
            fed = len(manager.values("WATCHDOG"))
            await beats(relay.app.watchdog, 4)
            assert len(manager.values("WATCHDOG")) == fed
            let_go.set()
            await until(lambda: len(manager.values("WATCHDOG")) > fed)


async def test_a_dead_receiver_does_not_starve_the_watchdog(tmp_path, manager, monkeypatch):
    monkeypatch.setattr(dispatcher, "STUCK_AFTER", 100_000)
    config = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/nobody"))
    async with running(config) as relay:
        for number in range(12):
            await relay.exchange(request("POST", "/v1/events", adorn(f"s{number}")))
        await until(lambda: relay.app.dispatcher.lanes["crm"].held)
        fed = len(manager.values("WATCHDOG"))
        await until(lambda: len(manager.values("WATCHDOG")) > fed + 8)
        assert relay.app._stuck() == []


def test_a_failed_reload_ends_with_ready(manager):
    watchdog = Watchdog(Notifier(), stuck=list, status=lambda: "serving")
    with pytest.raises(RelayError), watchdog.reloading():
        raise RelayError("no such file")
    assert manager.values("RELOADING") == ["1"]
    assert manager.values("READY") == ["1"]
    assert manager.values("STATUS") == ["reloading", "serving"]


async def test_starvation_is_logged_once(manager, caplog):
    watchdog = Watchdog(Notifier(), stuck=lambda: ["the loop limps"], status=lambda: "limping")
    watchdog.started()
    for _ in range(3):
        watchdog._beat()
        watchdog.stop()
    assert caplog.text.count("stuck, so the watchdog gets no more keep-alives: the loop limps") == 1
    assert manager.values("WATCHDOG") == []


def test_a_lane_that_keeps_claiming_is_not_stuck():
    class Lane:
        refills = ((0, True), (0, True))

    clock, lane = FakeClock(), Lane()
    watch = dispatcher.StuckLanes(clock)
    for look in range(5):
        lane.refills = ((look, True), (look, True))
        assert watch.find({"crm": lane}) == []
        clock.advance(59)
    assert watch.find({"crm": lane}) == []
    clock.advance(2)
    assert watch.find({"crm": lane}) == ["crm"]
    lane.refills = ((4, True), (5, False))
    assert watch.find({"crm": lane}) == ["crm"]
    lane.refills = ((5, True), (5, False))
    assert watch.find({"crm": lane}) == []


# --- the unit files -------------------------------------------------------------------------------------

UNITS = ROOT / "systemd"
needs_systemd = needs("systemd-analyze")  # of the package systemd


@pytest.fixture
def units(tmp_path):
    """The units in one folder, with their program replaced by one that every machine has."""
    for file in (*UNITS.glob("*.service"), *UNITS.glob("*.socket")):
        text = file.read_text().replace("/opt/relay/bin/relay", "/bin/true")
        (tmp_path / file.name).write_text(text)
    return sorted(tmp_path.iterdir())


def settings(unit):
    """Return the settings of a unit by name; of several equal names, the last one counts."""
    lines = [line for line in unit.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def analyze(*arguments):
    command = ("systemd-analyze", *map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


@needs_systemd
def test_systemd_analyze_finds_no_fault_in_the_units(units):
    assert len(units) == 3
    verified = analyze("verify", "--man=no", *units)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


@needs_systemd
def test_systemd_analyze_finds_an_injected_fault(units):
    [service] = [unit for unit in units if unit.suffix == ".service"]
    service.write_text(service.read_text().replace("ProtectClock=yes", "ProtectClok=yes"))
    assert "ProtectClok" in analyze("verify", "--man=no", service).stderr


@needs_systemd
def test_the_security_exposure_of_the_service_is_at_most_1_4(units):
    [service] = [unit for unit in units if unit.suffix == ".service"]
    judged = analyze("security", "--offline=true", "--threshold=14", service)
    assert judged.returncode == 0, judged.stdout
    service.write_text(service.read_text().replace("ProtectSystem=strict\n", "").replace("User=relay\n", ""))
    assert analyze("security", "--offline=true", "--threshold=14", service).returncode != 0


def test_the_service_can_read_user_names_for_the_audit_log():
    found = settings(UNITS / "relay.service")
    hiding = {"PrivateUsers", "PrivateUsersEx", "UserNamespacePath", "DynamicUser", "RootImage"}
    assert found.keys() & hiding == set()  # with these, the log would show "nobody"


@pytest.mark.parametrize("unit", ["relay.service", "relay.socket", "relay-admin.socket"])
def test_every_setting_of_a_unit_has_a_comment(unit):
    section, explained, bare = "", False, []
    for line in (UNITS / unit).read_text().splitlines():
        if line.startswith("["):
            section, explained = line, False
        elif line.startswith("#"):
            explained = True
        elif not line:
            explained = False
        elif section == "[Service]" and not explained:
            bare.append(line)
    assert bare == []


def test_the_socket_units_match_the_default_listeners():
    config = tomllib.loads((ROOT / "config.toml").read_text())
    for unit, name, listen in (
        ("relay.socket", "public", config["server"]["listen"]),
        ("relay-admin.socket", "admin", config["admin"]["listen"]),
    ):
        lines = (UNITS / unit).read_text().splitlines()
        assert f"ListenStream={listen}" in lines
        assert f"FileDescriptorName={name}" in lines


def test_the_service_waits_longer_than_a_stop_may_take():
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)s$", (UNITS / "relay.service").read_text(), re.MULTILINE)
    assert int(seconds) > Server().shutdown_grace


def test_the_service_can_read_the_files_for_metrics_of_its_process(monkeypatch):
    def named(registry):
        return {family.name for family in registry.collect() if family.name.startswith("process_")}

    monkeypatch.setattr(ProcessCollector, "_boot_time", lambda _: open("/proc/none"))  # noqa: PTH123, SIM115
    assert named(Metrics().registry) == set()  # without /proc/stat, as with ProcSubset=pid
    monkeypatch.undo()
    assert "process_resident_memory" in "".join(named(Metrics().registry))
    assert "ProcSubset=" not in re.sub(r"(?m)^#.*", "", (UNITS / "relay.service").read_text())


@needs_systemd
def test_the_credential_lines_on_the_page_are_valid(units):
    page = (ROOT / "docs" / "install.md").read_text()
    [line] = re.findall(r"`(LoadCredential=[^`]+)`", page)
    [service] = [unit for unit in units if unit.suffix == ".service"]
    service.write_text(service.read_text().replace("[Install]", f"{line}\n\n[Install]"))
    verified = analyze("verify", "--man=no", service)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    service.write_text(service.read_text().replace(line, "LoadCredential=c/r/m:/etc/crm"))
    assert 'Credential name "c/r/m" not valid' in analyze("verify", "--man=no", service).stderr


def test_an_invalid_configuration_does_not_cause_a_restart_loop():
    found = settings(UNITS / "relay.service")
    assert found["RestartPreventExitStatus"] == str(CONFIG)
    assert found["StartLimitIntervalSec"] == "0"  # a limit refuses the start by hand, and fails the sockets
    assert [
        name for name in found if name.startswith("ExecStartPre")
    ] == []  # it would fail before a socket is held


def test_the_service_starts_after_a_database_on_the_same_machine_and_stops_before_it():
    found = settings(UNITS / "relay.service")
    assert {"postgresql.service", "pgbouncer.service"} <= set(found["After"].split())
    assert "postgresql" not in found.get("Requires", "") + found["Wants"]  # an outage stops no relay


def test_the_commands_of_the_service_exist():
    service = (UNITS / "relay.service").read_text()
    named = re.findall(r"^Exec\w+=/opt/relay/bin/relay ([\w-]+)", service, re.MULTILINE)
    assert named
    assert set(named) <= set(COMMANDS)


# --- socket activation ----------------------------------------------------------------------------------

ACTIVATED = """\
exec 3<&"$1" 4<&"$2"
shift 2
LISTEN_PID=$$ LISTEN_FDS=2 exec systemd-socket-activate --fdname=public:admin "$@"
"""
"""systemd-socket-activate, with two sockets that outlive it, as those of .socket units do."""

RESTARTS = int(os.environ.get("RELAY_TEST_RESTARTS", "2"))


@needs_systemd
async def test_restarts_behind_socket_units_are_not_noticed_by_senders(tmp_path, manager, listening, private):
    config = write_config(tmp_path, SOURCES)
    host, port = listening.getsockname()
    statuses = []

    async def start():
        starts = len(manager.values("READY"))
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", ACTIVATED, "bash", str(listening.fileno()), str(private.fileno())),
            *("--setenv=NOTIFY_SOCKET", *SERVE, "-c", str(config)),
            pass_fds=[listening.fileno(), private.fileno()],
            stderr=asyncio.subprocess.DEVNULL,
        )
        await until(lambda: len(manager.values("READY")) > starts)
        return process

    async def send():
        while True:
            answer = await exchange(f"http://{host}:{port}", request("POST", "/v1/events", adorn()))
            statuses.append(answer.status)

    senders = [asyncio.create_task(send()) for _ in range(4)]
    process = await start()
    try:
        for _ in range(RESTARTS):
            answered = len(statuses)
            await until(lambda least=answered: len(statuses) > least + 20)
            process.terminate()
            assert await process.wait() == 0
            process = await start()
        answered = len(statuses)
        await until(lambda: len(statuses) > answered + 20)
        admin_host, admin_port = private.getsockname()
        admin = await exchange(f"http://{admin_host}:{admin_port}", request("GET", "/ready"))
        assert admin.status == 200
    finally:
        failed = [sender.exception() for sender in senders if sender.done()]
        for sender in senders:
            sender.cancel()
        await asyncio.gather(*senders, return_exceptions=True)
        process.terminate()
        await process.wait()
    assert failed == []
    assert set(statuses) == {200}
    assert len(manager.values("READY")) == RESTARTS + 1
