"""JSON with lone surrogates and other oddities, as senders write it: kept, shown, and never a failure."""

import json
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import make_event
from support import FakeClock

from relay.base import json_text
from relay.base.clock import SECOND
from relay.errors import Invalid, Malformed
from relay.model import Worker
from relay.source import Incoming
from relay.store.export import read_line, write_line
from relay.store.rows import worker_of, worker_row
from relay.workers.rules import shown

ANY = msgspec.json.Decoder()
LONE = [
    rb"\ud83d",
    rb"\uDE00",
    rb"\udbff\ud800",
    rb"\ude00\ud83d",
    rb"\uD83d\n",
    rb"\\\ud83d",
    rb"\ud83d\u0041",
]
texts = st.text(st.characters(exclude_categories=[])) | st.text('\\u"/dDf83\ud83d\ude00a', max_size=9)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


class Inner(msgspec.Struct, frozen=True):
    name: str = ""
    raw: msgspec.Raw = msgspec.Raw(b"null")


class Pair(NamedTuple):
    one: str
    two: str


@dataclass(frozen=True)
class Record:
    name: str


class Outer(msgspec.Struct):
    name: str
    inner: list[Inner] = []
    raw: msgspec.Raw = msgspec.Raw(b"null")
    pair: Pair | None = None
    record: Record | None = None
    names: set[str] = set()


def escaped(value):
    """Return a value with all of its strings as they can be shown."""
    if isinstance(value, str):
        return json_text.escape(value)
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if isinstance(value, dict):
        return {escaped(key): escaped(item) for key, item in value.items()}
    return value


@given(values)
def test_any_value_is_read_with_its_lone_surrogates_shown_as_escapes(value):
    text = json.dumps(value).encode()
    expected = escaped(json.loads(text))  # there, two halves beside each other are a pair
    assert json_text.decode(ANY, text) == expected
    assert json_text.read(text) == expected


@given(values, values, st.booleans())
def test_raw_parts_keep_their_bytes(value, other, ascii_):
    def write(value):
        return json.dumps(value, ensure_ascii=ascii_).encode("utf-8", "backslashreplace")

    name, raw, deep = write("x\ud83d"), write(value), write(other)
    text = b'{"name":%b,"raw": %b ,"inner":[{"raw":%b},{"name":%b}]}' % (name, raw, deep, name)
    found = json_text.decode(msgspec.json.Decoder(Outer), text)
    assert (bytes(found.raw), bytes(found.inner[0].raw)) == (raw, deep)
    assert (found.name, found.inner[1].name) == (r"x\ud83d", r"x\ud83d")


@given(values)
def test_every_value_can_be_written(value):
    assert json.loads(json_text.encode(value)) == escaped(value)


@pytest.mark.parametrize("lone", LONE)
def test_a_lone_surrogate_is_accepted_everywhere(lone):
    escape = json.loads(b'"%b"' % lone).encode("utf-8", "backslashreplace").decode()
    text = b'{"name":"%b","pair":["%b","b"],"record":{"name":"%b"},"names":["%b"],"other":{"%b":"%b"}}'
    found = json_text.decode(msgspec.json.Decoder(Outer), text % ((lone,) * 6))
    assert (found.name, found.pair, found.record, found.names) == (
        escape, Pair(escape, "b"), Record(escape), {escape}
    )  # fmt: skip
    json_text.check(b'["%b"]' % lone)


def test_private_characters_are_not_mistaken_for_surrogates():
    text = '["\\ud83d", "\U000f0000\U000f0001", "\\udb80\\udc02", "\\udfff"]'.encode()
    assert json_text.decode(ANY, text) == [r"\ud83d", "\U000f0000\U000f0001", "\U000f0002", r"\udfff"]


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b'"\\ud83d', b'{"a":"\\ud83d"', b'["\\ud83d"] x', b'["\\ud83d",NaN]',
        b'["\\ud83d",-Infinity]', b'"\\ud8"', b'"\\ud83"', b'"\\ud83d\xff"', b'"\xed\xa0\xbd"', b"\\ud83d",
        b'{"\\ud83d"}', b'1,"a":"\\ud83d"',
    ],
)  # fmt: skip
def test_invalid_json_stays_invalid(text):
    with pytest.raises(ValueError):  # noqa: PT011 - msgspec's and Unicode's are ValueErrors, and no others
        json_text.check(text)
    with pytest.raises(ValueError):  # noqa: PT011 - likewise
        json_text.read(text)
    with pytest.raises(Malformed):
        Incoming.of("POST", "/", body=text).decode(msgspec.Raw)


@pytest.mark.parametrize(
    "text", [b'"\\ud83d', b"[" * 100_000 + b'"\\ud83d"', b'{"a":' * 100_000 + b'"\\ud83d"']
)
def test_a_deep_body_with_a_lone_surrogate_is_malformed(text):
    with pytest.raises(Malformed):
        Incoming.of("POST", "/", body=text).decode(msgspec.Raw)


def test_an_error_names_the_wrong_field_despite_surrogates():
    with pytest.raises(Invalid) as caught:
        Incoming.of("POST", "/", body=rb'{"raw":"\ud83d","name":5}').decode(Outer)
    assert (caught.value.field, caught.value.issue) == ("name", "expected `str`, got `int`")


@pytest.mark.parametrize(("text", "value"), [(b"1e400", float("inf")), (b"9" * 5000, float("inf"))])
def test_numbers_beyond_every_type_are_read_unless_they_must_be_exact(text, value):
    assert json_text.read(b'["\\ud83d",%b]' % text) == [r"\ud83d", value]
    with pytest.raises(ValueError):  # noqa: PT011 - likewise
        json_text.read(b'["\\ud83d",%b]' % text, exact=True)


def test_two_megabytes_of_surrogates_are_read_quickly():
    lone = b"".join(b"\\u%04x" % (0xDC00 + number % 1024) for number in range(2**21 // 6))
    found = json_text.decode(msgspec.json.Decoder(Inner), b'{"name":"%b","raw":"%b"}' % (lone[:600], lone))
    assert bytes(found.raw) == b'"%b"' % lone
    assert found.name == lone[:600].decode()


def test_a_worker_with_half_an_emoji_from_a_careless_plugin_can_be_stored_and_shown():
    row = Worker(source="s", id="w", version="1\ud83d", last_heartbeat=SECOND)
    assert worker_of(worker_row(row)[-1]).version == r"1\ud83d"
    assert json.loads(json_text.encode(shown(row)))["version"] == r"1\ud83d"


@pytest.mark.parametrize("within", [True, False])
def test_an_exported_event_with_lone_surrogates_is_read_in_again(within):
    data = rb'{"name": "Bob \ud83d", "n": 1e400}'
    body = b'{"d": %b}' % data if within else rb'{"other": "\ud83d"}'
    event = make_event(
        FakeClock(), data=data, body=body, context=rb'{"store_id":"\udfff"}', subject=r"Bob \ud83d"
    )
    found = read_line(write_line(event))
    assert (found.data, found.body, found.context) == (data, body, event.context)
    assert found.subject == event.subject


@pytest.mark.parametrize(
    "text", [b"", b"{", b"{'a':1}", b"a=1", b'{"a":1} x', b"{}".decode().encode("utf-16")]
)
def test_text_unlike_json_cannot_be_salvaged(text):
    with pytest.raises(ValueError):  # noqa: PT011 - json's
        json_text.salvage(text)
    with pytest.raises(Malformed):
        Incoming.of("POST", "/", body=text).decode(dict, loose=True)
