"""A Debian that boots with systemd as pid 1, in separate namespaces, by systemd-nspawn.

The base system is bootstrapped once and kept in the folder for temporary files. Changes are in memory and end
with the machine. Its only network is its own loopback.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from machines import PATH, ROOT

VARIABLE = "RELAY_TEST_BOOTED"
"""Set to 1 to run the tests that boot a machine, or to the path of a package, which is then not built."""

TOOLS = ("debootstrap", "systemd-nspawn", "nsenter")
PACKAGES = "systemd,systemd-sysv,dbus,python3,ca-certificates,iproute2"


def missing() -> str:
    """Return why no machine can boot here, or nothing."""
    if not os.environ.get(VARIABLE):
        return f"takes minutes: set {VARIABLE}=1 to run it"
    if not ROOT:
        return "needs root"
    absent = [name for name in TOOLS if shutil.which(name) is None]
    return f"needs {', '.join(absent)}: apt-get install debootstrap systemd-container" if absent else ""


def base() -> Path:
    """Return the folder of the base system; bootstraps it once, from the mirror that apt uses."""
    release = re.findall(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    if not release:
        pytest.skip("needs Debian: /etc/os-release names no release")
    folder = Path(tempfile.gettempdir()) / f"hookferry-{release[0]}"
    if not folder.exists():
        targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
        mirrors = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.split()
        part = Path(tempfile.mkdtemp(prefix="hookferry-base-"))
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", release[0], part, mirrors[0]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(part, ignore_errors=True)
            pytest.skip(f"debootstrap failed: {done.stdout[-2000:]}{done.stderr[-500:]}")
        part.chmod(0o755)
        part.rename(folder)
    return folder


@dataclass(frozen=True)
class Ended:
    """A command that has ended in the machine."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


class Booted:
    """A running machine, from `with` on; `shared` appears there as /shared."""

    def __init__(self, shared: Path) -> None:
        self._shared = shared
        self._leader = 0

    def __enter__(self) -> Self:
        name = f"hookferry-{os.getpid()}"
        command = [
            "systemd-nspawn", "--quiet", f"--directory={base()}", "--volatile=overlay", "--boot",
            f"--machine={name}", "--private-network", "--register=no", "--keep-unit", "--console=pipe",
            f"--bind-ro={self._shared}:/shared",
        ]  # fmt: skip
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
        )
        try:
            self._leader = self._find_leader()
            self.run("systemctl is-system-running --wait", codes=(0, 1))  # 1: degraded, without harm
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()  # powers the machine off
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _find_leader(self) -> int:
        """Return the process id of the machine's systemd."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            for child in children.read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
            time.sleep(0.1)
        self._log.seek(0)
        raise AssertionError(f"the machine did not boot: {self._log.read()}")

    def attempt(self, script: str, timeout: float = 120) -> Ended:
        """Run a shell script in the machine."""
        enter = [
            "nsenter",
            f"--target={self._leader}",
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--pid",
            "--cgroup",
        ]
        environment = [f"PATH={PATH}", "HOME=/root", "LC_ALL=C.UTF-8", "SYSTEMD_PAGER="]
        command = [
            *enter,
            "--root",
            "--wd",
            "env",
            "-i",
            *environment,
            "bash",
            "-uo",
            "pipefail",
            "-c",
            f"cd\n{script}",
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, stdin=subprocess.DEVNULL
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def in_its_network(self, *command: str | Path) -> list[str | Path]:
        """Return a command that runs a program of this host in the network of the machine."""
        return ["nsenter", f"--target={self._leader}", "--net", *command]

    def run(self, script: str, *, codes: tuple[int, ...] = (0,), timeout: float = 120) -> Ended:
        """Run a shell script that must end with one of these exit codes."""
        ended = self.attempt(script, timeout)
        assert ended.code in codes, f"{script}\n{ended}"
        return ended

    def until(self, script: str, text: str = "", seconds: float = 60) -> Ended:
        """Repeat a script until it succeeds and prints the text."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.attempt(script)
            if ended.code == 0 and text in ended.out:
                return ended
            assert time.monotonic() < deadline, f"{script}: not in time\n{ended}"
            time.sleep(0.2)

    def put(self, path: str, text: str) -> None:
        """Replace a file's content; its owner and mode stay."""
        self.run(f"cat >{path} <<'END OF FILE'\n{text}\nEND OF FILE")

    def get(self, path: str) -> str:
        """Return a file's content."""
        return self.run(f"cat {path}").out


class Prometheus:
    """This host's Prometheus in a machine's network, from `with` on, with the files of the installed package.

    Only their times are shorter: it scrapes every second, an alert waits for 3 seconds instead of minutes,
    and rates cover 10 seconds.
    """

    FILES = "/usr/share/doc/hookferry/prometheus"
    ADDRESS = "127.0.0.1:9090"

    def __init__(self, vm: Booted, folder: Path) -> None:
        self._vm = vm
        self._folder = folder

    def __enter__(self) -> Self:
        rules = re.sub(r"for: \d+[mh]", "for: 3s", self._vm.get(f"{self.FILES}/alerts.yml"))
        (self._folder / "alerts.yml").write_text(re.sub(r"\[\d+m\]", "[10s]", rules))
        config = self._folder / "prometheus.yml"
        times = "scrape_interval: 1s\n  evaluation_interval: 1s"
        config.write_text(self._vm.get(f"{self.FILES}/scrape.yml").replace("scrape_interval: 15s", times))
        command = self._vm.in_its_network(
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self.ADDRESS}",
        )  # fmt: skip
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _get(self, path: str) -> list[dict[str, Any]]:
        """Return the list in a response of the API, an empty list before it responds."""
        url = f"http://{self.ADDRESS}/api/v1/{path}"
        program = f"import urllib.request as u; print(u.urlopen('{url}', timeout=10).read().decode())"
        found = self._vm.attempt(f'python3 -c "{program}"')
        data = json.loads(found.out)["data"] if found.code == 0 else {}
        return data.get("alerts", data.get("result", []))

    def until_firing(self, name: str) -> str:
        """Wait until an alert fires, after it was pending; return the command at its end."""
        deadline = time.monotonic() + 90
        while not (alerts := [each for each in self._get("alerts") if self._fires(each, name)]):
            assert self._process.poll() is None, self._output()
            assert time.monotonic() < deadline, f"{name} does not fire: {self._get('alerts')}"
            time.sleep(0.2)
        waits = re.search(rf"alert: {name}\n +expr: .+\n +for:", (self._folder / "alerts.yml").read_text())
        if waits:
            query = f"count_over_time(ALERTS%7Balertname=%22{name}%22,alertstate=%22pending%22%7D[10m])"
            assert self._get(f"query?query={query}"), f"{name} was not pending before it fired"
        return alerts[0]["annotations"]["description"].rpartition(": ")[2]

    def until_resolved(self, name: str) -> None:
        """Wait until an alert is neither firing nor pending."""
        deadline = time.monotonic() + 90
        while any(each["labels"]["alertname"] == name for each in self._get("alerts")):
            assert time.monotonic() < deadline, f"{name} is not resolved: {self._get('alerts')}"
            time.sleep(0.2)

    @staticmethod
    def _fires(alert: dict[str, Any], name: str) -> bool:
        return alert["labels"]["alertname"] == name and alert["state"] == "firing"

    def _output(self) -> str:
        self._log.seek(0)
        return self._log.read()
