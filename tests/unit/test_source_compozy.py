"""Compozy: the answer that all of its clients can read, and schemas where the operator sets them."""

import sys
from pathlib import Path

import msgspec
import pytest
from samples import sources

from relay.config.secrets import Secrets
from relay.errors import Invalid, RateLimited
from relay.model import Receipt
from relay.source import Incoming
from relay.sources.compozy import PATH, Compozy

TOKENS = Secrets.of("test-token")
USER = {
    "type": "object",
    "$defs": {"item": {"type": "object", "properties": {"quantity": {"type": "integer"}}}},
    "properties": {"email": {"type": "string"}, "items": {"items": {"$ref": "#/$defs/item"}}},
    "required": ["email"],
}


def request(payload: str, name: str = "user.created") -> Incoming:
    """Build a request whose payload is that JSON."""
    return Incoming.of("POST", PATH, {}, f'{{"name": "{name}", "payload": {payload}}}'.encode())


def with_schema(folder: Path, schema: object) -> Compozy:
    """Configure a schema for `user.created`; text is written as it is."""
    path = folder / "user.created.json"
    path.write_bytes(schema.encode() if isinstance(schema, str) else msgspec.json.encode(schema))
    return Compozy(tokens=TOKENS, schemas={"user.created": path})


def test_documented_clients_and_the_sdk_find_the_same_id_in_the_reply():
    reply = sources()["compozy"].send(request("{}")).reply(Receipt(event_id="evt_01234567-89ab"))
    assert reply.status == 202
    assert reply.body["event_id"] == reply.body["data"]["event_id"] == "01234567-89ab"


def test_a_rate_limit_has_a_message_like_every_error():
    reply = sources()["compozy"].refuse(RateLimited(retry_after=3), Incoming.of("POST", PATH))
    assert (reply.status, reply.body["error"]["message"]) == (429, "Too many requests")


def test_a_payload_that_matches_its_schema_is_kept_byte_for_byte(tmp_path):
    source = with_schema(tmp_path, USER)
    payload = '{"email": "a@b", "items": [{"quantity": 2.0}], "total": 50.00}'
    assert bytes(source.send(request(payload)).event.data) == payload.encode()


@pytest.mark.parametrize(
    ("payload", "field", "issue"),
    [
        ("{}", "payload", "'email' is a required property"),
        ("null", "payload", "'email' is a required property"),
        ('{"email": 5}', "payload.email", "5 is not of type 'string'"),
        (
            '{"email": "a", "items": [{}, {"quantity": "x"}]}',
            "payload.items[1].quantity",
            "'x' is not of type 'integer'",
        ),
        ('{"email": "a", "n": 1e999}', "payload", "too deep or too large to check"),
    ],
)
def test_a_payload_that_violates_its_schema_is_refused_with_the_path(tmp_path, payload, field, issue):
    source = with_schema(tmp_path, USER)
    with pytest.raises(Invalid) as caught:
        source.send(request(payload))
    error = source.refuse(caught.value, Incoming.of("POST", PATH)).body["error"]
    assert error["details"] == {"field": field, "issue": issue}


def test_a_long_schema_error_is_shortened(tmp_path):
    with pytest.raises(Invalid) as caught:
        with_schema(tmp_path, USER).send(request(f'{{"email": [{"1," * 900}1]}}'))
    assert len(caught.value.issue) == 300


def test_a_deep_payload_is_refused_by_a_recursive_schema(tmp_path):
    source = with_schema(tmp_path, {"items": {"$ref": "#"}, "properties": {"n": {"$ref": "#"}}})
    with pytest.raises(Invalid) as caught:
        source.send(request('{"n": ' + "[" * 400 + "]" * 400 + "}"))
    assert caught.value.issue == "too deep or too large to check"


def test_other_names_have_no_schema(tmp_path):
    assert with_schema(tmp_path, USER).send(request("{}", name="user.deleted")).event.type == "user.deleted"


def test_the_json_schema_draft_of_a_schema_is_used(tmp_path):
    tuple_of_integers = {
        "properties": {"pair": {"items": [{"type": "integer"}]}}
    }  # `items` lists are draft 7
    source = with_schema(tmp_path, {"$schema": "http://json-schema.org/draft-07/schema#"} | tuple_of_integers)
    with pytest.raises(Invalid):
        source.send(request('{"pair": ["x"]}'))


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ("{", "no JSON object: Input data was truncated"),
        ("[]", "no JSON object: Expected `object`, got `array`"),
        ({"type": 5}, "no JSON Schema: $.type: 5 is not valid under any of the given schemas"),
        ({"$ref": "#/$defs/none"}, "$ref leads nowhere: /$defs/none"),
        (
            {"properties": {"a": {"$ref": "https://example.com/schema"}}},
            "$ref leads nowhere: https://example.com/schema",
        ),
    ],
)
def test_a_broken_schema_stops_the_start_and_names_its_file(tmp_path, schema, complaint):
    with pytest.raises(ValueError, match=r"user\.created\.json") as caught:
        with_schema(tmp_path, schema)
    assert str(caught.value) == f"{tmp_path / 'user.created.json'}: {complaint}"


def test_a_missing_schema_file_stops_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: No such file or directory"):
        Compozy(tokens=TOKENS, schemas={"a": tmp_path / "none.json"})


def test_schemas_without_the_library_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ValueError, match=r'pip install "hookferry\[schemas\]"'):
        with_schema(tmp_path, USER)
    assert Compozy(tokens=TOKENS).validators == {}
