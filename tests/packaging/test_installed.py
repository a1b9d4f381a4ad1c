"""The installed service, as commands know it from its unit files: its environment and its user."""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
from commands import Commands, run
from daemons import Daemon, adorn, running
from machines import NOBODY, needs_other_users, needs_root
from wire import exchange, request

from relay.config import installed_service as module
from relay.config.installed_service import installed, parse_env, service_of

UNIT = """\
[Service]
ExecStart=/opt/relay/bin/relay serve -c {config}
EnvironmentFile=-{folder}/environment
User={user}
StateDirectory=hookferry-test-state
RuntimeDirectory=hookferry-test-run
"""
SECRETS = """\
[sources.moddy]
plugin = "moddy"
tokens = [{ env = "MODDY" }]
[sources.adorn]
plugin = "adorn"
[sources.lazychat]
plugin = "lazychat"
tokens = [{ credential = "lazy" }]
[destinations.crm]
url = "https://crm.example/hook"
secrets = [{ env = "CRM" }]
[destinations.erp]
url = "https://erp.example/hook"
secrets = [{ env = "ERP" }]
headers = { authorization = { env = "ERP_TOKEN" } }
client_cert = { cert = "absent.pem", password = { env = "PASSWORD" } }
"""
WHSEC = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Machine:
    """A folder with units, a config and the files that it names."""

    def __init__(self, folder):
        self.folder = folder
        self.units = folder / "units"
        self.config = folder / "config.toml"
        self.unit = self.units / "relay.service"
        self.units.mkdir()
        self.write(self.config, "")
        self.write(self.unit, UNIT.format(config=self.config, folder=folder, user="root"))

    def write(self, file, text):
        path = self.folder / file
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        return path

    def dropin(self, text, name="50-local.conf"):
        return self.write(self.units / "relay.service.d" / name, text)


@pytest.fixture
def machine(monkeypatch):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        machine = Machine(folder)
        monkeypatch.setattr(module, "FOLDERS", (folder / "etc", machine.units))
        for variable in ("STATE_DIRECTORY", "RUNTIME_DIRECTORY", "CREDENTIALS_DIRECTORY", "RELAY_SOCKET"):
            monkeypatch.delenv(variable, raising=False)
        yield machine


# --- unit files -----------------------------------------------------------------------------------------


def test_the_shipped_unit_is_parsed(machine):
    shipped = (Path(__file__).parents[2] / "systemd" / "relay.service").read_text()
    machine.unit.write_text(shipped)
    service = installed()
    assert (service.config, service.user, service.group) == (Path("/etc/relay/config.toml"), "relay", "relay")
    assert service.env_files == ((Path("/etc/relay/environment"), False),)
    assert service.directories == {
        "STATE_DIRECTORY": "/var/lib/relay",
        "RUNTIME_DIRECTORY": "/run/relay",
        "CONFIGURATION_DIRECTORY": "/etc/relay",
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[Service]\nExecStart=/usr/bin/another-relay serve\n",
        "[Service]\nExecStart=/opt/relay/bin/relay status\n",
        "[Unit]\nExecStart=/opt/relay/bin/relay serve\n",
        '[Service]\nExecStart="/opt/relay/bin/relay serve\n',
        "\xff\x00",
    ],
)
def test_a_unit_that_does_not_run_the_relay_is_not_its_service(machine, text):
    machine.unit.write_text(text)
    assert installed() is None


def test_a_masked_unit_is_ignored(machine):
    (machine.folder / "etc").mkdir()
    (machine.folder / "etc" / "relay.service").symlink_to("/dev/null")
    assert installed() is None


def test_dropins_apply_in_order_of_names_and_the_first_folder_wins(machine):
    machine.dropin(
        "[Service]\nUser=\nUser=one\n# User=none\nStateDirectory=\nStateDirectory=a \\\n  # no\n  b\n",
        "1.conf",
    )
    machine.dropin("[Service]\nUser=two\n", "2.conf")
    machine.write(machine.folder / "etc" / "relay.service.d" / "2.conf", "[Service]\nUser=three\n")
    machine.dropin("[Service]\nUser=four\n", "9.txt")
    service = installed()
    assert service.user == "three"
    assert service.directories["STATE_DIRECTORY"] == "/var/lib/a:/var/lib/b"


def test_variables_come_from_all_places_in_systemd_s_order(machine):
    machine.write("environment", "A=file\nB='from file'\n")
    machine.write("more-1.env", "C=1\n")
    machine.dropin(
        f'[Service]\nEnvironment=A=unit "D=e f" X=%S/x%%\nEnvironmentFile={machine.folder}/more-*.env\n'
        "PassEnvironment=PASSED\nUnsetEnvironment=C\n"
    )
    given = installed().given({"PASSED": "yes", "HIDDEN": "yes"})
    assert given.environ == {
        "A": "file", "B": "from file", "D": "e f", "X": "/var/lib/x%", "PASSED": "yes",
        "STATE_DIRECTORY": "/var/lib/hookferry-test-state", "RUNTIME_DIRECTORY": "/run/hookferry-test-run",
    }  # fmt: skip


@pytest.mark.parametrize("named", ["other name", "relative", "same"])
def test_a_config_of_the_service_is_recognised_under_any_name(machine, named, monkeypatch):
    link = machine.folder / "link.toml"
    link.symlink_to(machine.config)
    monkeypatch.chdir(machine.folder)
    path = {"other name": link, "relative": Path("config.toml"), "same": machine.config}[named]
    assert service_of(path) is not None
    assert service_of(machine.write("another.toml", "")) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A=1\nB=2", {"A": "1", "B": "2"}),
        ("A='a b'\n", {"A": "a b"}),
        ("A='a\nb'\nB=1", {"A": "a\nb", "B": "1"}),
        ('A="a\\"b\\\\ \\$c \\n"\n', {"A": 'a"b\\ $c \\n'}),
        ("A=a b  \n", {"A": "a b"}),
        ("A=  a\n", {"A": "a"}),
        ("A=a # b\n", {"A": "a # b"}),
        ("#A=1\n;B=2\n  # C=3\nD=4\n", {"D": "4"}),
        ("A=a\\\nb\n", {"A": "ab"}),
        ("A=a\\ \\b\n", {"A": "a b"}),
        ("A='a''b'\n", {"A": "ab"}),
        ("A='a'b\n", {"A": "ab"}),
        ("A=a'b'\n", {"A": "a'b'"}),
        ("A=\nB=1\n", {"A": "", "B": "1"}),
        ("export A=1\nB=2\n", {"B": "2"}),
        ("1A=1\nA B\n=2\nC=3\n", {"C": "3"}),
        ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
        ("A='open\nB=1\n", None),
        ("A='1\r\n2'\n", {"A": "1\r\n2"}),
        ("A=1' \\\n", {"A": "1' "}),
        ("A=1\\ \n", {"A": "1 "}),
        ("A=x=y\n", {"A": "x=y"}),
        ("A=1\nA=2\n", {"A": "2"}),
        ("", {}),
    ],
)
def test_environment_files_are_read_as_systemd_reads_them(text, found):
    """Each was compared with what systemd 252 gives a service, as were 300 random files."""
    assert parse_env(text) == ({"A": "open\nB=1\n"} if found is None else found)


# --- commands that read the config ----------------------------------------------------------------------


def test_check_config_uses_the_environment_of_the_unit(machine):
    machine.config.write_text(SECRETS.partition("[destinations.erp]")[0])
    result = run("check-config", machine.config, code=1)
    assert f"MODDY is not set; set it (under systemd in {machine.folder}/environment)" in result.err
    assert "credential lazy is missing" in result.err
    machine.write("environment", f"MODDY='t'\nCRM={WHSEC}\n")
    machine.dropin(f"[Service]\nLoadCredential=lazy:{machine.folder}/credentials/lazy\n")
    run("check-config", machine.config, code=1)
    machine.write("credentials/lazy", "token\n")
    assert run("check-config", machine.config).out.endswith("ok (3 sources, 1 destination)\n")


def test_a_variable_of_the_shell_is_not_one_of_the_service(machine, monkeypatch):
    machine.config.write_text(SECRETS.partition("[sources.adorn]")[0])
    monkeypatch.setenv("MODDY", "typed")
    result = run("check-config", machine.config, code=1)
    assert "MODDY is set in this shell, but not for the service; set it" in result.err
    assert "typed" not in result.err


def test_an_environment_file_can_be_named_for_any_config(machine, monkeypatch):
    monkeypatch.delenv("MODDY", raising=False)
    other = machine.write("other.toml", SECRETS.partition("[sources.adorn]")[0])
    for config in (other, machine.config):
        config.write_text(other.read_text())
        file = machine.write("named", "MODDY=x\n")
        run("check-config", config, code=1)
        run("check-config", config, "--env-file", file)
        run("config", "show", "-c", config, "--env-file", file)
    result = run("check-config", other, "--env-file", machine.folder / "absent", code=1)
    assert result.err.splitlines()[0] == f"cannot read {machine.folder}/absent: No such file or directory"


def test_an_address_that_a_socket_unit_replaces_is_a_warning(machine):
    root = Path(__file__).parents[2] / "systemd"
    for name in ("relay.socket", "relay-admin.socket"):
        machine.write(machine.units / name, (root / name).read_text())
    machine.config.write_text('[server]\nlisten = "0.0.0.0:80"\n[admin]\nlisten = "localhost:8081"\n')
    assert run("check-config", machine.config).err == ""  # the units are not enabled
    for name in ("relay.socket", "relay-admin.socket"):
        machine.write(machine.folder / "etc" / "sockets.target.wants" / name, "")
    result = run("check-config", machine.config)
    what = 'server.listen: "0.0.0.0:80" has no effect: relay.socket listens on 127.0.0.1:8080'
    units = "relay.socket relay.service"
    do = "change ListenStream= with `systemctl edit relay.socket`, then run"
    do += f" `systemctl stop {units} && systemctl start {units}`"
    assert result.err == f"warning: {machine.config}: {what}; {do}\n"
    machine.write(
        machine.units / "relay.socket.d" / "local.conf", "[Socket]\nListenStream=\nListenStream=80\n"
    )
    assert run("check-config", machine.config).err == ""


def test_a_missing_environment_file_of_the_unit_is_a_problem(machine):
    machine.dropin(f"[Service]\nEnvironmentFile={machine.folder}/needed\n")
    machine.config.write_text(SECRETS.replace('plugin = "adorn"', 'plugin = "adron"'))
    result = run("check-config", machine.config, code=1).err
    assert "needed of relay.service does not exist" in result
    assert 'no plugin offers the kind "adron"' in result
    assert "is not set" not in result


def test_config_show_names_the_state_directory_of_the_service_and_needs_no_secret(machine):
    machine.config.write_text(SECRETS)
    shown = json.loads(run("config", "show", "-c", machine.config, "--json").out)
    assert shown["state_dir"] == "/var/lib/hookferry-test-state"
    assert shown["destinations"]["erp"]["secrets"] == ["<secret>"]
    assert shown["sources"]["moddy"]["tokens"] == ["<secret>"]
    assert shown["destinations"]["erp"]["client_cert"]["password"] == "<secret>"


def test_an_invalid_secret_entry_is_reported_even_if_it_is_not_needed(machine):
    machine.config.write_text(SECRETS.replace('{ env = "MODDY" }', '{ evn = "MODDY" }'))
    assert 'unknown key "evn"' in run("config", "show", "-c", machine.config, code=1).err


def test_send_needs_only_the_secret_of_its_source(machine):
    machine.config.write_text(SECRETS)
    run("send", "moddy", "--list", "-c", machine.config)
    run("send", "adorn", "--to", "http://127.0.0.1:9", "-c", machine.config, code=3)
    result = run("send", "moddy", "--to", "http://127.0.0.1:9", "-c", machine.config, code=1)
    assert result.err.count("is not set") == 1
    assert "config.toml:3: sources.moddy.tokens[0]: the environment variable MODDY is not set" in result.err
    machine.write("environment", "MODDY=t\n")
    run("send", "moddy", "--to", "http://127.0.0.1:9", "-c", machine.config, code=3)


def test_verify_needs_only_the_secrets_of_the_request_s_source(machine):
    machine.config.write_text(SECRETS)
    post = "POST /internal/event/notify HTTP/1.1\r\nAuthorization: Bearer t\r\n\r\n"
    body = '{"event_type": "member_joined", "discord_id": "1", "metadata": {}}'
    sent = machine.write("sent.http", post + body)
    source = ("verify", "--source", "moddy", "--request", sent, "-c", machine.config)
    assert run(*source, code=1).err.count("is not set") == 1
    destination = ("verify", "--destination", "crm", "--request", sent, "-c", machine.config)
    assert run(*destination, code=1).err.count("is not set") == 1
    machine.write("environment", f"MODDY=t\nCRM={WHSEC}\n")
    assert "valid: sources.moddy.tokens[0]" in run(*source).out
    assert "webhook-signature" in run(*destination, code=1).out


def test_a_missing_secret_is_not_a_valid_token(machine):
    machine.config.write_text(SECRETS)
    machine.write("environment", f"CRM={WHSEC}\n")
    for token in ("Bearer ", "Bearer x", ""):
        sent = machine.write("sent.http", f"POST /v1/events HTTP/1.1\r\nAuthorization: {token}\r\n\r\n{{}}")
        run("verify", "--source", "moddy", "--request", sent, "-c", machine.config, code=1)


def test_explain_and_lists_of_the_file_need_no_secret(machine):
    machine.config.write_text(SECRETS)
    assert run("explain", "--source", "moddy", "-c", machine.config).rows[0][0] == "crm"
    result = run("events", "list", "--offline", "-c", machine.config, code=1)
    assert "/var/lib/hookferry-test-state/relay.db" in result.err


@needs_other_users
def test_root_checks_files_as_the_user_of_the_service(machine):
    machine.config.write_text(
        '[sources.moddy]\nplugin = "moddy"\ntokens = [{ file = "token" }]\n'
        '[destinations.crm]\nurl = "https://crm.example"\nca_file = "ca.pem"\n'
    )
    for file in (machine.write("token", "t"), machine.write("ca.pem", "")):
        file.chmod(0o600)
    run("check-config", machine.config)
    text = UNIT.format(config=machine.config, folder=machine.folder, user="nobody")
    machine.unit.write_text(text)
    groups = os.getgroups()
    result = run("check-config", machine.config, code=1)
    assert "the file token cannot be read: Permission denied; let the service read it: `" in result.err
    assert "ca.pem cannot be read: Permission denied; let the service read it: `" in result.err
    assert (os.geteuid(), os.getegid(), os.getgroups()) == (0, 0, groups)
    for command in re.findall(r"`(chgrp .+)`", result.err):
        subprocess.run(["sh", "-c", command], check=True)
    run("check-config", machine.config)
    machine.config.chmod(0o600)
    result = run("check-config", machine.config, code=1)
    assert "config.toml: cannot be read: Permission denied" in result.err
    assert "relay.service runs as nobody: chgrp nogroup" in result.err
    machine.config.chmod(0o644)
    (machine.folder / "plugins.d").mkdir(mode=0o700)
    assert "plugins.d: cannot be read" in run("check-config", machine.config, code=1).err


@needs_other_users
def test_files_that_systemd_reads_for_the_service_may_be_readable_for_root_only(machine):
    machine.config.write_text(SECRETS.partition("[destinations.erp]")[0])
    machine.unit.write_text(UNIT.format(config=machine.config, folder=machine.folder, user="nobody"))
    machine.dropin(f"[Service]\nLoadCredential=lazy:{machine.folder}/lazy\n")
    machine.write("environment", f"MODDY=t\nCRM={WHSEC}\n").chmod(0o600)
    machine.write("lazy", "t").chmod(0o600)
    run("check-config", machine.config)


@needs_root
@pytest.mark.parametrize("setting", ["ProtectHome=yes", "PrivateTmp=true", "ProtectHome=tmpfs"])
def test_files_that_the_unit_hides_are_a_problem_although_root_can_read_them(machine, setting):
    folder = "/root" if "Home" in setting else "/var/tmp"
    with tempfile.TemporaryDirectory(dir=folder) as outside:
        secret, authority = Path(outside) / "token", Path(outside) / "ca.pem"
        for file in (secret, authority):
            file.write_text("t")
        machine.config.write_text(
            f'[sources.moddy]\nplugin = "moddy"\ntokens = [{{ file = "{secret}" }}]\n'
            f'[destinations.crm]\nurl = "https://crm.example"\nca_file = "{authority}"\n'
        )
        run("check-config", machine.config)
        machine.dropin(f"[Service]\n{setting}\n")
        result = run("check-config", machine.config, code=1)
        assert f"{secret} is hidden from the service by {setting}" in result.err
        assert f"{authority} is hidden from the service by {setting}" in result.err
        run("config", "show", "-c", machine.config)
        run("send", "moddy", "--to", "http://127.0.0.1:9", "-c", machine.config, code=3)


@needs_other_users
def test_a_missing_user_is_reported(machine):
    machine.unit.write_text(UNIT.format(config=machine.config, folder=machine.folder, user="ghost"))
    result = run("check-config", machine.config, code=1)
    assert "runs as ghost:ghost, which this machine does not have" in result.err


@needs_other_users
def test_an_unreadable_environment_file_exits_with_5(machine):
    machine.config.write_text(SECRETS.partition("[sources.adorn]")[0])
    machine.write("environment", "MODDY=t\n").chmod(0o600)
    machine.write("lazy", "t").chmod(0o600)
    machine.dropin(f"[Service]\nLoadCredential=lazy:{machine.folder}/lazy\n")
    machine.config.write_text(SECRETS.partition("[destinations.crm]")[0])
    code = (
        f"import os; from pathlib import Path; import relay.cli.config\n"
        f"from relay.config import installed_service as installed\n"
        f"from relay.plugin_loading.loader import discover; discover(())\n"
        f"installed.FOLDERS = (Path({str(machine.units)!r}),)\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        f"from relay.cli import main; main(['check-config', {str(machine.config)!r}])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert finished.returncode == 5, finished.stderr
    files = f"{machine.folder}/environment, {machine.folder}/lazy"
    assert f"this user cannot read {files}: run the command as root" in finished.stderr
    assert "the credential lazy cannot be read by this user" in finished.stderr


# --- reloads of the running service ---------------------------------------------------------------------

ROTATED = """\
development = true
state_dir = "state"
[server]
listen = "127.0.0.1:0"
[admin]
listen = ""
[sources.moddy]
plugin = "moddy"
tokens = [{ env = "RELOAD_OLD" }]
"""


async def moddy(relay, token):
    """Return the status of an event that is sent with a token."""
    body = b'{"type": "event", "event_type": "member_joined", "discord_id": "1", "metadata": {}}'
    raw = request("POST", "/internal/event/notify", body, authorization=f"Bearer {token}")
    return (await relay.exchange(raw)).status


@pytest.fixture
def service(machine, monkeypatch):
    """A machine on which this process is the installed service."""
    machine.config.write_text(ROTATED)
    machine.write("environment", "RELOAD_OLD=old\nUNUSED=x\n")
    monkeypatch.setenv("NOTIFY_SOCKET", "@hookferry-test-nobody-listens")
    for name, value in {"RELOAD_OLD": "old", "UNUSED": "x"}.items():  # as systemd does
        monkeypatch.setenv(name, value)
    return machine


def rotate(machine, *names):
    tokens = ", ".join(f'{{ env = "{name}" }}' for name in names)
    machine.config.write_text(ROTATED.replace('{ env = "RELOAD_OLD" }', tokens))


async def test_a_reload_reads_the_environment_file_of_the_unit_again(service):
    async with running(service.config) as relay:
        commands = Commands(relay.addresses.socket)
        rotate(service, "RELOAD_OLD", "RELOAD_NEW")
        result = await commands("reload", code=1)
        assert f"RELOAD_NEW is not set; set it (under systemd in {service.folder}/environment)" in result.err
        assert "restart" not in result.err

        service.write("environment", "RELOAD_OLD=old\nRELOAD_NEW=new\n")
        assert "changed sources.moddy" in (await commands("reload")).out
        assert (await moddy(relay, "old"), await moddy(relay, "new")) == (200, 200)

        service.write("environment", "RELOAD_OLD=other\nRELOAD_NEW=new\n")  # under the same name
        assert "not applied yet" in (await commands("doctor", code=1)).out
        assert "changed sources.moddy" in (await commands("reload")).out
        assert (await moddy(relay, "old"), await moddy(relay, "other")) == (403, 200)

        service.write("environment", "RELOAD_NEW=new\n")  # as a restart would, a reload misses the variable
        assert "RELOAD_OLD is not set" in (await commands("reload", code=1)).err
        assert await moddy(relay, "other") == 200
        rotate(service, "RELOAD_NEW")
        await commands("reload")
        assert (await moddy(relay, "other"), await moddy(relay, "new")) == (403, 200)
    assert not service.folder.joinpath("state", "relay.sock").exists()


async def test_a_reload_without_access_to_the_environment_file_has_a_warning(service):
    rotate(service, "RELOAD_OLD")
    file = service.write("environment", "RELOAD_OLD=old\n")
    async with running(service.config) as relay:
        with patch.object(Path, "read_bytes", denying(file)):
            commands = Commands(relay.addresses.socket)
            result = await commands("reload")
            assert f"{file} was not read again (permission denied)" in result.err
            assert await moddy(relay, "old") == 200
            rotate(service, "RELOAD_OLD", "RELOAD_NEW")
            result = await commands("reload", code=1)
            assert "and restart the daemon, which reads its environment at the start" in result.err


async def test_a_daemon_that_systemd_did_not_start_is_to_be_restarted(service, monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET")
    async with running(service.config) as relay:
        rotate(service, "RELOAD_NEW")
        service.write("environment", "RELOAD_NEW=new\n")
        result = await Commands(relay.addresses.socket)("reload", code=1)
        assert "RELOAD_NEW is not set; set it" in result.err
        assert "and restart the daemon, which reads its environment at the start" in result.err


def denying(file):
    """Return `Path.read_bytes` for a user who may not read one file."""
    read = Path.read_bytes

    def read_bytes(path):
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    return read_bytes


# --- without a daemon -----------------------------------------------------------------------------------


def test_with_a_unit_the_advice_is_to_start_it(machine):
    machine.config.write_text('[server]\nlisten = "127.0.0.1:9"\n[sources.adorn]\nplugin = "adorn"\n')
    for arguments in (("-c", machine.config), ("--socket", "/run/hookferry-test-run/relay.sock")):
        result = run("status", *arguments, code=3)
        assert result.err.splitlines() == [
            "cannot connect to the daemon at /run/hookferry-test-run/relay.sock: No such file or directory",
            "  start it with `systemctl start relay`; `systemctl status relay` shows why it is not running",
        ]
    result = run("send", "adorn", "-c", machine.config, code=3)
    assert "start the daemon with `systemctl start relay`, or name its listener with --to URL" in result.err
    own = machine.write("own.toml", machine.config.read_text())
    for command, what in ((("status",), "it"), (("send", "adorn"), "the daemon")):
        assert f"start {what} with `relay serve`" in run(*command, "-c", own, code=3).err


def test_without_an_argument_the_config_of_the_service_is_used(machine, monkeypatch):
    monkeypatch.setattr("relay.config.paths.PLACES", (machine.folder / "nowhere.toml",))
    monkeypatch.delenv("RELAY_CONFIG", raising=False)
    assert "at /run/hookferry-test-run/relay.sock" in run("status", code=3).err
    machine.config.write_text("[broken\n")
    assert "at /run/hookferry-test-run/relay.sock" in run("status", code=3).err


@pytest.fixture
def state(machine):
    """The service's state directory, which the shell's variable moves to where a test may write."""
    folder = machine.folder / "state"
    folder.mkdir()
    text = machine.unit.read_text().replace(
        "StateDirectory=hookferry-test-state", f"StateDirectory=../..{folder}"
    )
    machine.unit.write_text(text)
    return folder


SERVED = """\
[server]
listen = "127.0.0.1:0"
[admin]
listen = "127.0.0.1:0"
[storage]
min_free_disk = "1 MiB"
[sources.adorn]
plugin = "adorn"
"""


def serve(machine, *more, **environ):
    lines = (
        "import os; from pathlib import Path; from relay.config import installed_service as installed",
        f"os.environ.update({environ!r})",
        f"installed.FOLDERS = (Path({str(machine.units)!r}),)",
        "from relay.cli import main; main()",
    )
    return Daemon(machine.config, (sys.executable, "-c", "\n".join(lines), "serve", *more))


async def served(daemon):
    """Have the daemon store an event, then end it."""
    async with daemon:
        answer = await exchange(daemon.url, request("POST", "/v1/events", adorn()))
        assert answer.status == 200
        assert await daemon.stop() == 0
    return daemon.output


async def test_a_second_relay_beside_the_service_s_database_is_refused(machine, state):
    machine.config.write_text(SERVED)
    (state / "relay.db").write_bytes(b"")
    for config in (SERVED, SERVED + SECRETS.partition("[sources.adorn]")[0]):  # before it asks for secrets
        machine.config.write_text(config)
        daemon = serve(machine)
        await daemon.start()
        assert await daemon.exit() == 1
        assert f"relay.service serves {machine.config} with the database" in daemon.output
    machine.config.write_text(SERVED)
    assert "`systemctl start relay`" in daemon.output
    assert not (machine.folder / "relay.db").exists()
    result = await served(serve(machine, "--force"))
    assert f"the database is {machine.folder}/relay.db" in result
    assert (machine.folder / "relay.db").exists()


@needs_root
async def test_the_service_itself_and_a_first_relay_are_not_refused(machine, state):
    machine.config.write_text(SERVED)
    result = await served(serve(machine))  # there is no database yet
    assert "relay.service serves this configuration with another database" in result
    (state / "relay.db").write_bytes(b"")
    result = await served(serve(machine, STATE_DIRECTORY=str(state)))
    assert f"the database is {state}/relay.db" in result
    own = machine.write("own.toml", SERVED)
    machine.config = own
    await served(serve(machine))


@needs_other_users
async def test_another_user_than_the_service_s_does_not_serve_its_database(machine, state):
    machine.config.write_text(f'state_dir = "{state}"\n{SERVED}')
    (state / "relay.db").write_bytes(b"")
    await served(serve(machine))
    machine.unit.write_text(machine.unit.read_text().replace("User=root", "User=nobody"))
    daemon = serve(machine)
    await daemon.start()
    assert await daemon.exit() == 1
    assert "nobody could not use it after this" in daemon.output
    await served(serve(machine, "--force"))


@pytest.fixture
def typed(machine):
    """Run a command in a thread, because it starts an event loop."""

    async def typed(*args, code=0):
        return await asyncio.to_thread(partial(run, *args, code=code))

    return typed


async def test_the_doctor_names_the_database_and_finds_a_second_one(machine, state, typed, monkeypatch):
    machine.config.write_text(SERVED)
    await served(serve(machine, STATE_DIRECTORY=str(state)))
    result = await typed("doctor", "--offline", "-c", machine.config, "--json")
    [check] = [check for check in result.json["checks"] if check["name"] == "database"]
    assert (check["ok"], check["detail"]) == (True, f"/var/lib/../..{state}/relay.db")
    await served(serve(machine, "--force"))
    result = await typed("doctor", "--offline", "-c", machine.config, "--json", code=1)
    [check] = [check for check in result.json["checks"] if not check["ok"]]
    assert f"another database, {machine.folder}/relay.db" in check["detail"]
    export, then, delete = check["hint"].split(", then ")
    variable, _relay, *words = export.split()
    monkeypatch.setenv(*variable.split("="))
    monkeypatch.chdir(machine.folder)
    await typed(*words)
    monkeypatch.delenv("STATE_DIRECTORY")
    assert len((machine.folder / "other.jsonl").read_text().splitlines()) == 1
    assert (then, delete) == ("relay events import other.jsonl", f"delete {machine.folder}/relay.db")


async def test_a_running_relay_names_its_database(machine, state, typed):
    machine.config.write_text(SERVED)
    async with serve(machine, STATE_DIRECTORY=str(state)):
        door = state / "relay.sock"
        result = await typed("doctor", "--socket", door, "--json")
        [check] = [check for check in result.json["checks"] if check["name"] == "database"]
        assert (check["ok"], check["detail"]) == (True, f"{state}/relay.db")


@needs_other_users
def test_credentials_of_the_shell_s_folder_are_read_like_systemd_does(machine, monkeypatch):
    machine.config.write_text('[sources.moddy]\nplugin = "moddy"\ntokens = [{ credential = "m" }]\n')
    machine.unit.write_text(UNIT.format(config=machine.config, folder=machine.folder, user="nobody"))
    machine.write("private/m", "t").parent.chmod(0o700)
    run("check-config", machine.config, code=1)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(machine.folder / "private"))
    run("check-config", machine.config)
