"""The page for installing: its commands, run in a scratch root with stand-ins for a machine's own tools."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "install.md").read_text()
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```sh\n(.*?)```", PAGE, re.DOTALL))

RELAY = f'#!/bin/sh\nexec "{sys.executable}" -c "from relay.cli import main; main()" "$@"\n'
PYTHON = """\
#!/bin/sh
# python3 -m venv DIR: an environment whose pip fetches nothing; what it would install is tested as the wheel.
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "pip $*" >>"$CALLS"\\n' >"$3/bin/pip"
cp "$RELAY" "$3/bin/relay"
chmod +x "$3/bin/pip" "$3/bin/relay"
"""
NOTED = '#!/bin/sh\necho "${0##*/} $*" >>"$CALLS"\n'
STAND_INS = {
    "python3": PYTHON,
    **dict.fromkeys(("apt-get", "systemctl", "systemd-sysusers", "systemd-tmpfiles", "userdel"), NOTED),
}


class Machine:
    """A root to install into."""

    def __init__(self, folder):
        self.root = folder / "root"
        self.calls = folder / "calls"
        tools = folder / "tools"
        for made in (self.root, self.root / "usr/local/bin", tools):
            made.mkdir(parents=True)
        self.calls.touch()
        (folder / "relay").write_text(RELAY)
        for name, text in STAND_INS.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self._environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "RELAY": str(folder / "relay"),
        }

    def run(self, name):
        """Run a block of the page and return what it asked of the machine's own tools."""
        before = self.calls.read_text()
        script = re.sub(r"(?<![\w.])/(opt|etc|usr|var)/", rf"{self.root}/\1/", BLOCKS[name])
        command = ("bash", "-euo", "pipefail", "-c", script)
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
        return self.calls.read_text().removeprefix(before).splitlines()

    def files(self):
        """Return the files that there are, but for links."""
        found = [path for path in self.root.rglob("*") if path.is_file() and not path.is_symlink()]
        return {str(path.relative_to(self.root)) for path in found}


@pytest.fixture
def machine(tmp_path):
    """A machine with the relay installed."""
    machine = Machine(tmp_path)
    assert "systemd-sysusers relay.conf" in machine.run("install")
    return machine


def test_the_page_has_every_step():
    assert list(BLOCKS) == ["install", "start", "upgrade", "rollback", "backup", "restore", "uninstall"]


def test_an_install_puts_everything_where_the_page_says(machine):
    units = {f"etc/systemd/system/{name}" for name in ("relay.service", "relay.socket", "relay-admin.socket")}
    snippets = {"usr/lib/sysusers.d/relay.conf", "usr/lib/tmpfiles.d/relay.conf"}
    program = {"opt/relay/bin/pip", "opt/relay/bin/relay"}
    assert machine.files() == units | snippets | program | {"etc/relay/config.toml", "etc/relay/environment"}
    for name in ("config.toml", "environment"):
        assert stat.S_IMODE((machine.root / "etc/relay" / name).stat().st_mode) == 0o640
    assert (machine.root / "usr/local/bin/relay").samefile(machine.root / "opt/relay/bin/relay")


def test_a_start_enables_every_unit_that_was_installed(machine):
    [enable] = [call for call in machine.run("start") if "enable" in call]
    units = {path.name for path in (machine.root / "etc/systemd/system").iterdir()}
    assert set(enable.split()[3:]) == units


def test_an_upgrade_can_be_taken_back(machine):
    program = machine.root / "opt/relay/bin/relay"
    former = program.read_text() + "# former\n"
    program.write_text(former)
    assert machine.run("upgrade")[-1] == "systemctl restart relay.service"
    program.write_text(RELAY + "# newer\n")
    assert machine.run("rollback") == ["systemctl stop relay.service", "systemctl start relay.service"]
    assert program.read_text() == former
    assert not (machine.root / "opt/relay.former").exists()


def test_an_upgrade_that_the_configuration_does_not_suit_does_not_restart(machine):
    (machine.root / "etc/relay/config.toml").write_text("[nonsense]\n")
    with pytest.raises(AssertionError, match="upgrade"):
        machine.run("upgrade")
    assert "restart" not in machine.calls.read_text()


def test_a_restored_backup_is_what_was_backed_up(machine):
    state = machine.root / "var/lib/relay"
    state.mkdir(parents=True)
    (state / "relay.db").write_text("then")
    (state / "relay.db-wal").write_text("then, too")
    machine.run("backup")
    (state / "relay.db").write_text("now")
    (state / "relay.db-shm").write_text("now")
    machine.run("restore")
    kept = {path.name: path.read_text() for path in state.iterdir()}
    assert kept == {"relay.db": "then", "relay.db-wal": "then, too"}


def test_an_uninstall_leaves_nothing(machine):
    (machine.root / "var/lib/relay").mkdir(parents=True)
    (machine.root / "var/lib/relay/relay.db").touch()
    machine.run("uninstall")
    assert machine.files() == set()
    assert not (machine.root / "usr/local/bin/relay").is_symlink()
