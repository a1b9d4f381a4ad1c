"""The commands of docs/install.md, as written there, in a clean root.

Everything is real except for two things that such a root cannot have: a running systemd (systemctl
enables and disables, and does nothing else), and /proc (systemd-tmpfiles works from outside).
"""

import re
import subprocess
import sys
import tarfile

import pytest
from daemons import adorn
from machines import CHECKOUT, DEBIAN, Root, copy_checkout, offline
from wire import exchange, request

PAGE = (CHECKOUT / "docs" / "install.md").read_text()
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```sh\n(.*?)```", PAGE, re.DOTALL))
UNITS = {"relay.service", "relay.socket", "relay-admin.socket"}
HERE = "/root/hookferry"

SYSTEMCTL = """\
#!/bin/sh
echo "systemctl $*" >>/calls
for word; do shift; [ "$word" = --now ] || set -- "$@" "$word"; done
SYSTEMD_OFFLINE=1 exec /bin/systemctl "$@"
"""
TMPFILES = '#!/bin/sh\necho "systemd-tmpfiles $*" >>/calls\n'


class Machine:
    """A root to install into."""

    def __init__(self, root, pip):
        self.root = root
        self._pip = pip

    def run(self, name):
        """Run a block of the page and return its calls of systemctl."""
        self.root.add("calls", "")
        script = BLOCKS[name]
        self.root.run("bash", "-euo", "pipefail", "-c", script, cwd=HERE, **self._pip)
        calls = (self.root.path / "calls").read_text().splitlines()
        for call in calls:
            if call.startswith("systemd-tmpfiles "):
                command = ("systemd-tmpfiles", f"--root={self.root.path}", *call.split()[1:])
                subprocess.run(command, check=True, capture_output=True)
        return calls

    def listing(self, *paths):
        """Return mode, owner and name of files."""
        return self.root.run("stat", "-c", "%a %U:%G %n", *paths).splitlines()

    def text(self, path, change=None):
        """Return the text of a file, after applying `change` to it."""
        file = self.root.path / path.lstrip("/")
        if change is not None:
            file.write_text(change(file.read_text()))
        return file.read_text()


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory):
    """A machine after the first block."""
    root = Root(tmp_path_factory.mktemp("root"), *DEBIAN)
    copy_checkout(root.path / HERE.lstrip("/"))
    subprocess.run(["cp", "-R", wheels, root.path / "wheels"], check=True)
    root.add("usr/local/sbin/systemctl", SYSTEMCTL, 0o755)
    root.add("usr/local/sbin/systemd-tmpfiles", TMPFILES, 0o755)
    machine = Machine(root, offline("/wheels"))
    assert machine.run("install") == ["systemd-tmpfiles --create relay.conf"]
    yield machine
    root.remove()


@pytest.fixture
def machine(installed, tmp_path):
    """A copy of `installed` for one test."""
    machine = Machine(installed.root.copy(tmp_path / "root"), installed._pip)
    yield machine
    machine.root.remove()


def test_the_page_has_every_step():
    steps = ["install", "check", "start", "upgrade", "rollback", "backup", "restore", "package", "uninstall"]
    assert list(BLOCKS) == steps


def test_an_install_puts_every_file_at_its_documented_place(installed):
    names = ("/etc/relay", *(f"/etc/relay/{name}" for name in ("config.toml", "environment", "credentials")))
    assert installed.listing(*names) == [
        "750 root:relay /etc/relay",
        "640 root:relay /etc/relay/config.toml",
        "640 root:relay /etc/relay/environment",
        "700 root:root /etc/relay/credentials",
    ]
    units = (installed.root.path / "etc/systemd/system").glob("relay*")
    assert {path.name for path in units} == UNITS
    assert installed.root.run("readlink", "/usr/local/bin/relay") == "/opt/relay/bin/relay\n"
    entry = installed.root.run("getent", "passwd", "relay")
    assert re.fullmatch(r"relay:x:\d+:\d+:hookferry webhook relay:/var/lib/relay:/usr/sbin/nologin\n", entry)


def test_the_check_reads_the_secrets_of_the_service(machine):
    machine.text("/etc/relay/config.toml", lambda text: text.replace("development = true", "#"))
    machine.text("/etc/relay/config.toml", lambda text: re.sub(r", development = \"[^\"]*\"", "", text))
    with pytest.raises(AssertionError, match="CRM_WEBHOOK_SECRET is not set"):
        machine.run("check")
    names = re.findall(r'env = "(\w+)"', machine.text("/etc/relay/config.toml"))
    secrets = {name: f"a $ecret & {name}" for name in names}
    secrets["CRM_WEBHOOK_SECRET"] = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    lines = "".join(f"{name}='{secret}'\n" for name, secret in secrets.items())
    machine.text("/etc/relay/environment", lambda _: lines)
    machine.run("check")
    machine.text(
        "/etc/relay/config.toml", lambda text: text.replace('env = "CRM_WEBHOOK', 'credential = "CRM_WEBHOOK')
    )
    with pytest.raises(AssertionError, match="CRM_WEBHOOK_SECRET"):
        machine.run("check")
    machine.root.add("/etc/relay/credentials/CRM_WEBHOOK_SECRET", secrets["CRM_WEBHOOK_SECRET"], 0o600)
    with pytest.raises(AssertionError, match="add `LoadCredential=CRM_WEBHOOK_SECRET:"):
        machine.run("check")
    loaded = "LoadCredential=CRM_WEBHOOK_SECRET:/etc/relay/credentials/CRM_WEBHOOK_SECRET"
    machine.root.add("/etc/systemd/system/relay.service.d/override.conf", f"[Service]\n{loaded}\n")
    machine.run("check")
    more = '[destinations.b]\nurl = "https://b"\nca_file = "b.pem"\n'
    machine.text("/etc/relay/config.toml", lambda text: text + more)
    machine.root.add("/etc/relay/b.pem", "", 0o600)
    with pytest.raises(AssertionError, match=r"b\.pem cannot be read: Permission denied"):
        machine.run("check")


def test_a_start_enables_every_unit_that_was_installed(machine):
    machine.run("start")
    wanted = {path.name for path in (machine.root.path / "etc/systemd/system").rglob("*.wants/relay*")}
    assert wanted == UNITS


def test_an_upgrade_can_be_reverted(machine):
    machine.text(f"{HERE}/relay/__init__.py", lambda text: re.sub(r'"\d+\.\d+\.\d+"', '"99.0.0"', text))
    former = machine.root.run("relay", "--version")
    assert machine.run("upgrade") == ["systemctl restart relay.service"]
    assert machine.root.run("relay", "--version") == "hookferry 99.0.0\n"
    assert machine.run("rollback") == ["systemctl restart relay.service"]
    assert machine.root.run("relay", "--version") == former
    assert machine.root.run("ls", "/opt") == "relay\n"


def test_an_upgrade_with_an_invalid_configuration_does_not_restart(machine):
    machine.text("/etc/relay/config.toml", lambda _: "[nonsense]\n")
    machine.root.add("/opt/relay/bin/pip", '#!/bin/sh\necho "pip $*" >>/calls\n', 0o755)  # to save time
    with pytest.raises(AssertionError, match="nonsense"):
        machine.run("upgrade")
    assert machine.text("/calls") == "pip install --upgrade .[fast]\n"


async def test_a_backup_is_made_while_the_relay_works_and_can_be_restored(machine):
    machine.text("/etc/relay/config.toml", lambda text: re.sub(r"127\.0\.0\.1:80\d\d", "127.0.0.1:0", text))

    async def receive(daemon, session):
        answer = await exchange(daemon.url, request("POST", "/v1/events", adorn(session)))
        assert answer.status == 200
        return machine.root.run("relay", "events", "list", "-q").split()

    async with machine.root.serve() as daemon:
        [then] = await receive(daemon, "then")
        machine.run("backup")
        assert len(await receive(daemon, "now")) == 2
        assert await daemon.stop() == 0
    assert machine.run("restore") == [
        "systemctl stop relay.socket relay-admin.socket relay.service",
        "systemctl start relay.socket relay-admin.socket relay.service",
    ]
    assert machine.listing("/var/lib/relay/relay.db") == ["600 relay:relay /var/lib/relay/relay.db"]
    assert machine.listing("/var/backups/relay") == ["700 root:root /var/backups/relay"]
    async with machine.root.serve() as daemon:
        _later, first = await receive(daemon, "later")
        assert await daemon.stop() == 0
    assert first == then


def test_a_damaged_backup_is_not_restored(machine):
    machine.root.add("/var/backups/relay/relay.db", "no database")
    machine.root.add("/var/lib/relay/relay.db", "what is there")
    with pytest.raises(AssertionError, match="relay db check"):
        machine.run("restore")
    assert machine.text("/var/lib/relay/relay.db") == "what is there"
    assert machine.text("/calls") == ""


def test_a_source_distribution_has_every_file_for_the_installation(tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    wanted = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()}
    command = (sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ".")
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        there = {name.partition("/")[2] for name in file.getnames()}
    assert wanted - there == {".ci/run"}


def test_an_uninstall_leaves_nothing(machine):
    machine.root.add("var/lib/relay/relay.db", "")
    machine.run("start")
    machine.run("uninstall")
    left = machine.root.run("find", "/", "-name", "*relay*", "-not", "-path", f"{HERE}/*").splitlines()
    assert left == []
    assert machine.root.attempt("getent", "passwd", "relay").returncode != 0
