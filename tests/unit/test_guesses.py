"""Limits for wrong tokens of the admin API."""

import asyncio

import pytest

from relay.api import guesses
from relay.api.guesses import MOST_ADDRESSES, MOST_DELAYED, OF_ADDRESS, OF_ALL, Guesses


def send(found, remote, count):
    for _ in range(count):
        found.note(remote)


@pytest.mark.parametrize(
    ("same", "other"),
    [
        ("203.0.113.7", "203.0.113.8"),
        ("2001:db8:0:1::1", "2001:db8:0:2::1"),
        ("fe80::1%eth0", "2001:db8::1"),
        (None, "203.0.113.8"),
    ],
)
def test_an_address_may_send_ten_wrong_tokens_a_minute(clock, same, other):
    found = Guesses(clock)
    send(found, same, OF_ADDRESS.count - 1)
    assert found.wait(same) == 0
    found.note(same)
    assert 0 < found.wait(same) <= 6
    assert found.wait(other) == 0
    clock.advance(7)
    assert found.wait(same) == 0


def test_clients_of_one_network_count_as_one(clock):
    found = Guesses(clock)
    for number in range(OF_ADDRESS.count):
        found.note(f"2001:db8:0:1::{number:x}")
    assert found.wait("2001:db8:0:1::ffff") > 0


def test_all_addresses_together_have_a_limit(clock):
    found = Guesses(clock)
    for number in range(OF_ALL.count):
        assert found.wait("192.0.2.1") == 0
        found.note(f"203.0.113.{number}")
    assert found.wait("192.0.2.1") > 0


def test_the_number_of_addresses_is_bounded(clock):
    found = Guesses(clock)
    for number in range(MOST_ADDRESSES + 100):
        found.note(f"10.0.{number // 256}.{number % 256}")
    assert len(found._addresses) == MOST_ADDRESSES
    assert "10.0.0.0" not in found._addresses


def test_one_refusal_a_minute_is_reported(clock):
    found = Guesses(clock)
    assert [found.may_report() for _ in range(3)] == [True, False, False]
    clock.advance(61)
    assert found.may_report()


async def test_answers_beyond_the_limit_are_delayed_and_few(clock, monkeypatch):
    monkeypatch.setattr(guesses, "DELAY", 3600)
    found = Guesses(clock)
    for _ in range(OF_ADDRESS.count):
        await found.delay("203.0.113.7")
    tasks = [asyncio.create_task(found.delay("203.0.113.7")) for _ in range(MOST_DELAYED)]
    assert not found.is_flooded
    await asyncio.sleep(0)
    assert found.is_flooded
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not found.is_flooded
