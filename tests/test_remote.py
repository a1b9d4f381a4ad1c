"""Whom a refusal is laid at the door of."""

import pytest
from daemon import SOURCES, running, write_config
from wire import request

from relay.ingest.remote import Remote


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "sender"),
    [
        ((), "203.0.113.9", "10.0.0.1", "203.0.113.9"),
        (("10.0.0.0/8",), "203.0.113.9", "1.2.3.4", "203.0.113.9"),
        (("10.0.0.0/8",), "10.1.1.1", "203.0.113.9", "203.0.113.9"),
        (("10.0.0.0/8",), "10.1.1.1", "6.6.6.6, 203.0.113.9, 10.2.2.2", "203.0.113.9"),
        (("10.0.0.0/8",), "10.1.1.1", "10.3.3.3", "10.3.3.3"),
        (("10.0.0.0/8",), "10.1.1.1", "", "10.1.1.1"),
        (("10.0.0.0/8",), "10.1.1.1", "<script>\n, garbage", "10.1.1.1"),
        (("::1",), "::1", "2001:db8::7", "2001:db8::7"),
        (("127.0.0.1",), None, "1.2.3.4", "unknown"),
        (("127.0.0.1",), "/run/relay.sock", "1.2.3.4", "/run/relay.sock"),
    ],
)
def test_only_trusted_proxies_are_believed(trusted, peer, forwarded, sender):
    assert Remote(trusted).of(peer, forwarded) == sender


async def test_a_refusal_names_its_sender_in_the_log(tmp_path, caplog):
    config = write_config(tmp_path, SOURCES)
    config.write_text(config.read_text().replace("[server]\n", '[server]\ntrusted_proxies = ["127.0.0.1"]\n'))
    async with running(config) as relay:
        with caplog.at_level("INFO", "relay.ingest"):
            await relay.exchange(
                request("POST", "/internal/event/notify", body=b"{}", **{"X-Forwarded-For": "203.0.113.9"})
            )
    assert "moddy: refused with 401, auth: Missing or invalid token (203.0.113.9)" in caplog.text
