"""Compozy: the answer that all of its clients can read."""

from samples import sources

from relay.errors import Invalid, RateLimited
from relay.model import Receipt
from relay.source import Incoming
from relay.sources.compozy import PATH


def request(payload: str, name: str = "user.created") -> Incoming:
    """Build a request whose payload is that JSON."""
    return Incoming.of("POST", PATH, {}, f'{{"name": "{name}", "payload": {payload}}}'.encode())


def test_documented_clients_and_the_sdk_find_the_same_id_in_the_reply():
    reply = sources()["compozy"].send(request("{}")).reply(Receipt(event_id="evt_01234567-89ab"))
    assert reply.status == 202
    assert reply.body["event_id"] == reply.body["data"]["event_id"] == "01234567-89ab"


def test_a_rate_limit_has_a_message_like_every_error():
    reply = sources()["compozy"].refuse(RateLimited(retry_after=3), Incoming.of("POST", PATH))
    assert (reply.status, reply.body["error"]["message"]) == (429, "Too many requests")


def test_a_payload_against_its_schema_is_refused_in_the_documented_envelope():
    invalid = Invalid(field="payload.email", issue="5 is not of type 'string'")
    error = sources()["compozy"].refuse(invalid, Incoming.of("POST", PATH)).body["error"]
    assert error["details"] == {"field": "payload.email", "issue": "5 is not of type 'string'"}
