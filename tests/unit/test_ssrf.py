"""Protection against SSRF: the table of addresses, and real look-ups and connects."""

from ipaddress import IPv4Network, ip_address

import pytest
import receivers
from aiohttp.abc import AbstractResolver, ResolveResult
from client import Stopwatch

from relay.config.schema import DestinationConfig
from relay.config.secrets import Url
from relay.delivery.http.http_client import HttpClient
from relay.delivery.http.ssrf import NEVER, SPECIAL, refused

PORT = 9000
ORDINARY = ["8.8.8.8", "1.1.1.1", "93.184.215.14", "172.32.0.1", "100.128.0.1", "192.0.1.1", "198.20.0.1"]
ORDINARY_V6 = ["2606:4700::1111", "2a00:1450:4001:80b::200e", "2001:4860:4860::8888", "2003::1"]
V4_BLOCKS = [(block, kind) for block, kind in SPECIAL if isinstance(block, IPv4Network)]


class Names(AbstractResolver):
    """A resolver that returns the next of its results for each look-up, then always the last one."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = 0

    async def resolve(self, host, port=0, family=0) -> list[ResolveResult]:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        return [
            ResolveResult(hostname=host, host=one, port=port, family=family, proto=0, flags=0)
            for one in answer
        ]

    async def close(self):
        pass


def wrapped(v4: str) -> list[str]:
    """Return every IPv6 address that contains this IPv4 address."""
    number = int(ip_address(v4))
    return [
        str(ip_address(address))
        for address in (
            number,  # IPv4-compatible
            0xFFFF << 32 | number,  # IPv4-mapped
            0xFFFF << 48 | number,  # IPv4-translated
            0x64FF9B << 96 | number,  # NAT64
            0x64FF9B0001 << 80 | number,  # local NAT64
            0x2002 << 112 | number << 80,  # 6to4
        )
    ]


async def dial(resolver=None, *, url="http://receiver.example:9000/", allow_private=False, own=()):
    """Send through a new client and return the result."""
    destination = DestinationConfig(name="guarded", url=Url(url), allow_private=allow_private, timeout=5.0)
    client = HttpClient(destination, own=own, resolver=resolver)
    try:
        return await client.send(url, {}, b"{}")
    finally:
        await client.close()


@pytest.mark.parametrize("address", ORDINARY + ORDINARY_V6)
def test_a_public_address_is_permitted(address):
    assert refused(address, PORT, allow_private=False) is None


@pytest.mark.parametrize(("block", "kind"), SPECIAL, ids=str)
def test_both_ends_of_every_special_block_are_refused_by_default(block, kind):
    reasons = [refused(str(address), PORT, allow_private=False) for address in (block[0], block[-1])]
    assert all(reasons)
    assert any(
        reason.endswith(f" is a {kind} address") for reason in reasons
    )  # a narrower block may contain it


@pytest.mark.parametrize(("block", "kind"), SPECIAL, ids=str)
def test_allow_private_permits_special_blocks_that_can_be_receivers(block, kind):
    address = str(block[block.num_addresses * 2 // 3])  # an end may belong to a narrower block
    assert (refused(address, PORT, allow_private=True) is None) == (kind not in NEVER)


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "::", "224.0.0.1", "239.255.255.250", "255.255.255.255", "ff02::1", "ff0e::1"],
)
def test_multicast_unspecified_and_broadcast_are_always_refused(address):
    assert refused(address, PORT, allow_private=True) is not None


@pytest.mark.parametrize("address", ["169.254.169.254", "fd00:ec2::254", "100.100.100.200", "168.63.129.16"])
def test_a_cloud_metadata_service_is_refused_by_default(address):
    assert refused(address, PORT, allow_private=False) is not None


@pytest.mark.parametrize("address", ["4000::1", "e000::1", "1::1", "200::1"])
def test_unallocated_ipv6_is_refused(address):
    assert "reserved" in refused(address, PORT, allow_private=False)


@pytest.mark.parametrize("address", ["fe80::1%2", "fe80::1%eth0"])
def test_a_zone_does_not_hide_a_link_local_address(address):
    assert "link-local" in refused(address, PORT, allow_private=False)


@pytest.mark.parametrize("address", ["", "receiver.example", "127.1", "0x7f000001", "2130706433", "[::1]"])
def test_text_that_is_not_an_ip_address_is_refused(address):
    assert "not an IP address" in refused(address, PORT, allow_private=True)


@pytest.mark.parametrize(("block", "kind"), V4_BLOCKS, ids=str)
def test_a_special_ipv4_address_is_refused_inside_every_ipv6_form(block, kind):
    for address in wrapped(str(block[-1])):
        assert refused(address, PORT, allow_private=False) is not None


@pytest.mark.parametrize("address", wrapped("224.0.0.1"))
def test_the_inner_address_is_checked_even_if_the_outer_one_is_permitted(address):
    assert "224.0.0.1" in refused(address, PORT, allow_private=True)


@pytest.mark.parametrize("address", wrapped("10.1.2.3"))
def test_allow_private_permits_a_private_address_inside_ipv6(address):
    assert refused(address, PORT, allow_private=True) is None


@pytest.mark.parametrize("bound_to", ["127.0.0.1", "0.0.0.0", "::", "", "localhost"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_the_relays_own_listener_is_refused_however_it_is_bound(bound_to, address):
    reason = refused(address, PORT, allow_private=True, own=[(bound_to, PORT)])
    assert "the relay itself" in reason
    assert refused(address, PORT + 1, allow_private=True, own=[(bound_to, PORT)]) is None


def test_a_wildcard_listener_does_not_block_the_same_port_of_other_machines():
    assert refused("192.0.2.7", PORT, allow_private=True, own=[("0.0.0.0", PORT), ("::", PORT)]) is None
    assert refused("127.0.0.2", PORT, allow_private=True, own=[("127.0.0.1", PORT)]) is None


@pytest.mark.parametrize(("block", "kind"), SPECIAL, ids=str)
async def test_a_name_and_a_literal_in_a_special_block_both_end_as_blocked(block, kind):
    address = str(block[-1])
    literal = f"http://[{address}]:9000/" if ":" in address else f"http://{address}:9000/"
    by_name, by_literal = await dial(Names([address])), await dial(url=literal)
    assert by_name.result == by_literal.result == "blocked"
    assert by_name.error == by_literal.error
    assert by_name.error.startswith(f"not connected: {address}")


@pytest.mark.parametrize("address", [*wrapped("127.0.0.1"), "127.0.0.1", "::1"])
async def test_no_spelling_of_loopback_reaches_a_receiver(address):
    async with receivers.answers() as receiver:
        answer = await dial(Names([address]), url=f"http://receiver.example:{receiver.port}/")
        assert answer.result == "blocked"
        assert receiver.connections == 0


@pytest.mark.parametrize(
    "host", ["127.1", "0177.0.0.1", "0x7f.1", "2130706433", "127.0.0.1.", "localhost", "LOCALHOST.", "0"]
)
async def test_no_odd_host_in_the_url_reaches_a_receiver(host):
    async with receivers.answers() as receiver:
        answer = await dial(url=f"http://{host}:{receiver.port}/")
        assert answer.result in ("blocked", "dns")
        assert receiver.connections == 0


async def test_several_refused_addresses_are_one_refusal():
    answer = await dial(Names(["127.0.0.1", "::1", "10.0.0.1", "fc00::1"]))
    assert answer.result == "blocked"


async def test_a_name_with_a_refused_and_a_good_address_reaches_the_good_one_alone():
    async with receivers.answers() as good, receivers.answers(host="127.0.0.2") as own:
        names = Names(["127.0.0.2", "127.0.0.1"])
        answer = await dial(
            names,
            url=f"http://receiver.example:{good.port}/",
            allow_private=True,
            own=[("127.0.0.2", good.port), ("127.0.0.2", own.port)],
        )
        assert answer.result == "ok"
        assert (good.connections, own.connections) == (1, 0)


async def test_a_name_that_moves_between_look_ups_is_checked_again():
    async with receivers.answers(connection="close") as receiver:
        names = Names(["127.0.0.1"], ["127.0.0.3"])
        url = f"http://receiver.example:{receiver.port}/"
        destination = DestinationConfig(name="rebound", url=Url(url), allow_private=True, timeout=5.0)
        client = HttpClient(destination, own=[("127.0.0.3", receiver.port)], resolver=names)
        try:
            assert (await client.send(url, {}, b"{}")).result == "ok"
            client._pooled.clear_dns_cache()
            rebound = await client.send(url, {}, b"{}")
        finally:
            await client.close()
        assert (rebound.result, names.asked, receiver.connections) == ("blocked", 2, 1)
        assert "127.0.0.3" in rebound.error


async def test_a_redirect_into_the_private_network_is_not_followed():
    async with (
        receivers.answers() as inner,
        receivers.answers(status="307 Temporary Redirect", location=inner.url) as outer,
    ):
        answer = await dial(url=outer.url, allow_private=True)
        assert (answer.result, answer.status, inner.connections) == ("3xx", 307, 0)
        assert inner.url in answer.error


async def test_a_refusal_is_quick():
    async with Stopwatch() as lasted:
        assert (await dial(url="http://10.255.255.1:9/")).result == "blocked"
        assert lasted.seconds < 1
