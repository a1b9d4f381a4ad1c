"""Adorn Studio: open unless tokens are set, and its numbers stay as written."""

import pytest
from samples import sources

from relay.config.secrets import Secrets
from relay.errors import Unauthenticated
from relay.source import Incoming
from relay.sources.adorn import PATH, Adorn

BODY = b'{"event_type":"a","session_id":"s","store_id":18446744073709551616,"payload":{"price": 45000.00}}'


def test_without_tokens_a_source_is_open_and_warns():
    source = Adorn()
    source.verify(Incoming.of("POST", PATH))
    assert source.warnings() == ("open to everyone who can reach it: it has no tokens",)


def test_with_tokens_a_source_requires_one():
    source = Adorn(tokens=Secrets.of("jewels"))
    source.verify(Incoming.of("POST", PATH, {"Authorization": "Bearer jewels"}))
    with pytest.raises(Unauthenticated):
        source.verify(Incoming.of("POST", PATH))
    assert source.warnings() == ()


def test_numbers_are_kept_byte_for_byte():
    event = sources()["adorn"].event(Incoming.of("POST", PATH, {}, BODY)).event
    assert bytes(event.data) == b'{"price": 45000.00}'
    assert bytes(event.context["store_id"]) == b"18446744073709551616"
