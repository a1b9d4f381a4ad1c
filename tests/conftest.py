"""Fixtures that several modules share."""

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import re
import signal
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import hypothesis
import listeners
import pytest
from certificates import Certificates
from client import AMPLE
from commands import Commands
from daemons import SOURCES, Recorder, destination, running, write_config
from lanes import CLOCK, Receiver
from machines import fetch
from stores import KINDS, create_from_template, make_store
from support import FakeClock, is_roomy

from relay.app import GC_THRESHOLDS
from relay.config.schema import DestinationConfig
from relay.config.secrets import Url
from relay.delivery.http.http_client import HttpClient

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell lets its background jobs ignore Ctrl-C, and processes inherit that; the tests must be
    # interruptible.
    signal.signal(signal.SIGINT, signal.default_int_handler)


gc.disable()  # until all tests are collected, see `pytest_collection_finish`

# Properties hold or not; how long an example takes says something about the machine only.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")

# The suite starts the program hundreds of times. Without cached bytecode, each start compiles it.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

create_from_template()


@cache
def _entry_points(_path, **wanted):
    return entry_points(**wanted)


entry_points = metadata.entry_points
metadata.entry_points = lambda **wanted: _entry_points(tuple(sys.path), **wanted)
"""A search of all installed packages takes 2 ms, and each relay makes one."""


MEMORY = Path("/dev/shm")
if not {"TMPDIR", "PYTEST_DEBUG_TEMPROOT"} & os.environ.keys() and is_roomy(MEMORY):
    # In memory, a thousand databases are created and closed without waiting for the disk.
    os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
WORKERS = 4 * (os.cpu_count() or 1)  # most tests wait most of their time
SLOWEST_FIRST = (
    "packaging",
    "torture",
    "browser",
    "daemon",
    "docs",
    "unit",
)  # so that no worker ends with a slow file


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run folders in parallel, each file in one worker; single files, or all with `-n 0`, in one process."""
    option = config.option
    if IS_WORKER or not config.pluginmanager.hasplugin("xdist") or option.numprocesses is not None:
        return
    folders = any(Path(arg.partition("::")[0]).is_dir() for arg in config.args)
    if folders and not option.usepdb and not option.collectonly and option.dist == "no":
        option.numprocesses, option.dist, option.loadscopereorder = WORKERS, "loadfile", False


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Have one worker at a time import a test file: the first one writes its bytecode for the others."""
    if not IS_WORKER or not isinstance(collector, pytest.Module):
        return (yield)
    with collector.path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Exempt existing objects from garbage collection, which would visit thousands of tests each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    gc.enable()


def pytest_collection_modifyitems(items):
    # Tests of the reference listener run on one kind of loop, to save time.
    items[:] = [item for item in items if "[uvloop-aiohttp" not in item.name]
    folders = {folder: at for at, folder in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: folders.get(item.path.parent.name, -1))


def pytest_asyncio_loop_factories(config, item):
    """Run tests of a loop's transports on both loops that `relay serve` may use; uvloop is an extra."""
    loops = {"asyncio": asyncio.new_event_loop}
    if item.path.name == "test_connection.py":
        with contextlib.suppress(ImportError):
            import uvloop  # noqa: PLC0415 - see above

            loops["uvloop"] = uvloop.new_event_loop
    return loops


def pytest_generate_tests(metafunc):
    """Run tests of the wire with each implementation of the public listener."""
    if "listener" in metafunc.fixturenames:
        is_wire = metafunc.module.__name__ in listeners.WIRE
        is_both = is_wire and not metafunc.function.__name__.startswith(listeners.FAST_ONLY)
        names = listeners.IMPLEMENTATIONS if is_both else ("fast",)
        metafunc.parametrize("listener", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def listener(request):
    """The implementation that `write_config` configures during the test."""
    listeners.current = request.param
    yield request.param
    listeners.current = "fast"


@pytest.fixture
async def silence(caplog):
    """Fail a test if the behaviour of a receiver appears in the log."""
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    caplog.set_level(logging.INFO)
    yield
    assert complaints == []
    assert [record.getMessage() for record in caplog.records] == []


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
async def client_for():
    """Make clients that are closed at the end."""
    clients = []

    def make(timeout=AMPLE, resolver=None, **settings):
        settings = {"connect_timeout": AMPLE, "allow_private": True, **settings}
        destination = DestinationConfig(name="zoo", url=Url(""), timeout=timeout, **settings)
        clients.append(HttpClient(destination, resolver=resolver))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


@pytest.fixture
async def recorder():
    """A receiver that records all deliveries."""
    async with Recorder() as recorder:
        yield recorder


@pytest.fixture
def tmp_path(request, tmp_path_factory):
    """A folder with a short name, since the path of a unix socket has at most 107 bytes."""
    name = re.sub(r"\W", "_", request.node.name.removeprefix("test_"))
    return tmp_path_factory.mktemp(name[:12])


if "postgres" in KINDS:
    from postgres_stores import emptied

    @pytest.fixture(autouse=True, scope="module")
    def emptied_after_a_module():
        """Empty the databases of the module's fixtures."""
        with emptied():
            yield

    @pytest.fixture(autouse=True)
    def emptied_after_a_test(emptied_after_a_module):
        """Empty the databases of a test."""
        with emptied():
            yield


@pytest.fixture
def clock():
    """A clock that the test sets."""
    return FakeClock()


@pytest.fixture
def config(tmp_path, recorder):
    """A configuration with one source of each kind and one destination, the recorder."""
    return write_config(tmp_path, SOURCES, destination("crm", recorder.url))


@pytest.fixture
async def relay(config):
    """A relay in this process, with the module's or the shared configuration."""
    async with running(config) as relay:
        yield relay


@pytest.fixture
def commands(relay):
    """Runs commands against the module's own `relay`."""
    return Commands(relay.addresses.socket)


@pytest.fixture
async def receiver():
    """A receiver that responds with 200."""
    async with Receiver().serve() as receiver:
        yield receiver


@pytest.fixture
async def store(tmp_path):
    """An empty store on the machine's clock."""
    store = make_store(tmp_path / "relay.db", CLOCK)
    await store.open()
    yield store
    await store.close()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """The folder of the wheels that an installation by Debian's Python needs, fetched once for all."""
    folder = tmp_path_factory.getbasetemp()
    if IS_WORKER:
        folder = folder.parent  # of all workers
    with (folder / "wheels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = folder / "fetched"
        if not found.exists():
            made = fetch(tmp_path_factory.mktemp("fetching"))
            made.rename(found)
    return found
