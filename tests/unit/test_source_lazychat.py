"""LazyChat: the answer to its probe must never log a shop out."""

import msgspec
import pytest
from samples import sources

from relay.errors import (
    BodyTimeout,
    DiskFull,
    Draining,
    Malformed,
    NotFound,
    Overloaded,
    Paused,
    PluginFailed,
    RateLimited,
    StorageDown,
    TooLarge,
    Unauthenticated,
)
from relay.source import Incoming
from relay.sources.lazychat import PATH, PROBE

SOURCE = sources()["lazychat"]
TRANSIENT = [BodyTimeout, RateLimited, PluginFailed, Paused, Draining, DiskFull, StorageDown, Overloaded]


def probe(token: str = "dev-token", type_: str = PROBE, **headers: str) -> Incoming:
    """Build the head of a probe; its body has not been read."""
    return Incoming.of("POST", PATH, {"authorization": f"Bearer {token}", "x-event-type": type_} | headers)


@pytest.mark.parametrize("trouble", TRANSIENT)
def test_a_probe_of_a_known_shop_succeeds_despite_temporary_failures(trouble):
    reply = SOURCE.refuse(trouble(), probe())
    assert (reply.status, reply.body) == (200, {"success": True})


@pytest.mark.parametrize("trouble", TRANSIENT)
@pytest.mark.parametrize("incoming", [probe(token="wrong"), probe(type_="plugin.updated"), probe(type_="")])
def test_unknown_shops_and_other_events_get_the_temporary_failure(trouble, incoming):
    assert SOURCE.refuse(trouble(), incoming).status == trouble.status


@pytest.mark.parametrize("refusal", [Malformed, NotFound, TooLarge, Unauthenticated])
def test_a_probe_gets_permanent_failures(refusal):
    assert SOURCE.refuse(refusal(), probe()).status == refusal.status


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("1766399400", 1766399400),
        ("007", 7),
        ("0", 0),
        ("9" * 15, 10**15 - 1),
        ("9" * 5000, "9" * 5000),
        ("-5", "-5"),
        ("1.5", "1.5"),
        ("1_0", "1_0"),
        ("٣", "٣"),
    ],
)
def test_only_ascii_digits_are_a_timestamp(header, value):
    incoming = probe(type_="plugin.updated", **{"x-event-timestamp": header})
    incoming = msgspec.structs.replace(incoming, body=b"{}")
    assert SOURCE.event(incoming).event.context["event_timestamp"] == value


def test_header_values_with_surrogates_are_left_out():
    incoming = probe(type_="t", **{"x-lazychat-shop-id": "\udce9", "x-plugin-version": "1\udce9"})
    incoming = msgspec.structs.replace(incoming, body=b"{}")
    event = SOURCE.event(incoming).event
    assert (event.subject, list(event.context)) == (None, ["site_info"])
