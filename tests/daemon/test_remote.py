"""The address of the sender of a refused request, behind proxies."""

import pytest
from daemons import SOURCES, running, write_config
from multidict import CIMultiDict, CIMultiDictProxy
from wire import request

from relay.ingest.sender_address import SenderAddress


def headers(*lines, name="X-Forwarded-For"):
    return CIMultiDictProxy(CIMultiDict((name, line) for line in lines))


TRUSTED = ("10.0.0.0/8", "127.0.0.1", "2001:db8:f::/48")


@pytest.mark.parametrize(
    ("trusted", "peer", "lines", "sender"),
    [
        ((), "203.0.113.9", ["10.0.0.1"], "203.0.113.9"),
        (TRUSTED, "203.0.113.9", ["1.2.3.4"], "203.0.113.9"),
        (TRUSTED, "10.1.1.1", ["203.0.113.9"], "203.0.113.9"),
        (TRUSTED, "10.1.1.1", ["6.6.6.6, 203.0.113.9, 10.2.2.2"], "203.0.113.9"),
        (TRUSTED, "10.1.1.1", ["10.3.3.3"], "10.3.3.3"),
        (TRUSTED, "10.1.1.1", [""], "10.1.1.1"),
        (TRUSTED, "10.1.1.1", [], "10.1.1.1"),
        (TRUSTED, "10.1.1.1", ["<script>\n, garbage"], "10.1.1.1"),
        (TRUSTED, "10.1.1.1", ["6.6.6.6, unknown, 10.2.2.2"], "10.2.2.2"),
        (("::1",), "::1", ["2001:db8::7"], "2001:db8::7"),
        (TRUSTED, None, ["1.2.3.4"], "unknown"),
        (TRUSTED, "/run/relay.sock", ["1.2.3.4"], "/run/relay.sock"),
        # Several lines are one chain: the last one is the nearest proxy's.
        (TRUSTED, "10.1.1.1", ["6.6.6.6", "203.0.113.9"], "203.0.113.9"),
        (TRUSTED, "10.1.1.1", ["6.6.6.6", "203.0.113.9", "10.2.2.2,,"], "203.0.113.9"),
        # IPv4-mapped addresses, as a listener on [::] sees them.
        (TRUSTED, "::ffff:10.1.1.1", ["203.0.113.9"], "203.0.113.9"),
        (TRUSTED, "::ffff:203.0.113.9", ["6.6.6.6"], "203.0.113.9"),
        (TRUSTED, "10.1.1.1", ["6.6.6.6, ::ffff:203.0.113.9, ::ffff:10.2.2.2"], "203.0.113.9"),
        (("::ffff:10.0.0.0/104",), "10.1.1.1", ["203.0.113.9"], "203.0.113.9"),
        (("::ffff:10.1.1.1",), "::ffff:10.1.1.1", ["203.0.113.9"], "203.0.113.9"),
        (("::/0",), "2001:db8::1", ["203.0.113.9"], "203.0.113.9"),
        (("0.0.0.0/0",), "10.1.1.1", ["2001:db8::7"], "2001:db8::7"),
        # With ports, and in brackets.
        (TRUSTED, "10.1.1.1", ["203.0.113.9:51234"], "203.0.113.9"),
        (TRUSTED, "10.1.1.1", ["203.0.113.9, 10.2.2.2:80"], "203.0.113.9"),
        (TRUSTED, "10.1.1.1", ["[2001:db8::7]:51234"], "2001:db8::7"),
        (TRUSTED, "10.1.1.1", ["2001:db8::7, [2001:db8:f::1]"], "2001:db8::7"),
        (TRUSTED, "10.1.1.1", ["6.6.6.6, 203.0.113.9:port"], "10.1.1.1"),
        (TRUSTED, "10.1.1.1", ["fe80::7%eth0"], "fe80::7"),
        (("fe80::/10",), "fe80::1%eth0", ["203.0.113.9"], "203.0.113.9"),
        (TRUSTED, "10.1.1.1", [", ".join(["6.6.6.6"] * 50 + ["10.2.2.2"] * 40)], "10.2.2.2"),
    ],
)
def test_the_sender_is_the_nearest_hop_that_is_not_a_trusted_proxy(trusted, peer, lines, sender):
    assert SenderAddress(trusted).of(peer, headers(*lines)) == sender


@pytest.mark.parametrize(
    ("lines", "sender"),
    [
        (["for=203.0.113.9"], "203.0.113.9"),
        (["for=6.6.6.6, for=203.0.113.9;proto=https;by=10.1.1.1"], "203.0.113.9"),
        (["for=6.6.6.6", "For=203.0.113.9"], "203.0.113.9"),
        (["proto=http; FOR=203.0.113.9 ;host=shop.example"], "203.0.113.9"),
        (['for="[2001:db8::7]:47011"'], "2001:db8::7"),
        (['for="203.0.113.9:80", for=10.2.2.2'], "203.0.113.9"),
        (['for="\\203.0.113.9"'], "203.0.113.9"),
        (["for=203.0.113.9, for=unknown, for=10.2.2.2"], "10.2.2.2"),
        (["for=203.0.113.9, for=_hidden"], "10.1.1.1"),
        (["for=203.0.113.9, proto=https"], "10.1.1.1"),
        (["for=6.6.6.6;for=203.0.113.9"], "10.1.1.1"),
        (["for 203.0.113.9"], "10.1.1.1"),
        ([], "10.1.1.1"),
        # The sender's entries cannot hide those that proxies appended.
        (['for="6.6.6.6', "for=203.0.113.9"], "203.0.113.9"),
        (['for="6.6.6.6', 'for="[2001:db8::7]"'], "2001:db8::7"),
        (['host="a;for=6.6.6.6";for=203.0.113.9'], "203.0.113.9"),
        (['host="a\\";for=6.6.6.6";for=203.0.113.9'], "203.0.113.9"),
        (['"' * 8000, "for=203.0.113.9"], "203.0.113.9"),
    ],
)
def test_forwarded_is_read_according_to_rfc_7239(lines, sender):
    assert SenderAddress(TRUSTED, "Forwarded").of("10.1.1.1", headers(*lines, name="Forwarded")) == sender


@pytest.mark.parametrize(
    ("read", "other"), [("X-Forwarded-For", "Forwarded"), ("Forwarded", "X-Forwarded-For")]
)
def test_only_the_configured_proxy_header_is_read(read, other):
    forged = headers("6.6.6.6", "for=6.6.6.6", name=other)
    assert SenderAddress(TRUSTED, read).of("10.1.1.1", forged) == "10.1.1.1"


async def test_the_log_of_a_refusal_names_the_sender(tmp_path, caplog):
    config = write_config(tmp_path, SOURCES)
    config.write_text(config.read_text().replace("[server]\n", '[server]\ntrusted_proxies = ["127.0.0.1"]\n'))
    async with running(config) as relay:
        with caplog.at_level("INFO", "relay.ingest"):
            await relay.exchange(
                request("POST", "/internal/event/notify", body=b"{}", **{"X-Forwarded-For": "203.0.113.9"})
            )
    assert "moddy: refused with 401, auth: Missing or invalid token (203.0.113.9)" in caplog.text
