"""Names without addresses, hanging look-ups, names that move."""

import asyncio
import socket
import threading

import pytest
import receivers
from client import AMPLE, SHORT, send
from lanes import destination, dispatcher_for, ended
from lanes import send as send_event

from relay.delivery.http import resolver as resolver_module
from relay.delivery.http.result import Timing

pytestmark = pytest.mark.usefixtures("silence")


@pytest.fixture
def dead_dns(monkeypatch):
    """Let every look-up hang until the end of the test, except that of `localhost`."""
    released, real = threading.Event(), socket.getaddrinfo

    def hang(host, *args, **kwargs):
        if host != "localhost":
            released.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real(host, *args, **kwargs)

    monkeypatch.setattr(resolver_module.socket, "getaddrinfo", hang)
    yield
    released.set()


async def test_a_name_without_an_address_is_a_dns_failure(client_for, monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(resolver_module.socket, "getaddrinfo", fail)
    answer = await send(client_for(), "http://absent.example/")
    assert (answer.result, answer.error) == (
        "dns",
        "cannot resolve absent.example: Name or service not known",
    )


async def test_a_hanging_look_up_ends_at_the_connect_timeout(client_for, dead_dns):
    answer = await send(client_for(connect_timeout=SHORT), "http://dead.example/")
    assert (answer.result, answer.error) == ("dns", "the name was not resolved within 200ms")


async def test_dead_names_delay_neither_other_destinations_nor_other_threads(client_for, dead_dns):
    dead = [asyncio.create_task(send(client_for(), f"http://dead{number}.example/")) for number in range(40)]
    async with receivers.answers() as receiver:
        async with asyncio.timeout(0.8 * AMPLE):
            healthy = await send(client_for(), f"http://localhost:{receiver.port}/")
            await asyncio.to_thread(int)
        assert healthy.result == "ok"
    assert not any(task.done() for task in dead)
    held = [thread for thread in threading.enumerate() if thread.name.startswith("dns dead")]
    assert len(held) == 40
    assert all(thread.daemon for thread in held)  # otherwise they would block the exit of the process
    for task in dead:
        task.cancel()
    await asyncio.wait(dead)


async def test_a_name_that_cannot_be_encoded_is_a_failed_look_up():
    with pytest.raises(OSError, match="not a host name"):
        await resolver_module.Resolver().resolve("x" * 64 + ".example")


async def test_a_link_local_address_keeps_its_zone(monkeypatch):
    info = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 80, 0, 3))
    monkeypatch.setattr(resolver_module.socket, "getaddrinfo", lambda *_, **__: [info])
    (found,) = await resolver_module.Resolver().resolve("printer.local", 80)
    assert found["host"] == "fe80::1%3"


@pytest.mark.parametrize(
    "url", ["ftp://receiver.example/", "http://127.1/", "http:///", "nothing", "http://[::1/"]
)
async def test_a_url_that_cannot_be_dialled_is_blocked_and_not_in_the_error(client_for, url):
    answer = await send(client_for(), url.replace("//", "//user:hunter2@", 1))
    assert answer.result == "blocked"
    assert "hunter2" not in answer.error


# --- names that move ----------------------------------------------------------------------------------

URL = "http://moves.example/hook"


class Moving:
    """A name that the test moves; the port moves too, because all receivers are on one machine."""

    def __init__(self):
        self.to = None
        self.look_ups = 0

    def find(self, host, port, **_):
        assert host == "moves.example"
        self.look_ups += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", self.to.port))]


@pytest.fixture
def moving(monkeypatch):
    moving = Moving()
    monkeypatch.setattr(resolver_module.socket, "getaddrinfo", moving.find)
    return moving


async def test_a_name_that_moves_is_followed_under_steady_traffic(client_for, moving, monkeypatch):
    monkeypatch.setattr("relay.delivery.http.http_client.MAX_AGE", 0.2)
    monkeypatch.setattr("relay.delivery.http.connector.DNS_TTL", 0.1)
    async with receivers.answers() as old, receivers.answers() as new, asyncio.timeout(AMPLE):
        client, moving.to = client_for(), old
        for _ in range(3):
            assert (await send(client, URL)).result == "ok"
        assert (old.connections, moving.look_ups) == (1, 1)
        moving.to = new
        while not new.requests:
            assert (await send(client, URL)).result == "ok"
            await asyncio.sleep(0.005)  # steady traffic, never idle for long
        before = len(old.requests)
        assert old.connections <= 3
        assert (await send(client, URL)).result == "ok"
        assert len(old.requests) == before


async def test_a_connection_is_reused_until_its_maximum_age(client_for, moving):
    async with receivers.answers() as receiver:
        client, moving.to = client_for(), receiver
        for _ in range(50):
            await send(client, URL)
        assert (receiver.connections, moving.look_ups) == (1, 1)


async def test_a_ping_resolves_its_name_again(client_for, moving):
    async with receivers.answers() as old, receivers.answers() as new:
        client = client_for()
        for moving.to in (old, new):
            answer = await client.send(URL, {}, b"{}", Timing())
            assert (answer.result, len(moving.to.requests)) == ("ok", 1)


async def test_a_name_whose_address_refuses_is_resolved_again_at_the_next_attempt(client_for, moving):
    async with receivers.answers() as new:
        async with receivers.answers() as old:
            client, moving.to = client_for(), old
        assert (await send(client, URL)).result == "connect"
        moving.to = new
        assert (await send(client, URL)).result == "ok"


async def test_a_reload_resolves_the_names_of_unchanged_destinations_again(store, moving):
    async with receivers.answers() as old, receivers.answers() as new:
        moving.to = old
        config = destination("crm", URL)
        async with dispatcher_for(store, config) as dispatcher:
            lane = dispatcher.lanes["crm"]
            await send_event(store)
            await ended(store, 1)
            moving.to = new
            await send_event(store)
            await ended(store, 2)
            assert (len(old.requests), old.connections) == (2, 1)
            dispatcher.adopt(await dispatcher.plan({"crm": config}))
            assert dispatcher.lanes["crm"] is lane
            await send_event(store)
            await ended(store, 3)
        assert (len(old.requests), len(new.requests)) == (2, 1)


async def test_a_reload_does_not_touch_an_attempt_in_flight(store, moving):
    async with receivers.hang() as old, receivers.answers() as new, asyncio.timeout(AMPLE):
        moving.to = old
        config = destination("crm", URL, timeout=0.5)
        async with dispatcher_for(store, config) as dispatcher:
            await send_event(store)
            await old.until(requests=1)
            moving.to = new
            dispatcher.adopt(await dispatcher.plan({"crm": config}))
            [row] = await ended(store)
        attempts = await store.queries.find("attempts", delivery_id=row["id"])
        assert [attempt["result"] for attempt in reversed(attempts)] == ["timeout", "ok"]
