"""The machine that runs the tests: its missing programs, and small disks and roots for a test.

A root contains the Debian packages that a test names, copied from this machine, and nothing else. It takes a
second and no network. dpkg, systemd's own tools and Python work in it as on any Debian; only commands that
need a running systemd do nothing.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import pytest
from daemons import Daemon
from packaging.requirements import Requirement

OF_PIP = ("INSTALLER", "REQUESTED", "direct_url.json")
"""Files that an installation adds to those of a wheel."""

ROOT = os.geteuid() == 0
NOBODY = 65_534  # the uid that owns nothing
SHARED = all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(__file__).parents)
"""Whether other users may enter the checkout, where a process without root's rights reads the program."""

needs_root = pytest.mark.skipif(not ROOT, reason="needs root")
needs_other_users = pytest.mark.skipif(
    not (ROOT and SHARED), reason="needs root, and a checkout that other users may enter"
)


def needs(*programs):
    """Skip the test on a machine that lacks one of these programs."""
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}, not installed here")


# --- disks --------------------------------------------------------------------------------------------


class SmallDisk:
    """A mounted file system with a file that can fill it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "somebody-elses"

    @property
    def free(self) -> int:
        """Free bytes."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def fill(self, leaving: int = 0) -> None:
        """Fill the disk; leave this number of bytes free."""
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            while (size := self.free - leaving) > 0:
                if not file.write(b"\0" * min(size, 2**20)):
                    break

    def clear(self) -> None:
        """Free the space again."""
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disk(path: Path, size: int, options: str = "rw") -> Iterator[SmallDisk]:
    """Mount a file system of `size` bytes; skip the test if that is not permitted."""
    path.mkdir(mode=0o700, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700,{options}", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


# --- roots --------------------------------------------------------------------------------------------

CHECKOUT = Path(__file__).parents[2]
STATUS = Path("/var/lib/dpkg/status")
BULK = ("/usr/share/doc/", "/usr/share/man/", "/usr/share/locale/", "/usr/share/i18n/")
FILES = (
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "config.toml",
    "pyproject.toml",
    "setup.py",
)
DEBIAN = ("apt", "passwd", "python3-venv", "systemd")
"""The packages that docs/install.md requires, besides the essential ones."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Root:
    """A root directory in which commands run with chroot(8)."""

    def __init__(self, path, *packages):
        if not STATUS.exists():
            pytest.skip("needs a Debian, whose packages it installs")
        if not ROOT:
            pytest.skip("needs root, to run commands in another root directory")
        self.path = path
        self._packages = _closure(packages)
        self._layers = []
        self._copy()

    def run(self, *command, cwd="/", user=None, **environment):
        """Run a command in the root, which must succeed, and return its output."""
        done = self.attempt(*command, cwd=cwd, user=user, **environment)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def attempt(self, *command, cwd="/", user=None, **environment):
        """Run a command in the root and return the finished process."""
        whose = () if user is None else (f"--userspec={user}:{user}",)
        return subprocess.run(
            ["chroot", *whose, self.path, "env", f"--chdir={cwd}", *command],
            env={"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", **environment},
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def serve(self, **environment):
        """Return a daemon in the root with the user, directories and secrets that the unit gives it."""
        for folder, mode in (("var/lib/relay", 0o700), ("run/relay", 0o750)):
            (self.path / folder).mkdir(exist_ok=True, parents=True)
            (self.path / folder).chmod(mode)
            self.run("chown", "relay:relay", f"/{folder}")
        directories = ("STATE_DIRECTORY=/var/lib/relay", "RUNTIME_DIRECTORY=/run/relay")
        given = (f"PATH={PATH}", *directories, *(f"{name}={value}" for name, value in environment.items()))
        command = ("chroot", "--userspec=relay:relay", str(self.path), "env", *given)
        return Daemon(Path("/etc/relay/config.toml"), (*command, "/opt/relay/bin/relay", "serve"))

    def add(self, path, text, mode=0o644):
        """Write a file in the root."""
        file = self.path / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def copy(self, path):
        """Return an equal root at another path; where the kernel has overlays, without copying its files."""
        other = object.__new__(type(self))
        other.path, other._packages = path, self._packages
        other._layers = [path.with_name(f"{path.name}.{name}") for name in ("changes", "work")]
        for folder in (path, *other._layers):
            folder.mkdir()
        changes, work = other._layers
        options = f"lowerdir={self.path},upperdir={changes},workdir={work},redirect_dir=on"
        mount = ["mount", "-t", "overlay", "overlay", "-o", options, path]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            for folder in (path, *other._layers):
                folder.rmdir()
            other._layers = []
            subprocess.run(["cp", "-a", self.path, path], check=True)
        return other

    def remove(self):
        """Delete the root; pytest would keep hundreds of megabytes for days."""
        if self._layers:
            subprocess.run(["umount", "-l", self.path], check=True)
        for folder in (self.path, *self._layers):
            shutil.rmtree(folder)

    def _copy(self):
        self.path.chmod(0o755)
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.path / "usr" / name).mkdir(parents=True, exist_ok=True)
            (self.path / name).symlink_to(f"usr/{name}")
        listed = subprocess.run(
            ["dpkg-query", "--listfiles", *self._packages], capture_output=True, text=True, check=True
        ).stdout.split("\n")
        wanted = {path for path in listed if path.startswith("/") and not path.startswith(BULK)}
        there = sorted(
            path for path in wanted if os.path.lexists(path) and path not in ("/.", "/bin", "/sbin")
        )
        there = [path for path in there if path not in ("/lib", "/lib64")]
        pack = subprocess.Popen(
            ["tar", "-C", "/", "--no-recursion", "-cf-", "-T-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        unpack = subprocess.Popen(["tar", "-C", self.path, "-xpf-"], stdin=pack.stdout)
        pack.stdout.close()
        pack.communicate("\n".join(path[1:] for path in there).encode())
        assert (unpack.wait(), pack.wait()) == (0, 0)
        self._pretend_configured()

    def _pretend_configured(self):
        """Do the necessary part of the packages' own scripts."""
        base = self.path / "usr/share/base-passwd"
        for name in ("passwd", "group"):
            shutil.copy(base / f"{name}.master", self.path / "etc" / name)
        (self.path / "var/lib/dpkg/info").mkdir(parents=True, exist_ok=True)
        for folder in (
            "dev",
            "proc",
            "run",
            "tmp",
            "root",
            "usr/local/bin",
            "usr/local/sbin",
            "var/lib/dpkg/updates",
        ):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        os.mknod(self.path / "dev/null", stat.S_IFCHR, os.makedev(1, 3))
        (self.path / "dev/null").chmod(0o666)
        dpkg = self.path / "var/lib/dpkg"
        (dpkg / "status").write_text("\n\n".join(self._packages.values()) + "\n\n")
        (dpkg / "available").touch()
        for file in (STATUS.parent / "info").iterdir():
            package = file.name.rpartition(".")[0].partition(":")[0]
            if package in self._packages or file.name == "format":
                shutil.copy(file, dpkg / "info")


def fetch(folder):
    """Collect the wheels that an installation with Debian's Python needs, and return their folder.

    They are made of the packages that this Python has, if both have the same version: to read the pages of an
    index costs pip six seconds of CPU. Otherwise, pip fetches them.
    """
    python = "/usr/bin/python3"
    has_venv = (
        Path(python).exists()
        and not subprocess.run(
            [python, "-c", "import ensurepip"], capture_output=True, check=False
        ).returncode
    )
    if not has_venv:
        pytest.skip("needs Debian's own Python with venv: apt-get install python3-venv")
    declared = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    extras = declared["project"]["optional-dependencies"]
    wanted = [*declared["build-system"]["requires"], *declared["project"]["dependencies"]]
    wanted += [each for extra in ("fast", "ed25519", "postgres", "schemas") for each in extras[extra]]
    (folder / "wheels").mkdir()
    version = [python, "-c", "import sys; print(sys.version_info[:2])"]
    shown = subprocess.run(version, capture_output=True, text=True, check=True).stdout
    if shown == f"{sys.version_info[:2]}\n" and _repacked(wanted, folder / "wheels"):
        return folder / "wheels"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    command = [*pip, "wheel", "-q", "-w", folder / "wheels", *wanted]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return folder / "wheels"


def _repacked(wanted, folder):
    """Make wheels of installed packages and of their dependencies; returns False if one is not installed."""
    todo, done = [Requirement(each) for each in wanted], set()
    while todo:
        required = todo.pop()
        needed = required.marker is None or required.marker.evaluate({"extra": ""})
        if required.name in done or not needed:
            continue
        done.add(required.name)
        try:
            package = metadata.distribution(required.name)
        except metadata.PackageNotFoundError:
            return False
        todo += map(Requirement, package.requires or ())
        *_, tag = re.findall(r"^Tag: (.+)$", package.read_text("WHEEL"), re.MULTILINE)
        name = re.sub(r"[-_.]+", "_", package.name)
        rows = []
        with zipfile.ZipFile(folder / f"{name}-{package.version}-{tag}.whl", "w") as wheel:
            for file in package.files:
                is_info = len(file.parts) == 2 and file.parts[0].endswith(".dist-info")
                if is_info and file.name == "RECORD":
                    record = str(file)
                elif not ({"..", "__pycache__"} & set(file.parts) or (is_info and file.name in OF_PIP)):
                    digest = f"{file.hash.mode}={file.hash.value}" if file.hash else ""
                    rows.append(f"{file},{digest},{'' if file.size is None else file.size}")
                    wheel.write(file.locate(), str(file))
            wheel.writestr(record, "\n".join((*rows, f"{record},,")) + "\n")
    return True


def offline(folder):
    """Return the environment with which pip uses only the wheels of a folder."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def copy_checkout(folder):
    """Copy the files that an installation reads; a build leaves files in the copy, not in the checkout."""
    folder.mkdir(parents=True)
    for name in ("relay", "plugins", "systemd", "docs", "packaging", ".ci"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(CHECKOUT / name, folder)
    return folder


def _closure(wanted):
    """Return the dpkg stanzas of these packages, of essential ones and of their dependencies, by name."""
    stanzas, provided = {}, {}
    for stanza in STATUS.read_text().strip().split("\n\n"):
        fields = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", stanza, re.MULTILINE))
        if fields["Status"] != "install ok installed":
            continue
        name = fields["Package"]
        stanzas[name] = stanza, fields
        for other in _names(fields.get("Provides", "")):
            provided.setdefault(other[0], name)
    found = {}
    todo = [*wanted, *(name for name, (_, fields) in stanzas.items() if fields.get("Essential") == "yes")]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        if name not in stanzas:
            pytest.skip(f"needs the package {name}: apt-get install {name}")
        stanza, fields = stanzas[name]
        found[name] = stanza
        for choices in _names(f"{fields.get('Pre-Depends', '')}, {fields.get('Depends', '')}"):
            todo += [
                next(provided.get(each, each) for each in choices if each in stanzas or each in provided)
            ]
    return found


def _names(field):
    """Return the alternative packages of each relation in a field."""
    relations = [relation for relation in field.split(",") if relation.strip()]
    return [[re.split(r"[\s:(]", each.strip())[0] for each in relation.split("|")] for relation in relations]
