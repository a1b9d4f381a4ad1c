"""Fixtures that several modules share."""

import asyncio
import contextlib
import logging
import signal

import pytest
from certificates import Certificates
from client import AMPLE
from commands import Commands
from daemons import Recorder
from lanes import CLOCK, Receiver
from machines import fetch

from relay.config.schema import DestinationConfig
from relay.delivery.http.http_client import Client
from relay.store.sqlite import SqliteStore

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has its background jobs ignore Ctrl-C, and processes hand that down; ours are to be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_asyncio_loop_factories(config, item):
    """Run what depends on a loop's transports on both that `relay serve` may have; uvloop is an extra."""
    loops = {"asyncio": asyncio.new_event_loop}
    if item.path.name == "test_connection.py":
        with contextlib.suppress(ImportError):
            import uvloop  # noqa: PLC0415 - see above

            loops["uvloop"] = uvloop.new_event_loop
    return loops


@pytest.fixture
async def silence(caplog):
    """Fail a test after which anything of a receiver's doing shows in the log."""
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

    def make(timeout=AMPLE, **settings):
        settings = {"connect_timeout": AMPLE, "allow_private": True, **settings}
        clients.append(Client(DestinationConfig(name="zoo", url="", timeout=timeout, **settings)))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


@pytest.fixture
async def recorder():
    """A receiver that keeps what arrives."""
    async with Recorder() as recorder:
        yield recorder


@pytest.fixture
def commands(relay):
    """What an operator types at the module's own `relay`."""
    return Commands(relay.addresses.socket)


@pytest.fixture
async def receiver():
    """A receiver that says 200."""
    async with Receiver().serve() as receiver:
        yield receiver


@pytest.fixture
async def store(tmp_path):
    """An empty store on the machine's clock."""
    store = SqliteStore(tmp_path / "relay.db", CLOCK)
    await store.open()
    yield store
    await store.close()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """The folder of what an installation by Debian's Python fetches, fetched once."""
    return fetch(tmp_path_factory.mktemp("wheels"))
