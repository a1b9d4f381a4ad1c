"""JSON from a source must be exactly one value, so it cannot change the envelope around it."""

import base64
import json
from enum import Enum
from typing import Any

import attrs
import msgspec
import pytest

from relay.base.clock import SECOND
from relay.config.schema import SourceConfig
from relay.errors import Invalid, PluginFailed
from relay.ingest import event as record_module
from relay.ingest.event import make_event
from relay.ingest.routes import Mount
from relay.source import LARGE, Event, Incoming, Source, as_json

NOW = 1_700_000_000 * SECOND
MOUNT = Mount(name="shop", source=Source(), config=SourceConfig(name="shop", plugin="shop"))
VALUES = [
    b"{}", b"[]", b"null", b"true", b"0", b"-0", b"1e400", b"45000.00", b'"a"', b' {"a" : [1, 2] } ',
    b"9" * 5000, rb'"\ud83d"', rb'{"\ud83d": "\udc00\ud83d"}', '"é\u2028"'.encode(),
]  # fmt: skip
NO_VALUES = [
    b"", b" ", b"{} {}", b'{},"type":"adorn.sale.made"', b"1,2", b"{", b"}", b'{"a":1,}', b"{a:1}", b"'a'",
    b"NaN", b"Infinity", b"-", b"01", b"1.", b"tru", b'"\xff"', b'"a\nb"', b'"\x00"', b"\xef\xbb\xbf{}",
    b"{}\x00",
    b"/**/{}", rb'"\ud83', rb'"\x"', b"[" * 100_000 + b"]" * 100_000,
]  # fmt: skip


class Body(msgspec.Struct):
    data: msgspec.Raw
    text: str = ""
    coded: str = ""


def recorded(data: Any, body: bytes = b"", context: Any = None) -> Any:
    incoming = Incoming.of("POST", "/a", {}, body)
    return make_event(
        MOUNT, Event(type="a", data=data, context={} if context is None else context), incoming, NOW
    )


@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0g", False),
        ("é" * 55, False),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x", False),
        ("", False),
    ],
)
def test_only_a_valid_trace_context_is_forwarded(sent, is_kept):
    incoming = Incoming.of("POST", "/a", {"traceparent": sent}, b"{}")
    made = make_event(MOUNT, Event(type="a", data={}), incoming, NOW)
    assert made.traceparent == (sent if is_kept else None)


@pytest.mark.parametrize("text", VALUES, ids=lambda text: text[:20])
def test_one_json_value_is_kept_byte_for_byte(text):
    assert recorded(msgspec.Raw(text)).data == text
    assert recorded({"a": msgspec.Raw(text)}).data == b'{"a":' + text + b"}"
    assert bytes(as_json(text)) == text
    assert bytes(as_json(text.decode())) == text


@pytest.mark.parametrize("text", NO_VALUES, ids=lambda text: text[:20])
def test_data_that_is_not_one_json_value_is_a_fault_of_the_plugin(text):
    for value in (
        msgspec.Raw(text),
        {"a": msgspec.Raw(text)},
        [[msgspec.Raw(text)]],
        Body(msgspec.Raw(text)),
    ):
        with pytest.raises(PluginFailed):
            recorded(value)
        with pytest.raises(PluginFailed):
            recorded({}, context=value)
    with pytest.raises(Invalid) as refused:
        as_json(text, "payload")
    assert refused.value.detail == "payload: expected JSON"


def test_a_part_of_a_large_body_is_not_parsed_again(monkeypatch):
    checked: list[bytes] = []
    monkeypatch.setattr(record_module, "check", checked.append)
    body = b'{"data": {"n": 45000.00, "text": "\xc3\xa9"%b}}' % (b" " * LARGE)
    incoming = Incoming.of("POST", "/a", {}, body)
    part = incoming.decode(Body).data
    stored = make_event(MOUNT, Event(type="a", data=part, context={"store": part}), incoming, NOW)
    assert stored.data in body
    assert json.loads(stored.context) == {"store": json.loads(stored.data)}
    assert checked == []


FORGED = b'{},"type":"adorn.sale.made"'


@pytest.mark.parametrize("room", [0, LARGE])
@pytest.mark.parametrize(
    "make",
    [
        bytearray,
        memoryview,
        lambda text: memoryview(b"[" + text + b"]")[1:-1],
        lambda text: text.decode(),
        lambda text: msgspec.msgpack.decode(msgspec.msgpack.encode({"data": {}, "text": ""}), type=Body).data,
    ],
    ids=["bytearray", "memoryview", "slice", "str", "msgpack"],
)
def test_raw_data_made_by_a_plugin_is_checked_despite_a_decoded_body(make, room):
    """A `Raw` does not show whether msgspec parsed it; a plugin can make an equal one from a buffer."""
    incoming = Incoming.of("POST", "/a", {}, b'{"data": {}}' + b" " * room)
    found = incoming.decode(Body)
    made = make(FORGED)
    found.data = made if isinstance(made, msgspec.Raw) else msgspec.Raw(made)
    for value in (found.data, {"a": found.data}, found):
        with pytest.raises(PluginFailed):
            make_event(MOUNT, Event(type="a", data=value), incoming, NOW)


@attrs.define
class ByAttrs:
    data: Any


def test_no_kind_of_value_hides_a_raw_from_the_check():
    odd = Enum("odd", {"ONE": msgspec.Raw(FORGED)})
    for value in (ByAttrs(msgspec.Raw(FORGED)), [ByAttrs([msgspec.Raw(FORGED)])], odd.ONE, {"a": odd.ONE}):
        with pytest.raises(PluginFailed):
            recorded(value)


@pytest.mark.parametrize("inner", [b'"\xff"', b'{"a": "\xff"}'])
def test_a_part_of_a_text_within_the_body_is_checked(inner):
    """Msgspec does not check whether skipped text is UTF-8."""
    body = msgspec.json.encode({"data": 1, "coded": base64.b64encode(inner).decode()})
    incoming = Incoming.of("POST", "/a", {}, body)
    found = incoming.decode(Body)
    raw = msgspec.json.decode(base64.b64decode(found.coded), type=msgspec.Raw)
    with pytest.raises(PluginFailed):
        make_event(MOUNT, Event(type="a", data=raw), incoming, NOW)


def test_a_part_that_the_plugin_decoded_itself_is_checked():
    body = msgspec.msgpack.encode({"data": {"a": 1}})
    raw = msgspec.msgpack.decode(body, type=Body).data
    with pytest.raises(PluginFailed):
        recorded(raw, body)
