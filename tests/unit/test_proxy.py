"""Destinations behind an HTTP proxy: requests, misbehaving proxies, checked addresses."""

import base64

import pytest
import receivers
from client import AMPLE, GRACE, SHORT, Stopwatch, send

from relay.config.client_cert import ClientCert
from relay.config.problems import ConfigError
from relay.config.schema import DestinationConfig
from relay.config.secrets import Secret, Url
from relay.delivery.http.http_client import HttpClient
from relay.delivery.http.ssrf import refused_target
from relay.plugin_loading.loader import load

pytestmark = pytest.mark.usefixtures("silence")


def at(proxy, user=""):
    """Return the value of `proxy` for a proxy."""
    return Secret(f"http://{user}127.0.0.1:{proxy.port}")


class Nowhere:
    """A resolver that fails for every name."""

    async def resolve(self, host, port=0, family=0):
        raise OSError("no such name")

    async def close(self):
        pass


async def through(proxy, url, *, allow_private=False, own=(), resolver=None):
    """Send through a new client."""
    destination = DestinationConfig(name="behind", url=Url(url), allow_private=allow_private, proxy=proxy)
    client = HttpClient(destination, own=own, resolver=resolver)
    try:
        return await client.send(url, {}, b"{}")
    finally:
        await client.close()


async def test_an_https_destination_is_reached_through_one_tunnel(client_for, certificates):
    tls = certificates.server("good")
    async with receivers.answers(tls=tls, body=b"hello") as receiver, receivers.forwards() as proxy:
        client = client_for(ca_file=certificates.ca, proxy=at(proxy, "relay:hush@"))
        for number in range(3):
            answer = await send(client, f"{receiver.url}?n={number}%2F", bytes(100_000))
            assert (answer.result, answer.body) == ("ok", b"hello")
        assert [request.line for request in receiver.requests] == [
            f"POST /hook?n={number}%2F HTTP/1.1" for number in range(3)
        ]
        [tunnel] = proxy.requests
        assert tunnel.line == f"CONNECT 127.0.0.1:{receiver.port} HTTP/1.1"
        assert tunnel.headers["host"] == f"127.0.0.1:{receiver.port}"
        assert tunnel.headers["proxy-authorization"].startswith("Basic ")
        assert not any("proxy-authorization" in request.headers for request in receiver.requests)
        assert (proxy.connections, receiver.connections) == (1, 1)
        assert client.certificate.ends == certificates.ends("good")  # the receiver's, in the tunnel


async def test_an_http_destination_is_reached_by_a_full_request_to_the_proxy(client_for):
    async with receivers.answers(body=b"hello") as receiver, receivers.forwards() as proxy:
        client = client_for(proxy=at(proxy, "relay:hush@"))
        for _ in range(2):
            answer = await send(client, f"{receiver.url}?a=b%2Fc", b"[1]")
            assert (answer.result, answer.body) == ("ok", b"hello")
        assert [request.line for request in proxy.requests] == [f"POST {receiver.url}?a=b%2Fc HTTP/1.1"] * 2
        assert {request.headers["proxy-authorization"] for request in proxy.requests} == {
            "Basic " + base64.b64encode(b"relay:hush").decode()
        }
        assert [(request.line, request.body) for request in receiver.requests] == [
            ("POST /hook?a=b%2Fc HTTP/1.1", b"[1]")
        ] * 2
        assert proxy.connections == 1


async def test_without_credentials_the_proxy_gets_none(client_for):
    async with receivers.answers() as receiver, receivers.forwards() as proxy:
        assert (await send(client_for(proxy=at(proxy)), receiver.url)).result == "ok"
        assert "proxy-authorization" not in proxy.requests[0].headers


async def test_credentials_are_percent_decoded_and_written_in_utf_8(client_for):
    async with receivers.answers() as proxy:
        await send(client_for(proxy=at(proxy, "%C3%BCser:p%40:ss@")), "http://receiver.example/")
        credentials = proxy.requests[0].headers["proxy-authorization"].removeprefix("Basic ")
        assert base64.b64decode(credentials).decode() == "üser:p@:ss"


async def test_a_client_certificate_is_sent_inside_the_tunnel(client_for, certificates):
    shown = ClientCert(cert=certificates.path("client"), key=certificates.key)
    tls = certificates.server("good", demanding=True)
    async with receivers.shows_certificates(tls=tls) as receiver, receivers.forwards() as proxy:
        client = client_for(ca_file=certificates.ca, client_cert=shown, proxy=at(proxy))
        assert (await send(client, receiver.url)).body == b"relay.example"


async def test_a_bad_certificate_behind_the_tunnel_is_a_tls_failure_that_names_the_receiver(
    client_for, certificates
):
    async with (
        receivers.answers(tls=certificates.server("expired")) as receiver,
        receivers.forwards() as proxy,
    ):
        answer = await send(client_for(ca_file=certificates.ca, proxy=at(proxy)), receiver.url)
        assert (answer.result, receiver.requests) == ("tls", [])
        assert "certificate of 127.0.0.1 is not trusted: certificate has expired" in answer.error


REFUSALS = [
    "407 Proxy Authentication Required",
    "502 Bad Gateway",
    "403 Forbidden",
    "410 Gone",
    "204 No Content",
]


@pytest.mark.parametrize("status", REFUSALS)
async def test_a_refused_tunnel_is_a_connect_failure_and_no_response_of_the_destination(client_for, status):
    async with receivers.answers(status=status, retry_after=60) as proxy:
        answer = await send(client_for(proxy=at(proxy)), "https://receiver.example/")
        assert (answer.result, answer.status, answer.headers) == ("connect", None, {})
        assert answer.error == (
            f"through the proxy 127.0.0.1:{proxy.port}: the proxy refused the tunnel: HTTP {status}"
        )


@pytest.mark.parametrize(
    ("status", "result"), [("407 Proxy Authentication Required", "4xx"), ("502 Bad Gateway", "5xx")]
)
async def test_for_an_http_destination_the_proxys_response_counts_as_the_destinations(
    client_for, status, result
):
    async with receivers.answers(status=status) as proxy:
        answer = await send(client_for(proxy=at(proxy)), "http://receiver.example/")
        assert (answer.result, answer.status, answer.error) == (result, int(status[:3]), f"HTTP {status}")


STALLS = [receivers.hang, receivers.never_reads, receivers.hang_in_head, receivers.drip_head]


@pytest.mark.parametrize("make", STALLS)
async def test_a_proxy_that_stalls_before_the_tunnel_ends_at_the_connect_timeout(client_for, make):
    async with make() as proxy, Stopwatch() as lasted:
        client = client_for(AMPLE, connect_timeout=SHORT, proxy=at(proxy))
        answer = await send(client, "https://receiver.example/")
        assert lasted.seconds < SHORT + GRACE
        assert answer.result == "timeout"
        assert answer.error == f"through the proxy 127.0.0.1:{proxy.port}: no connection within 200ms"


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("make", STALLS)
async def test_a_stalling_proxy_ends_at_the_total_timeout(client_for, make, scheme):
    async with make() as proxy, Stopwatch() as lasted:
        client = client_for(SHORT, proxy=at(proxy))
        answer = await send(client, f"{scheme}://receiver.example/")
        assert lasted.seconds < SHORT + GRACE
        assert answer.result == "timeout"
        assert "no response within 200ms" in answer.error


GIBBERISH = [
    (receivers.sends_first, "protocol", "malformed response"),
    (receivers.closes_unanswered, "protocol", "closed the connection without a response"),
    (receivers.huge_header, "protocol", ""),
    (receivers.huge_status_line, "protocol", ""),
    (receivers.endless_headers, "protocol", ""),
    (receivers.informational_flood, "protocol", "the response is too large"),
    (receivers.resets, "connect", "the connection broke: Connection reset by peer"),
    (receivers.huge_body, "tls", ""),  # 200, then bytes that are not TLS
]


@pytest.mark.parametrize(("make", "result", "reason"), GIBBERISH)
async def test_a_malformed_response_of_a_proxy_is_a_labelled_failure(client_for, make, result, reason):
    async with make() as proxy:
        answer = await send(client_for(proxy=at(proxy)), "https://receiver.example/")
        assert (answer.result, answer.status) == (result, None)
        assert answer.error.startswith(f"through the proxy 127.0.0.1:{proxy.port}: ")
        assert reason in answer.error


async def test_a_closed_proxy_port_is_a_connect_failure(client_for):
    port = receivers.unused_port()
    for url in ("https://receiver.example/", "http://receiver.example/"):
        answer = await send(client_for(proxy=Secret(f"http://127.0.0.1:{port}")), url)
        assert answer.result == "connect"
        assert "Connection refused" in answer.error


async def test_a_proxy_name_without_an_address_is_a_dns_failure():
    answer = await through(
        Secret("http://proxy.example:3128"), "https://receiver.example/", resolver=Nowhere()
    )
    assert answer.result == "dns"
    assert answer.error.startswith("through the proxy proxy.example:3128: cannot resolve proxy.example")


async def test_a_kept_alive_connection_that_the_proxy_has_closed_costs_no_attempt(client_for):
    async with receivers.closes_kept_alive() as proxy:
        client = client_for(proxy=at(proxy))
        for _ in range(3):
            assert (await send(client, "http://receiver.example/")).result == "ok"


async def test_no_error_contains_the_credentials(client_for):
    async with receivers.closes_unanswered() as proxy:
        client = client_for(proxy=at(proxy, "relay:hush@"))
        for url in ("https://receiver.example/", "http://receiver.example/", "http://[/"):
            answer = await send(client, url)
            assert answer.result in ("protocol", "blocked")
            assert "hush" not in answer.error


# --- checked addresses --------------------------------------------------------------------------------


async def test_the_proxys_address_is_checked():
    async with receivers.forwards() as proxy:
        answer = await through(at(proxy), "https://receiver.example/")
        assert answer.result == "blocked"
        assert answer.error.endswith("not connected: 127.0.0.1 is a loopback address")
        assert proxy.connections == 0


async def test_the_relay_is_refused_as_a_proxy():
    async with receivers.forwards() as proxy:
        own = [("127.0.0.1", proxy.port)]
        answer = await through(at(proxy), "https://receiver.example/", allow_private=True, own=own)
        assert (answer.result, proxy.connections) == ("blocked", 0)
        assert answer.error.endswith("is the relay itself")


ADDRESSES = [
    ("127.0.0.1", "127.0.0.1 is a loopback address"),
    ("127.1", "127.0.0.1 is a loopback address"),
    ("0177.0.0.1", "127.0.0.1 is a loopback address"),
    ("0x7f.1", "127.0.0.1 is a loopback address"),
    ("2130706433", "127.0.0.1 is a loopback address"),
    ("127.0.0.1.", "127.0.0.1 is a loopback address"),
    ("localhost", "127.0.0.1 is a loopback address"),
    ("LOCALHOST.", "127.0.0.1 is a loopback address"),
    ("admin.localhost", "127.0.0.1 is a loopback address"),
    ("10.1.2.3", "10.1.2.3 is a private address"),
    ("169.254.169.254", "169.254.169.254 is a link-local address"),
    ("0", "0.0.0.0 is a unspecified address"),
    ("[::1]", "::1 is a loopback address"),
    ("[::ffff:10.1.2.3]", "::ffff:a01:203 is a IPv4-mapped address"),
    ("[64:ff9b::a01:203]", "64:ff9b::a01:203 is a NAT64 address"),
    ("[fe80::1%25eth0]", "fe80::1 is a link-local address"),
    ("\uff11\uff12\uff17.0.0.1", "127.0.0.1 is a loopback address"),
]


@pytest.mark.parametrize(("host", "reason"), ADDRESSES)
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_target_with_a_special_address_is_never_requested(scheme, host, reason):
    answer = await through(Secret("http://proxy.example:3128"), f"{scheme}://{host}:9/", resolver=Nowhere())
    assert answer.result == "blocked"
    assert answer.error == f"through the proxy proxy.example:3128: not connected: {reason}"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1"])
async def test_the_relays_own_listener_is_never_requested(host):
    async with receivers.answers() as relay, receivers.forwards() as proxy:
        url, own = f"http://{host}:{relay.port}/", [("127.0.0.1", relay.port)]
        answer = await through(at(proxy), url, allow_private=True, own=own)
        assert (answer.result, proxy.connections) == ("blocked", 0)


@pytest.mark.parametrize(
    "host", ["8.8.8.8", "134744072", "2606:4700::1111", "receiver.example", "10.example", "", "1.2.3.4.5"]
)
def test_an_ordinary_address_and_any_name_may_be_requested(host):
    assert refused_target(host, 443, allow_private=False) is None


async def test_with_allow_private_a_private_target_may_be_requested(client_for):
    async with receivers.answers(status="502 Bad Gateway") as proxy:
        answer = await send(client_for(proxy=at(proxy)), "http://10.1.2.3/")
        assert (answer.status, proxy.connections) == (502, 1)


def test_a_proxy_may_be_a_secret_and_is_never_printed(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[destinations.crm]\nurl = "https://crm.example/"\nproxy = { env = "PROXY" }\n')
    crm = load(path, {"PROXY": "http://relay:hush@proxy.example:3128"}).config.destinations["crm"]
    assert crm.proxy.reveal().startswith("http://relay")
    assert "hush" not in repr(crm)
    with pytest.raises(ConfigError, match="HTTP proxy") as caught:
        load(path, {"PROXY": "socks5://relay:hush@proxy.example:1080"})
    assert "hush" not in str(caught.value)
