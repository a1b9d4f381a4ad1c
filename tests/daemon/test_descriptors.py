"""File descriptors: the limit is raised at start, connections fit it, and no receiver is blamed."""

import contextlib
import errno
import os
import socket
import sys
import threading
import types
from pathlib import Path

import pytest
import receivers
from client import send
from daemons import SOURCES, Daemon, adorn, write_config
from lanes import CLOCK, destination, dispatcher_for, ended
from lanes import send as send_event
from support import until
from torture.descriptors import EVENTS, torture
from wire import Wire, request

from relay.base.clock import SECOND
from relay.delivery.http import http_client as client_module
from relay.delivery.http import resolver as resolver_module
from relay.delivery.http import ssrf as guard_module
from relay.delivery.ping import Pings


def limited(soft, hard):
    """Return the command of a daemon that starts with these limits of open files."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))"
    return (sys.executable, "-c", f"{code}; from relay.cli import main; main()", "serve")


def limits(pid):
    """Return a process's soft and hard limit of open files."""
    [line] = [
        each for each in Path(f"/proc/{pid}/limits").read_text().splitlines() if "Max open files" in each
    ]
    return tuple(int(word) for word in line.split()[3:5])


async def test_the_soft_limit_is_raised_to_the_hard_one(tmp_path):
    async with Daemon(write_config(tmp_path, SOURCES), limited(256, 4096)) as daemon:
        assert limits(daemon.process.pid) == (4096, 4096)


async def test_more_silent_connections_than_descriptors_do_not_block_senders(tmp_path):
    async with (
        Daemon(write_config(tmp_path, SOURCES), limited(64, 256)) as daemon,
        contextlib.AsyncExitStack() as held,
    ):
        for number in range(400):
            await held.enter_async_context(await Wire.open(daemon.url))
            if number % 50 == 0:
                async with await Wire.open(daemon.url) as wire:
                    await wire.send(request("POST", "/v1/events", adorn(f"s{number}")))
                    assert (await wire.answer()).status == 200
        assert not [line for line in daemon.lines if "system resource" in line or "Too many open" in line]


@pytest.mark.parametrize("variant", ["honest", "without-uvloop"])
async def test_without_a_free_descriptor_deliveries_are_held_and_no_receiver_fails(tmp_path, variant):
    findings = await torture(tmp_path, 2.0, variant=variant)
    assert (findings.failed, findings.opened, findings.undelivered) == (0, 0, set())
    assert findings.held >= EVENTS
    assert findings.fine, findings


async def test_the_check_detects_a_relay_that_counts_its_own_lack_as_failures(tmp_path):
    findings = await torture(tmp_path, 0.5, variant="blames-receivers")
    assert findings.failed
    assert not findings.fine


# --- one attempt --------------------------------------------------------------------------------------


@pytest.fixture
def no_sockets(monkeypatch):
    """Let every new socket of the client fail with an error number."""

    def fail_with(number):
        def fail(*_, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(client_module, "socket", types.SimpleNamespace(socket=fail))

    return fail_with


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.EMFILE, "out of file descriptors"),
        (errno.ENFILE, "out of file descriptors"),
        (errno.ENOMEM, "out of memory"),
        (errno.ENOBUFS, "out of memory"),
    ],
)
async def test_a_socket_that_cannot_be_created_is_not_a_failure_of_the_receiver(
    client_for, no_sockets, number, what
):
    async with receivers.answers() as receiver:
        no_sockets(number)
        with pytest.raises(client_module.OutOfResourcesError, match=what):
            await send(client_for(), receiver.url)
        assert receiver.connections == 0


async def test_without_a_descriptor_the_check_for_own_addresses_refuses(store, receiver, monkeypatch, caplog):
    """The check needs a socket to ask the kernel whether an address is the relay's own."""

    def fail(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    port = int(receiver.url.rpartition(":")[2].partition("/")[0])
    async with dispatcher_for(store, destination("crm", receiver.url), own=[("0.0.0.0", port)]) as dispatcher:
        monkeypatch.setattr(
            guard_module,
            "socket",
            types.SimpleNamespace(
                socket=fail, AF_INET=socket.AF_INET, AF_INET6=socket.AF_INET6, SOCK_DGRAM=socket.SOCK_DGRAM
            ),
        )
        await send_event(store)
        await until(lambda: dispatcher.lanes["crm"].held == "out of file descriptors")
        monkeypatch.undo()
        await until(lambda: dispatcher.lanes["crm"].held == "resting")
        assert "is the relay itself" in caplog.text
    assert receiver.requests == []


async def test_other_socket_errors_are_connect_failures(client_for, no_sockets):
    no_sockets(errno.EACCES)
    assert (await send(client_for(), "http://127.0.0.1:1/")).result == "connect"


async def test_a_lookup_without_a_descriptor_is_not_a_failure_of_the_receiver(
    client_for, no_sockets, monkeypatch
):
    """The C library then reports that the name is unknown."""

    def fail(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(resolver_module.socket, "getaddrinfo", fail)
    assert (await send(client_for(), "http://absent.example/")).result == "dns"
    no_sockets(errno.EMFILE)
    with pytest.raises(client_module.OutOfResourcesError, match="out of file descriptors"):
        await send(client_for(), "http://absent.example/")


async def test_a_lookup_without_a_thread_is_not_a_failure_of_the_receiver(client_for, monkeypatch):
    def fail(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(client_module.OutOfResourcesError, match="out of memory"):
        await send(client_for(), "http://absent.example/")


async def test_a_kept_connection_that_died_is_not_replaced_without_a_descriptor(client_for, no_sockets):
    async with receivers.closes_kept_alive() as receiver:
        client = client_for()
        await send(client, receiver.url)
        no_sockets(errno.EMFILE)
        with pytest.raises(client_module.OutOfResourcesError):
            await send(client, receiver.url)


async def test_a_lane_reports_the_missing_resource_and_continues_by_itself(
    store, receiver, no_sockets, monkeypatch, caplog
):
    configs = [destination(name, receiver.url) for name in ("crm", "erp")]
    began = CLOCK.steady()
    async with dispatcher_for(store, *configs) as dispatcher:
        no_sockets(errno.EMFILE)
        sent = [await send_event(store) for _ in range(20)]
        await until(lambda: {lane.held for lane in dispatcher.lanes.values()} == {"out of file descriptors"})
        ping = await Pings(CLOCK).send(dispatcher.lanes["crm"])
        monkeypatch.undo()
        rows = await ended(store, 40)
    assert {(row["state"], row["attempts"]) for row in rows} == {("delivered", 1)}
    assert sorted(receiver.ids) == sorted(sent * 2)
    assert (ping["ok"], ping["error"]) == (False, "not sent: this machine is out of file descriptors")
    assert ping["verdict"] == "would be held; nothing was sent"
    lines = [record for record in caplog.records if "out of file descriptors" in record.message]
    assert 1 <= len(lines) <= 3 + (CLOCK.steady() - began) / SECOND
