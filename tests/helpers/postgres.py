"""A real PostgreSQL server for a test run: Debian's, on a unix socket and on loopback, without fsync.

The first test that needs it starts it, for all workers of pytest-xdist. It ends with the process that started
the run, however that process ends. Each test has a separate database.
"""

import atexit
import fcntl
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

BINARIES = next(
    (str(folder) for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)),
    os.path.dirname(shutil.which("postgres") or ""),  # noqa: PTH120 - empty if it is not installed
)
USER = "postgres"
SETTINGS = (
    "fsync=off",
    "full_page_writes=off",
    "max_connections=300",
    "shared_buffers=64MB",
    "max_wal_size=4GB",
    "listen_addresses=127.0.0.1",
    "autovacuum=off",
    "wal_level=replica",
)
WATCH = """
"$@" & server=$!
trap 'kill -INT $server; wait $server; rm -rf "$FOLDER"; exit' TERM INT
while kill -0 "$RUN" 2>/dev/null && kill -0 $server 2>/dev/null; do sleep 1 & wait $!; done
kill -INT $server 2>/dev/null; wait $server
[ -n "$KEEP" ] && kill -0 "$RUN" 2>/dev/null || rm -rf "$FOLDER"
"""
"""Runs the server until the test run, or the server itself, is gone; then removes its folder.

With KEEP, the folder stays if only the server is gone.
"""

POOLER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
POOLER_SETTINGS = """\
[databases]
* = host=127.0.0.1 port={server} user={user} pool_size={sessions}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
admin_users = {user}
pool_mode = transaction
max_client_conn = 1000
server_login_retry = 1
logfile = {folder}/log
"""

THROUGH_POOLER = bool(os.environ.get("RELAY_TEST_POOLER"))
"""Whether the stores of tests connect through PgBouncer in transaction mode."""


def not_pooled(reason):
    """Return the mark of tests that cannot pass through a pooler in transaction mode."""
    return pytest.mark.skipif(THROUGH_POOLER, reason=f"through a pooler: {reason}")


needs_pooler = pytest.mark.skipif(
    not POOLER or not BINARIES, reason="needs the packages postgresql and pgbouncer"
)
needs_postgres = pytest.mark.skipif(not BINARIES, reason="needs the package postgresql, not installed here")

_numbers = itertools.count()
_made = {}  # DSN by path, see `database_of`
_server = None
_pooler = None  # see `maybe_pooled`
_watchers = []


class Server:
    """A running server."""

    def __init__(self, folder, port, settings=(), enter=()):
        self.folder, self.port, self.settings, self.enter = folder, port, settings, enter

    def url(self, database):
        """Return the DSN of a database over loopback."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    @property
    def pid(self):
        """The first process of a server in this folder."""
        return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])

    def crash(self, number=signal.SIGQUIT):
        """End the server at once, without a checkpoint; wait until it is gone. Start it with `keep`."""
        pid = self.pid
        os.kill(pid, number)
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def make_standby(self, folder, settings=()):
        """Start a standby of this server in a new folder; returns its server."""
        folder.mkdir(parents=True)
        as_user = _as_user(folder)
        copy = [f"{BINARIES}/pg_basebackup", "-D", str(folder / "data"), "-R", "-X", "stream", "-c", "fast"]
        place = ["-h", str(self.folder), "-p", str(self.port), "-U", USER, "--no-sync"]
        subprocess.run([*as_user, *copy, *place], check=True, capture_output=True, cwd="/")
        return start(folder, settings=settings, keep=True)

    def restart(self):
        """Start the server again after `crash`, in the same folder and on the same port."""
        start(self.folder, port=self.port, settings=self.settings, keep=True, enter=self.enter)

    def run(self, sql, database="postgres"):
        """Run a statement with psql; returns the output, unaligned and without headings."""
        command = [f"{BINARIES}/psql", "-qAtX", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql]
        place = {"PGHOST": str(self.folder), "PGPORT": str(self.port), "PGUSER": USER}
        done = subprocess.run(
            command, env={**os.environ, **place}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def start(folder, *, watched=None, port=None, settings=(), keep=False, enter=()):
    """Start a server in a new folder, and wait until it accepts connections.

    The server ends when the process `watched` (by default this one) ends. It uses an existing cluster in the
    folder; with `keep`, the folder stays after a crash of the server. `enter` is the prefix of a command that
    runs in the network of another machine, so that the server listens there.
    """
    folder.mkdir(exist_ok=True, parents=True)
    as_user = _as_user(folder)
    data = folder / "data"
    if not data.exists():
        make = [f"{BINARIES}/initdb", "-D", str(data), "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run([*as_user, *make, "--locale=C.UTF-8"], check=True, capture_output=True, cwd="/")
    port = port or _free_port()
    options = [f"unix_socket_directories={folder}", f"port={port}", *SETTINGS, *settings]
    flags = [part for option in options for part in ("-c", option)]
    with (folder / "log").open("ab") as log:
        watcher = subprocess.Popen(
            ["sh", "-c", WATCH, "sh", *enter, *as_user, f"{BINARIES}/postgres", "-D", str(data), *flags],
            env={**os.environ, "RUN": str(watched or os.getpid()), "FOLDER": str(folder), "KEEP": "1" * keep},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    _watchers.append(watcher)  # it outlives this process, so Python must not warn about it
    ready = [f"{BINARIES}/pg_isready", "-q", "-h", str(folder), "-p", str(port), "-t", "1"]
    deadline = time.monotonic() + 60
    while subprocess.run(ready, check=False).returncode:
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    return Server(folder, port, settings, enter)


class Pooler:
    """A running PgBouncer in transaction mode."""

    def __init__(self, server, sessions=4):
        """Start PgBouncer in front of a server; every transaction gets one of its `sessions`."""
        self.port = _free_port()
        self._folder = folder = Path(tempfile.mkdtemp(prefix="relay-pooler-"))
        settings = folder / "pgbouncer.ini"
        settings.write_text(
            POOLER_SETTINGS.format(
                server=server.port, user=USER, port=self.port, folder=folder, sessions=sessions
            )
        )
        as_user = []
        if os.geteuid() == 0:  # it refuses to run as root
            for path in (folder, settings):
                shutil.chown(path, USER, USER)
            as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--pdeathsig=KILL"]
        self.process = subprocess.Popen(
            [*as_user, POOLER, "-q", str(settings)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert self.process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            else:
                break

    def url(self, database):
        """Return the DSN of a database of the server, through the pooler."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}?pooler=true"

    def renew_sessions(self):
        """Give the next transactions new sessions of the server."""
        place = ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-d", "pgbouncer"]
        subprocess.run([f"{BINARIES}/psql", "-qX", *place, "-c", "RECONNECT"], check=True)

    def stop(self):
        """End the process, even if it was suspended."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self._folder)


def server():
    """Return the server of this test run, started by the first caller of all workers."""
    global _server  # noqa: PLW0603 - one per process
    if _server is None:
        if not BINARIES:
            pytest.skip("needs the package postgresql, not installed here")
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"{os.getpid()}")
        folder = Path(tempfile.gettempdir()) / f"relay-postgres-{run}"
        folder.mkdir(exist_ok=True)
        noted = folder / "port"
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if noted.exists():
                _server = Server(folder, int(noted.read_text()))
            else:
                whole_run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
                _server = start(folder, watched=whole_run)
                noted.write_text(str(_server.port))
    return _server


def database_of(path):
    """Return the DSN of a test's database, created at the first call with this path."""
    if path not in _made:
        name = f"t_{os.getpid()}_{next(_numbers)}"
        server().run(f"CREATE DATABASE {name}")
        _made[path] = server().url(name)
    return _made[path]


def drop_databases():
    """Drop the databases of the tests so far; call it when a test has ended.

    Those of `postgres_stores` are kept, because later tests use them again.
    """
    for path in [path for path in _made if isinstance(path, Path)]:
        server().run(f"DROP DATABASE {name_of(_made.pop(path))} WITH (FORCE)")


def name_of(url):
    """Return the name of the database in a DSN."""
    return url.rpartition("/")[2].partition("?")[0]


def maybe_pooled(url):
    """Return the DSN of a store's database; with RELAY_TEST_POOLER, through a pooler of this process."""
    global _pooler  # noqa: PLW0603 - one per process
    if not THROUGH_POOLER:
        return url
    if _pooler is None:
        _pooler = Pooler(server())
        atexit.register(_pooler.stop)
    return _pooler.url(name_of(url))


def renew_sessions():
    """End the sessions of the pooler of this process, after a test has changed their settings."""
    if _pooler is not None:
        _pooler.renew_sessions()


def _as_user(folder):
    """Give a folder to the server's user, because root may not run it; returns how to run as that user."""
    if os.geteuid() != 0:
        return []
    shutil.chown(folder, USER, USER)
    return ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":  # a server by hand: python tests/helpers/postgres.py, ends with Ctrl-C
    by_hand = start(Path(tempfile.mkdtemp(prefix="relay-postgres-")))
    sys.stdout.write(f"{by_hand.url(USER)}\n")
    sys.stdout.flush()
    sys.stdin.read()
