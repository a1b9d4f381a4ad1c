import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.formats import FORMATS
from relay.model import StoredEvent

# Nothing here survives a decoder and an encoder: spaces, a twin key, 2^70, trailing zeros, escapes.
ODD = b'{ "b":1.50,"a":1180591620717411303424 ,"a": 45000.00, "c":"\\u00e9\\/" }'

MESSAGES = ["slack", "discord", "teams", "telegram", "ntfy", "pagerduty"]

texts = st.text(st.characters(codec="utf-8"), max_size=400)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)


def event(**changes):
    fields = {
        "id": 7,
        "public_id": "evt_018bcfe5-6800-7000-8000-000000000001",
        "source": "moddy",
        "type": "moddy.member_joined",
        "subject": "80351110224678912",
        "received_at": 1_700_000_000_123_456,
        "data": ODD,
        "context": b'{"k":[1,  2]}',
        "body": b"as it \x00 came",
        "content_type": "text/plain; charset=latin-1",
        "sha256": b"",
    }
    return StoredEvent(**fields | changes)


def test_standard_inserts_the_senders_bytes_into_the_envelope():
    assert FORMATS["standard"].render(event()) == (
        b'{"id":"evt_018bcfe5-6800-7000-8000-000000000001","type":"moddy.member_joined",'
        b'"timestamp":"2023-11-14T22:13:20.123Z","source":"moddy","subject":"80351110224678912",'
        b'"data":' + ODD + b',"context":{"k":[1,  2]}}'
    )


def test_standard_has_null_for_a_missing_subject():
    assert b'"subject":null,"data":' in FORMATS["standard"].render(event(subject=None))


@given(value=values, context=values, type_=texts, subject=st.none() | texts)
def test_standard_is_json_with_the_values_of_the_event(value, context, type_, subject):
    body = FORMATS["standard"].render(
        event(
            type=type_,
            subject=subject,
            data=json.dumps(value).encode(),
            context=json.dumps(context, ensure_ascii=False).encode(),
        )
    )
    assert json.loads(body) == {
        "id": event().public_id,
        "type": type_,
        "timestamp": "2023-11-14T22:13:20.123Z",
        "source": "moddy",
        "subject": subject,
        "data": value,
        "context": context,
    }


def test_raw_is_the_request_body():
    assert FORMATS["raw"].render(event()) == b"as it \x00 came"
    assert FORMATS["raw"].content_type_of(event()) == "text/plain; charset=latin-1"
    assert FORMATS["raw"].content_type_of(event(content_type="")) == "application/octet-stream"
    assert FORMATS["raw"].content_type_of(event(content_type="text/plain;\ta=b")) == "text/plain; a=b"


@pytest.mark.parametrize("odd", ["text/\ud83d", "a/b\r\nx: y", "caf\xe9/x", "a\x00", "x" * 10_000])
def test_raw_replaces_a_content_type_that_cannot_be_forwarded(odd):
    assert FORMATS["raw"].content_type_of(event(content_type=odd)) == "application/octet-stream"


@pytest.mark.parametrize(
    ("name", "content_type"),
    [
        ("standard", "application/json"),
        ("cloudevents", "application/cloudevents+json"),
        *((name, "application/json") for name in MESSAGES),
    ],
)
def test_every_other_format_has_a_fixed_content_type(name, content_type):
    assert FORMATS[name].content_type_of(event()) == content_type


def test_the_table_of_formats_is_keyed_by_their_names():
    assert list(FORMATS) == ["standard", "raw", "cloudevents", *MESSAGES]
    assert all(name == each.name for name, each in FORMATS.items())


def test_cloudevents_are_structured_json_of_version_1_0():
    body = FORMATS["cloudevents"].render(event())
    assert msgspec.json.decode(body) == {
        "specversion": "1.0",
        "id": "evt_018bcfe5-6800-7000-8000-000000000001",
        "source": "/relay/moddy",
        "type": "moddy.member_joined",
        "subject": "80351110224678912",
        "time": "2023-11-14T22:13:20.123Z",
        "datacontenttype": "application/json",
        "data": msgspec.json.decode(ODD),
    }
    assert ODD in body


@pytest.mark.parametrize("subject", [None, ""])
def test_cloudevents_leave_out_a_missing_subject(subject):
    assert "subject" not in json.loads(FORMATS["cloudevents"].render(event(subject=subject)))


def test_a_cloudevents_source_is_a_uri_reference():
    assert (
        json.loads(FORMATS["cloudevents"].render(event(source="a b/ü")))["source"] == "/relay/a%20b%2F%C3%BC"
    )
