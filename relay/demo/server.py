"""A temporary PostgreSQL server for the demo of a cluster: Debian's, on a unix socket only."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from relay.errors import RelayError

USER = "postgres"  # of the server, and of the system if this process is root
START_TIMEOUT = 30.0  # seconds
SETTINGS = ("listen_addresses=", "shared_buffers=32MB", "max_connections=60")
INSTALL = "install it: apt-get install postgresql; or name an empty database: --storage postgresql://…"


def binaries() -> Path:
    """Return the folder of the server's programs.

    Raises:
        RelayError: no server is installed.
    """
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if found := shutil.which("pg_ctl"):
        folders.append(Path(found).parent)
    for folder in reversed(folders):
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists():
            return folder
    raise RelayError("the demo of a cluster needs a PostgreSQL server", hint=INSTALL)


@contextmanager
def temporary_server(folder: Path) -> Iterator[str]:
    """Run a server in an empty folder; yields the URL of its database.

    Raises:
        RelayError: no server is installed, or it does not start.
    """
    programs = binaries()
    data, log = folder / "data", folder / "log"
    user = _owner(folder)
    make: list[str | Path] = ["initdb", "-D", data, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync"]
    _run(programs, [*make, "--locale=C.UTF-8"], user, log)
    options = " ".join(f"-c {setting}" for setting in (*SETTINGS, f"unix_socket_directories={folder}"))
    start: list[str | Path] = ["pg_ctl", "start", "-D", data, "-l", log, "-o", options, "-w"]
    _run(programs, [*start, "-t", f"{START_TIMEOUT:.0f}"], user, log)
    try:
        yield f"postgresql://{USER}@/postgres?host={folder}"
    finally:
        stop_server(folder)


def stop_server(folder: Path) -> None:
    """End the server in a folder at once, if it runs.

    Raises:
        RelayError: it does not end.
    """
    if (folder / "data" / "postmaster.pid").exists():
        stop: list[str | Path] = ["pg_ctl", "stop", "-D", folder / "data", "-m", "immediate", "-w"]
        _run(binaries(), stop, USER if os.geteuid() == 0 else None, folder / "log")


def owners() -> set[int]:
    """Return the users that own the folders of this user's demos."""
    found = {os.geteuid()}
    if os.geteuid() == 0:
        with suppress(KeyError):
            found.add(pwd.getpwnam(USER).pw_uid)
    return found


def _owner(folder: Path) -> str | None:
    """Give the folder to the user that runs the server; None: this user does. The server refuses root."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(USER)
    except KeyError:
        raise RelayError(f"there is no user {USER} to run the server as", hint=INSTALL) from None
    shutil.chown(folder, USER, USER)
    (folder / "log").touch()
    shutil.chown(folder / "log", USER, USER)
    return USER


def _run(programs: Path, command: list[str | Path], user: str | None, log: Path) -> None:
    with log.open("ab") as output:  # no pipe: the server would keep it open
        done = subprocess.run(  # noqa: S603 - constants and our own folder
            [programs / command[0], *command[1:]],
            user=user,
            group=user,
            extra_groups=[] if user else None,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C ends the demo, which then stops the server
            check=False,
        )
    if done.returncode:
        detail = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RelayError(f"{command[0]} failed: {''.join(detail) or f'exit code {done.returncode}'}")
