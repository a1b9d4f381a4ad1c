"""The proxies of docs/install.md, in front of a relay that works, hangs or is down."""

import asyncio
import re
import socket
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from daemons import SOURCES, adorn, running, write_config
from machines import needs
from wire import exchange, request

from relay.config.schema import Server as ServerConfig
from relay.ingest.connection import KEEPALIVE

PAGE = (Path(__file__).parents[2] / "docs" / "install.md").read_text()
LISTEN = ServerConfig().listen
PROBE = {
    "x_event_type": "settings.checking_connection",
    "authorization": "Bearer dev-token",
    "content_type": "application/json",
}
LAZYCHAT = "/api/woocommerce-plugin/events"
MODDY = "/internal/event/notify"


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def written(name):
    return re.search(rf"```{name}\n(.*?)```", PAGE, re.DOTALL)[1]


def nginx(folder, port, relay):
    """Return the command that serves the page's file without TLS, in a separate folder."""
    text, times = re.subn(r"listen 443 ssl;", f"listen 127.0.0.1:{port};", written("nginx"))
    text, more = re.subn(rf"server {re.escape(LISTEN)};", f"server 127.0.0.1:{relay};", text)
    assert (times, more) == (1, 1)
    text = re.sub(r" *ssl_.*\n", "", text)
    own = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = text.replace("http {", f"http {{ access_log off; {own}", 1)
    config = folder / "nginx.conf"
    config.write_text(f"user root; daemon off; pid {folder}/pid; error_log {folder}/error.log;\n{text}")
    return ("nginx", "-c", str(config), "-e", str(folder / "error.log"))


def caddy(folder, port, relay):
    site = f"http://:{port} {{\n    bind 127.0.0.1"
    text, times = re.subn(r"^hooks.example.com {", site, written("caddy"))
    text, more = re.subn(rf"reverse_proxy {re.escape(LISTEN)} ", f"reverse_proxy 127.0.0.1:{relay} ", text)
    assert (times, more) == (1, 1)
    config = folder / "Caddyfile"
    config.write_text(f"{{\n admin off\n auto_https off\n storage file_system {folder}\n}}\n{text}")
    return ("caddy", "run", "--config", str(config), "--adapter", "caddyfile")


@pytest.fixture(
    params=[pytest.param(each, marks=needs(each.__name__), id=each.__name__) for each in (nginx, caddy)]
)
def proxy(request, tmp_path):
    """Run one of the proxies in front of the relay's port."""
    name = request.param.__name__

    @asynccontextmanager
    async def serve(relay):
        port = free_port()
        folder = tmp_path / name
        folder.mkdir(mode=0o777)
        tmp_path.chmod(0o755)
        command = request.param(folder, port, relay)
        with (folder / "output").open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            async with asyncio.timeout(20):
                while True:
                    try:
                        _, writer = await asyncio.open_connection("127.0.0.1", port)
                    except ConnectionRefusedError:
                        assert process.returncode is None, (folder / "output").read_text()
                        await asyncio.sleep(0.05)
                    else:
                        writer.close()
                        break
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            await process.wait()

    return serve


async def test_with_a_running_relay_the_proxy_passes_on_its_replies(proxy, tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        port = int(relay.addresses.public.rpartition(":")[2])
        async with proxy(port) as url:
            stored = await exchange(url, request("POST", "/v1/events", adorn("s")))
            assert stored.json["status"] == "ok"
            large = await exchange(
                url, request("POST", "/v1/events", adorn("s", payload={"x": "x" * 3_000_000}))
            )
            assert (large.status, large.json["status"]) == (413, "error")
            wrong = await exchange(url, request("POST", MODDY, b"{}"))
            assert (wrong.status, wrong.json) == (401, {"error": "Missing Authorization header"})
            probe = await exchange(
                url, request("POST", LAZYCHAT, b"{}", **PROBE | {"authorization": "Bearer no"})
            )
            assert probe.status == 401  # a wrong token still logs the shop out
            body = request("POST", "/v1/events", adorn("s", payload={"x": "x" * 9_000_000}))
            async with asyncio.timeout(30):
                # On a loaded machine, Caddy may still write after the second for which the relay reads on.
                while (enormous := await exchange(url, body)).status == 503:
                    assert "retry-after" in enormous.headers
            assert enormous.status == 413
            assert enormous.json  # nginx's rule, or the relay itself: Caddy does not hold large bodies back


@pytest.mark.parametrize("accepts", [False, True], ids=["gone", "silent behind its socket unit"])
async def test_while_the_relay_is_down_the_proxy_replies_in_json_and_200_to_the_probe(proxy, accepts):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        if accepts:
            sock.listen()
        async with proxy(sock.getsockname()[1]) as url, asyncio.timeout(30):
            probe = exchange(url, request("POST", LAZYCHAT, b"{}", **PROBE))
            event = exchange(url, request("POST", "/v1/events", adorn("s")))
            async with asyncio.timeout(10):  # then LazyChat's plugin has given up
                answers = await asyncio.gather(probe, event)
    assert (answers[0].status, answers[0].json) == (200, {"success": True})
    assert (answers[1].status, answers[1].json["error"]["code"]) == (503, "unavailable")
    assert answers[1].headers["retry-after"] == "5"


def test_the_proxies_point_to_the_default_port_and_permit_large_bodies():
    texts = {name: written(name) for name in ("nginx", "caddy")}
    assert all(LISTEN in text for text in texts.values())
    limits = re.findall(r"client_max_body_size (\d+)m;|max_size (\d+)MiB", "".join(texts.values()))
    assert [int(one or other) * 2**20 > ServerConfig().max_body for one, other in limits] == [True, True]
    kept = re.findall(r"keepalive(?:_timeout)? (\d+)s", "".join(texts.values()))
    assert len(kept) == 2
    assert all(int(each) < KEEPALIVE for each in kept)  # a request must not meet the closing


@needs("haproxy")
async def test_the_balancer_of_a_cluster_uses_only_nodes_that_are_ready(tmp_path):
    """The configuration of docs/cluster.md, with one node that runs and two that do not."""
    cluster = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    text = re.search(r"```haproxy\n(.*?)```", cluster, re.DOTALL)[1]
    port = free_port()
    async with running(write_config(tmp_path, SOURCES)) as relay:
        admin, public = (urlsplit(url).port for url in (relay.addresses.admin, relay.addresses.public))
        text = text.replace("bind :80", f"bind 127.0.0.1:{port}").replace("inter 2s", "inter 100ms")
        for number, (to, check) in enumerate(((public, admin), (free_port(), admin), (public, free_port()))):
            text = text.replace(
                f"10.0.0.1{number + 1}:8080 check port 8081", f"127.0.0.1:{to} check port {check}"
            )
        assert "10.0.0" not in text
        config = tmp_path / "haproxy.cfg"
        config.write_text(text)
        process = await asyncio.create_subprocess_exec("haproxy", "-q", "-f", str(config))
        try:
            url = f"http://127.0.0.1:{port}"
            statuses = []
            async with asyncio.timeout(20):
                while statuses[-6:] != [200] * 6:
                    with suppress(OSError):
                        statuses.append((await exchange(url, request("POST", "/v1/events", adorn()))).status)
                    await asyncio.sleep(0.05)
            relay.app.health.phase = "draining"  # like a stop, or a database that does not answer
            event = None
            async with asyncio.timeout(20):
                while event is None or event.status == 200:
                    await asyncio.sleep(0.05)
                    event = await exchange(url, request("POST", "/v1/events", adorn()))
            assert (event.status, event.json["error"]["code"]) == (503, "unavailable")
            assert event.headers["retry-after"] == "5"
            probe = await exchange(url, request("POST", LAZYCHAT, b"{}", **PROBE))
            assert (probe.status, probe.json) == (200, {"success": True})
        finally:
            process.terminate()
            await process.wait()
    assert set(statuses) <= {200, 503}
