import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import make_event

import relay.routing.envelope
from relay.routing.envelope import ABSENT, EnvelopeView, Path


def view(data=b"{}", context=b"{}", subject=None):
    return EnvelopeView(make_event(type="adorn.attire.sold", subject=subject, data=data, context=context))


DATA = b"""{"total": 45000.00, "big": 1180591620717411303424, "none": null, "sold": false, "": 1,
    "items": [{"sku": "a.b"}, {"sku": "c"}], "0": "zero", "a.b": {"c": [10, 20]}, "it's": 5}"""


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("id", "evt_018bcfe5-6800-7000-8000-000000000001"),
        ("type", "adorn.attire.sold"),
        ("timestamp", "2023-11-14T22:13:20.123Z"),
        ("source", "adorn"),
        ("subject", "s-1"),
        ("context.store_id", "st_9"),
        ("data.total", 45000),
        ("data.big", 2**70),
        ("data.sold", False),
        ("data.items.0.sku", "a.b"),
        ("data.items.1.sku", "c"),
        ("data.0", "zero"),
        ('data."0"', "zero"),
        ('data."a.b".c.1', 20),
        ("data.'a.b'.c.0", 10),
        ('data."it\'s"', 5),
        ('data.""', 1),
        ("data.none", ABSENT),
        ("data.nothing", ABSENT),
        ("data.items.2", ABSENT),
        ("data.items.01", ABSENT),
        ('data.items."0"', ABSENT),
        ("data.items.-1", ABSENT),
        ("data.items.9999999999", ABSENT),
        ("data.total.x", ABSENT),
        ("data.none.x", ABSENT),
    ],
)
def test_a_path_finds_a_value_or_absent(path, value):
    shown = view(DATA, b'{"store_id":"st_9"}', subject="s-1")
    assert shown.find(Path.parse(path)) == value


def test_a_missing_subject_is_absent():
    assert view().find(Path.parse("subject")) is ABSENT


def test_data_need_not_be_an_object():
    assert view(b"[1, [2]]").find(Path.parse("data.1.0")) == 2
    assert view(b"3").find(Path.parse("data")) == 3


@pytest.mark.parametrize("text", ["", ".", "data.", ".data", "data..a", 'data."a', 'data."a"b', 'data.a"b"'])
def test_a_malformed_path_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="is not a path such as"):
        Path.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sale_made", 'did you mean "data.sale_made"?'),
        ("dta.sale_made", 'did you mean "data.sale_made"?'),
        ("contxt.store_id", 'did you mean "context.store_id"?'),
        ("subject.id", "subject is text and has no fields"),
    ],
)
def test_an_impossible_path_is_refused_with_a_suggestion(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Path.parse(text)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters='"')), max_size=5))
def test_every_key_can_be_reached_in_quotes(keys):
    value = 42
    for key in reversed(keys):
        value = {key: value}
    path = ".".join(["data", *(f'"{key}"' for key in keys)])
    assert view(json.dumps(value).encode()).find(Path.parse(path)) == 42


def test_each_part_is_decoded_once_and_only_on_demand(monkeypatch):
    decoded = []

    def decode(raw):
        decoded.append(raw)
        return json.loads(raw)

    monkeypatch.setattr(relay.routing.envelope, "_decode", decode)
    shown = view(b'{"a":1,"b":2}', b'{"c":3}')
    assert shown.find(Path.parse("type")) == "adorn.attire.sold"
    assert decoded == []
    assert [shown.find(Path.parse(path)) for path in ("data.a", "data.b", "data.x")] == [1, 2, ABSENT]
    assert decoded == [b'{"a":1,"b":2}']
    assert [shown.find(Path.parse("context.c")) for _ in range(2)] == [3, 3]
    assert decoded == [b'{"a":1,"b":2}', b'{"c":3}']


@pytest.mark.parametrize("oddity", [b"1e400", b"-1e400", b"9" * 5000, b'"\\ud800"'])
def test_a_value_that_the_fast_decoder_refuses_does_not_hide_the_others(oddity):
    shown = view(b'{"odd":' + oddity + b',"even":1180591620717411303424}')
    assert shown.find(Path.parse("data.even")) == 2**70
    assert shown.find(Path.parse("data.odd")) is not ABSENT


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff", b'"\xff"', b"[" * 100_000, b"[1e400," + b"[" * 100_000, b'{"a":' * 100_000]
)
def test_a_document_that_cannot_be_decoded_is_absent(raw):
    assert view(raw).find(Path.parse("data")) is ABSENT
