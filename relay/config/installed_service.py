"""The installed systemd service: environment and credentials that the daemon has and a shell lacks.

Reads the unit files directly, so that systemd need not run (in an image or a chroot).
"""

import grp
import os
import pwd
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from relay.config.problems import ConfigError, Problem
from relay.process.systemd import SOCKET_UNITS

UNIT = "relay.service"
FOLDERS = tuple(
    Path(folder)
    for folder in (
        "/etc/systemd/system",
        "/run/systemd/system",
        "/usr/local/lib/systemd/system",
        "/usr/lib/systemd/system",
        "/lib/systemd/system",
    )
)
"""The folders of units; the first match wins (systemd.unit(5))."""

CREDENTIALS = tuple(Path(folder) for folder in ("/etc/credstore", "/run/credstore", "/usr/lib/credstore"))
"""The folders for `LoadCredential=NAME` without a path."""

_LOADED = Path("/run/credentials") / UNIT
"""The credentials of the running service, decrypted."""

_DIRECTORIES = {
    "StateDirectory": ("STATE_DIRECTORY", "/var/lib"),
    "RuntimeDirectory": ("RUNTIME_DIRECTORY", "/run"),
    "ConfigurationDirectory": ("CONFIGURATION_DIRECTORY", "/etc"),
    "CacheDirectory": ("CACHE_DIRECTORY", "/var/cache"),
    "LogsDirectory": ("LOGS_DIRECTORY", "/var/log"),
}
_SPECIFIERS = {
    "%": "%", "n": UNIT, "N": "relay", "p": "relay", "i": "", "I": "", "E": "/etc", "S": "/var/lib",
    "t": "/run", "C": "/var/cache", "L": "/var/log",
}  # fmt: skip
_FROM_SHELL = ("STATE_DIRECTORY", "RUNTIME_DIRECTORY")
"""Variables that a shell may set to select another directory."""

_HIDING = {"ProtectHome": ("/home", "/root", "/run/user"), "PrivateTmp": ("/tmp", "/var/tmp")}  # noqa: S108 - hidden, not used
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_LARGEST = 1024 * 1024  # bytes of a credential, as systemd has it


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """The environment and credentials of the daemon, and the places where they are set."""

    environ: Mapping[str, str]
    credentials: Mapping[str, bytes | None] = {}  # None: this user may not read it
    place: str = "the unit's EnvironmentFile"  # where variables are set, for messages
    after: str = ""  # further steps after a missing variable is set, for messages
    is_running: bool = False  # for the daemon itself, not for a command
    unreadable: tuple[str, ...] = ()  # files that this user may not read, so variables may be missing
    hidden: Mapping[Path, str] = {}  # folders that the daemon cannot see, each with the setting that hides it


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """The installed `relay.service`, including its drop-ins."""

    settings: Mapping[str, Sequence[str]]  # of [Service]
    config: Path  # the file that it serves

    @property
    def name(self) -> str:
        """The name of the unit."""
        return UNIT

    @property
    def user(self) -> str:
        """The user that the daemon runs as."""
        return self._last("User") or "root"

    def runs_as(self, uid: int) -> bool:
        """Return whether the daemon runs as this user; True if its user does not exist yet."""
        try:
            return uid == (int(self.user) if self.user.isdigit() else pwd.getpwnam(self.user).pw_uid)
        except KeyError:
            return True

    @property
    def group(self) -> str:
        """The group that may use the daemon's socket."""
        if group := self._last("Group"):
            return group
        try:
            return grp.getgrgid(pwd.getpwnam(self.user).pw_gid).gr_name
        except KeyError:
            return self.user

    @property
    def directories(self) -> dict[str, str]:
        """The directories that systemd creates for it, by variable, such as STATE_DIRECTORY."""
        found = {}
        for setting, (variable, base) in _DIRECTORIES.items():
            names = [name for value in self._all(setting) for name in _words(value)]
            if names:
                found[variable] = ":".join(f"{base}/{name.partition(':')[0]}" for name in names)
        return found

    @property
    def env_files(self) -> tuple[tuple[Path, bool], ...]:
        """Its environment files, each with whether it is required."""
        found = []
        for value in self._all("EnvironmentFile"):
            path = Path(value.removeprefix("-"))
            files = sorted(Path("/").glob(str(path).lstrip("/"))) if set("*?[") & set(value) else [path]
            found += [(file, not value.startswith("-")) for file in files]
        return tuple(found)

    def given(self, environ: Mapping[str, str] = os.environ, named: Mapping[str, str] | None = None) -> Given:
        """Return the environment and credentials of the daemon; `named` replaces its environment files.

        Raises:
            ConfigError: a required environment file is missing.
        """
        found: dict[str, str] = {
            name: environ[name] for name in self._names("PassEnvironment") if name in environ
        }
        found |= _variables(self._all("Environment"))
        files = self.env_files
        unreadable: list[str] = []
        found |= named or {}
        for file, needed in files if named is None else ():
            try:
                found |= read_env_file(file)
            except PermissionError:
                unreadable.append(str(file))
            except FileNotFoundError:
                if needed:
                    what = f"the environment file {file} of {UNIT} does not exist"
                    raise ConfigError([Problem(str(file), 0, "", what)], hint="create it") from None
        for name in self._names("UnsetEnvironment"):
            found.pop(name.partition("=")[0], None)
        found |= self.directories
        found |= {name: environ[name] for name in _FROM_SHELL if environ.get(name)}
        return Given(
            environ=found,
            credentials=dict(self._credentials(environ.get("CREDENTIALS_DIRECTORY"), unreadable)),
            place=str(files[0][0]) if files else f"the EnvironmentFile= of {UNIT}",
            unreadable=tuple(unreadable),
            hidden=self._hidden(),
        )

    def _hidden(self) -> dict[Path, str]:
        hidden: dict[Path, str] = {}
        for setting, folders in _HIDING.items():
            if (value := self._last(setting).lower()) in ("yes", "true", "on", "1", "tmpfs", "disconnected"):
                hidden |= {Path(folder): f"{setting}={value}" for folder in folders}
        return hidden

    @contextmanager
    def as_user(self) -> Iterator[None]:
        """Check files as the service's user, if this process may switch to that user.

        Raises:
            ConfigError: the user or group does not exist.
        """
        if os.geteuid() != 0 or self.user in ("root", "0"):
            yield
            return
        uid, gid, groups = self._ids()
        before = os.getegid(), os.getgroups()
        os.setgroups(groups)
        os.setegid(gid)
        os.seteuid(uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(before[0])
            os.setgroups(before[1])

    def _ids(self) -> tuple[int, int, list[int]]:
        try:
            user = pwd.getpwuid(int(self.user)) if self.user.isdigit() else pwd.getpwnam(self.user)
            named = [self._last("Group"), *self._names("SupplementaryGroups")]
            own, *more = (_gid(name) if name else user.pw_gid for name in named)
        except KeyError:
            what = f"{UNIT} runs as {self.user}:{self.group}, which this machine does not have"
            raise ConfigError([Problem(UNIT, 0, "", what)], hint="systemd-sysusers relay.conf") from None
        return user.pw_uid, own, [*os.getgrouplist(user.pw_name, own), *more]

    def _credentials(self, named: str | None, unreadable: list[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield its readable credentials; those in $CREDENTIALS_DIRECTORY of the shell override them."""
        for value in self._all("SetCredential"):
            name, _, text = value.partition(":")
            yield name, text.encode()
        for setting in ("LoadCredential", "LoadCredentialEncrypted"):
            for value in self._all(setting):
                name, _, place = value.partition(":")
                yield from self._load(name, place or name, unreadable, encrypted="Encrypted" in setting)
        if named:
            with suppress(OSError):
                for file in sorted(Path(named).iterdir()):
                    yield file.name, file.read_bytes()[:_LARGEST]

    def _load(
        self, name: str, place: str, unreadable: list[str], *, encrypted: bool
    ) -> Iterator[tuple[str, bytes | None]]:
        path = Path(place)
        candidates = [path] if path.is_absolute() else [folder / place for folder in CREDENTIALS]
        if encrypted:  # only systemd can read it; the running service has it decrypted
            candidates = [_LOADED / name]
        for file in candidates:
            try:
                if file.is_dir():
                    for each in sorted(file.iterdir()):
                        yield f"{name}_{each.name}", each.read_bytes()[:_LARGEST]
                else:
                    yield name, file.read_bytes()[:_LARGEST]
            except PermissionError:
                with suppress(OSError):  # the service's user cannot read the source, but the loaded copy
                    yield name, (_LOADED / name).read_bytes()
                    return
                unreadable.append(str(file))
                yield name, None
            except OSError:
                continue
            return

    def _all(self, name: str) -> Sequence[str]:
        return self.settings.get(name, ())

    def _names(self, name: str) -> Iterator[str]:
        for value in self._all(name):
            yield from _words(value)

    def _last(self, name: str) -> str:
        values = self._all(name)
        return values[-1] if values else ""


class RunningEnvironment:
    """The environment of a running daemon. A reload reads the environment files of its unit again."""

    def __init__(self, config: Path, environ: Mapping[str, str] = os.environ) -> None:
        """Remember which variables the unit set at the start, to notice those that are removed later."""
        self._config = config
        self._environ = environ
        self._set_by_unit: frozenset[str] = frozenset()
        with suppress(ConfigError, OSError):
            if (service := self._service()) is not None:
                self._set_by_unit = frozenset(_of_unit(service.given(environ)))

    def read(self) -> Given:
        """Return the environment that a restart would give to the daemon, as far as this user can read it.

        A daemon that systemd did not start keeps the environment of its start.

        Raises:
            ConfigError: a required environment file is missing.
        """
        restart = " and restart the daemon, which reads its environment at the start"
        service = self._service()
        if service is None:
            return Given(environ=self._environ, after=restart, is_running=True)
        given = service.given(self._environ)
        files = tuple(file for file in given.unreadable if file in map(str, dict(service.env_files)))
        removed = frozenset() if files else self._set_by_unit
        kept = {name: value for name, value in self._environ.items() if name not in removed}
        return Given(
            environ={**kept, **_of_unit(given)},
            place=given.place,
            after=restart if files else "",
            unreadable=files,
            is_running=True,
        )

    def _service(self) -> Service | None:
        """Return the unit that runs this process."""
        return service_of(self._config) if "NOTIFY_SOCKET" in self._environ else None


def _of_unit(given: Given) -> dict[str, str]:
    """Return the variables that a unit sets, without the directories, which only a restart changes."""
    directories = {variable for variable, _ in _DIRECTORIES.values()}
    return {name: value for name, value in given.environ.items() if name not in directories}


def installed() -> Service | None:
    """Return the installed service that runs `relay serve`; None: not installed."""
    settings = _settings(_files(UNIT))
    for command in settings.get("ExecStart", ()):
        words = _words(command.lstrip("@-:+!"))
        if len(words) > 1 and "serve" in words[1:] and Path(words[0]).name in ("relay", "hookferry"):
            variables = _variables(settings.get("Environment", ()))
            named = _config_of(words[1:]) or variables.get("RELAY_CONFIG") or "/etc/relay/config.toml"
            folder = (settings.get("WorkingDirectory") or ["/"])[-1].removeprefix("-")
            return Service(settings=settings, config=Path("/") / folder / named)
    return None


def listen_streams() -> dict[str, str]:
    """Return the address of each enabled socket unit of the relay, by the name of the socket."""
    found: dict[str, str] = {}
    for name, unit in SOCKET_UNITS.items():
        wanted = (folder / "sockets.target.wants" / unit for folder in FOLDERS)
        streams = _settings(_files(unit), "[Socket]").get("ListenStream", ())
        if streams and any(map(os.path.lexists, wanted)):
            found[name] = streams[0]
    return found


def start_command() -> str:
    """Return the command that starts the installed service and its enabled socket units.

    systemd does not start a socket unit while the service runs.
    """
    return " ".join(("systemctl start", *(SOCKET_UNITS[name] for name in listen_streams()), "relay"))


def service_of(config: Path | None) -> Service | None:
    """Return the installed service if it uses this config file, under any path."""
    service = installed()
    if service is None or config is None:
        return None
    try:
        return service if os.path.realpath(config) == os.path.realpath(service.config) else None
    except OSError:  # a relative path in a folder that this user may not enter, or that was deleted
        return None


def directories_of(config: Path | None) -> dict[str, str]:
    """Return the environment plus the directories of the service, if it uses this config file.

    Sufficient for commands that need no secret, only paths and sockets.
    """
    service = service_of(config)
    return {**(service.directories if service else {}), **os.environ}


def read_env_file(file: Path) -> dict[str, str]:
    """Read an environment file as systemd does (systemd.exec(5), EnvironmentFile=).

    Raises:
        OSError: it cannot be read.
    """
    return parse_env(file.read_bytes().decode("utf-8", "surrogateescape"))


def parse_env(text: str) -> dict[str, str]:
    r"""Parse the text of an environment file, with quotes, backslashes and comments by systemd's rules.

    >>> parse_env("# none\nA='a $b'\nB=\"c \\\"d\" \nC=e  # f\n export D=g\nH=i\\\nj\n")
    {'A': 'a $b', 'B': 'c "d', 'C': 'e  # f', 'H': 'ij'}
    """
    found = {}
    for line in _ENV_LINE.finditer(text):
        name = line["name"]
        if name is not None and _NAME.fullmatch(name.strip()):
            found[name.strip()] = _unquoted(line["value"])
    return found


_ENV_LINE = re.compile(
    r"""
      [ \t\r\n]*
      (?: [#;] (?: \\. | [^\\\r\n] )*                # a comment
        | (?P<name> [^=\r\n]+ ) =
          (?P<value> (?: [ \t]* (?: '[^']*(?:'|\Z) | "(?: \\. | [^"\\] )*(?:"|\Z) ) )*  # quoted parts
                     (?: \\. | [^\\\r\n] )* )        # and what is not quoted
        | [^\r\n]+                                   # a line without "="
      )
    """,
    re.VERBOSE | re.DOTALL,
)
_QUOTED = re.compile(
    r"""[ \t]*(?:'(?P<plain>[^']*)(?:'|\Z)|"(?P<escaped>(?:\\.|[^"\\])*)(?:"|\Z))""", re.DOTALL
)
_TRAILING = re.compile(r"\A((?:\\.|[^\\])*?)[ \t]*\Z", re.DOTALL)  # trailing blanks without a backslash
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def _unquoted(value: str) -> str:
    """Return the value of an assignment: quoted parts, then the rest without surrounding blanks."""
    parts, at = [], 0
    while (quoted := _QUOTED.match(value, at)) is not None:
        at = quoted.end()
        if quoted["plain"] is not None:
            parts.append(quoted["plain"])
        else:
            parts.append(_ESCAPE.sub(_double_quoted, quoted["escaped"]))
    rest = _TRAILING.sub(r"\1", value[at:].lstrip(" \t"))
    return "".join(parts) + _ESCAPE.sub(lambda found: "" if found[1] in "\r\n" else found[1], rest)


def _double_quoted(found: re.Match[str]) -> str:
    if found[1] == "\n":
        return ""
    return found[1] if found[1] in '"\\`$' else found[0]


def _files(name: str) -> Iterator[Path]:
    """Yield a unit's file and its drop-ins, in the order of precedence."""
    unit = next((folder / name for folder in FOLDERS if os.path.lexists(folder / name)), None)
    if unit is None:
        return
    yield unit
    dropins: dict[str, Path] = {}
    for group in (f"{name.rpartition('.')[2]}.d", f"{name}.d"):
        for folder in reversed(FOLDERS):
            with suppress(OSError):
                dropins.update(
                    (file.name, file) for file in (folder / group).iterdir() if file.suffix == ".conf"
                )
    yield from (dropins[name] for name in sorted(dropins))


def _settings(files: Iterator[Path], wanted: str = "[Service]") -> dict[str, list[str]]:
    """Return the settings of a section in these files; an empty value resets a setting."""
    found: dict[str, list[str]] = {}
    for file in files:
        section = ""
        for line in _lines(file):
            if line.startswith("["):
                section = line
                continue
            name, equals, value = (part.strip() for part in line.partition("="))
            if section == wanted and equals:
                if value:
                    found.setdefault(name, []).append(_specified(value))
                else:
                    found.pop(name, None)
    return found


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a unit file: those that end with a backslash joined, comments left out."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    joined = ""
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith(("#", ";")):
            continue
        if line.endswith("\\"):
            joined += f"{line[:-1]} "
        elif joined or line:
            yield joined + line
            joined = ""


def _specified(value: str) -> str:
    return re.sub(r"%(.)", lambda found: _SPECIFIERS.get(found[1], found[0]), value)


def _words(value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError:  # systemd rejects it as well
        return []


def _variables(values: Sequence[str]) -> dict[str, str]:
    """Return the variables that `Environment=` sets."""
    pairs = (word.partition("=") for value in values for word in _words(value))
    return {name: text for name, equals, text in pairs if equals}


def _config_of(arguments: Sequence[str]) -> str | None:
    """Return the path after `-c` or `--config`."""
    for index, word in enumerate(arguments):
        if word in ("-c", "--config") and index + 1 < len(arguments):
            return arguments[index + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None


def _gid(name: str) -> int:
    return int(name) if name.isdigit() else grp.getgrnam(name).gr_gid
