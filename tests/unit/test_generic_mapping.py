"""How a generic source maps a request: type, subject, key, context, data, batches, replies."""

import base64
import json
import tracemalloc

import msgspec
import pytest
from generic import event_of, incoming, load_table

from relay.config.schema import SourceConfig
from relay.ingest.event import make_event
from relay.ingest.routes import Mount
from relay.source import (
    EMPTY,
    Accepted,
    Forbidden,
    Invalid,
    Malformed,
    MethodNotAllowed,
    Receipt,
    Reply,
    TooLarge,
)

HUGE = b"-" + b"9" * 4000 + b".50e400"
FORM = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}


def text_of(value):
    return bytes(value).decode() if isinstance(value, msgspec.Raw) else value


@pytest.mark.parametrize(
    ("template", "body", "type_"),
    [
        ("push", b"{}", "push"),
        ("{body:a}", b'{"a": "push"}', "push"),
        ("{body:a}", b'{"a": 12.50}', "12.50"),
        ("{body:a}", b'{"a": true}', "true"),
        ("{body:a}", b'{"a": "\\u00e9\\n"}', None),
        ("{body:a}", b'{"a": "\\u00e9"}', "é"),
        ("{body:a}", b'{"a": "Bob \\ud83d"}', "Bob \\ud83d"),
        ("{header:X-Event}.{body:action}", b"{}", "push"),
        ("{header:X-Event}.{body:action}", b'{"action": null}', "push"),
        ("{header:X-Event}.{body:action}", b'{"action": ""}', "push"),
        ("{header:X-Event}.{body:action}", b'{"action": "opened"}', "push.opened"),
        ("{body:action}.{header:X-Event}", b"{}", "push"),
        ("{body:x}.{header:X-Event}.{body:y}", b"{}", "push"),
        ("{header:X-Event}.{body:x}.{body:y}", b'{"y": "z"}', "push.z"),
        ("{body:x}.{body:y}", b'{"x": "(ends.)"}', "(ends.)"),
        ("{body:x}.{body:y}", b'{"y": "(begins"}', "(begins"),
        ("{body:x}.{body:y}.{header:X-Event}", b"{}", "push"),
        ("[{body:x}] ({body:y}) end", b'{"x": "a"}', "[a] end"),
        ("[{body:x}] ({body:y}) end", b'{"y": "a"}', "(a) end"),
        ("{header:X-Event}.{body:x}.{body:y}", b'{"x": "w"}', "push.w"),
        ("order-{body:a} ({body:b})", b'{"a": "x"}', "order-x"),
        ("order ({body:b}) late", b"{}", "order late"),
        ("({body:b}) {body:a}", b'{"a": "x"}', "x"),
        ("{body:b}: {body:a}", b'{"a": "x"}', "x"),
        ("{body:a.b.0.c}", b'{"a": {"b": [{"c": "deep"}]}}', "deep"),
        ("{body:a.'b.c'}", b'{"a": {"b.c": "dots"}}', "dots"),
        ("{body:0.id}", b' [{"id": "first"}] ', "first"),
        ("{body:'0'}", b'{"0": "key"}', "key"),
        ("{body:a}{body:a.b}", b'{"a": {"b": "x"}}', None),
        ("{body:a}", b'{"a": [1]}', None),
        ("{body:a}", b'{"a": {"b": 1}}', None),
        ("{body:a.b}", b'{"a": "text"}', None),
        ("{body:a}", b'{"b": 1}', None),
        ("{body:a}", b"[]", None),
        ("{body:a}", b'"a"', None),
        ("{body}", b'"whole"', "whole"),
        ("{body}", b"17", "17"),
        ("{body:a|upper}-{body:b|default:none}", b'{"a": "x"}', "X-none"),
        ("{body:a|truncate:3}", b'{"a": "abcdef"}', "ab…"),
        ("{body:a|date:%Y}", b'{"a": 1700000000}', "2023"),
        ("{body:a|date:%Y}", b'{"a": "x"}', None),
        ("{method}.{path:store}", b"{}", "POST.berlin"),
        ("{query:t}", b"{}", "from query"),
        ("{{{body:a}}}", b'{"a": "x"}', "{x}"),
        ("{body:'a\"b'}", b'{"a\\"b": "quoted"}', "quoted"),
        ("{body:a} ", b'{"a": "x"}', "x "),
        ("{body:a}", b'{"a": " "}', None),
    ],
)
def test_a_type_is_a_text_of_parts_of_the_request(template, body, type_):
    source = load_table(f"type = '''{template}'''")
    request = incoming(body, {"X-Event": "push"}, query="t=from+query")
    if type_ is None:
        mount = Mount(name="shop", source=source, config=SourceConfig(name="shop", plugin="generic"))
        with pytest.raises(Invalid):
            make_event(mount, source.receive(request).event, request, 0)
    else:
        assert source.receive(request).event.type == type_


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b'{"a": [1]}', "a: expected text, a number, true or false, got a list"),
        (b"{}", "type: missing: a"),
        (b'{"a": {}}', "a: expected text, a number, true or false, got an object"),
    ],
)
def test_a_refusal_names_the_field_in_the_words_of_the_sender(body, detail):
    with pytest.raises(Invalid) as error:
        event_of(load_table('type = "{body:a}"'), body)
    assert error.value.detail == detail


def test_the_mapping_of_the_shop():
    source = load_table(
        'type = "{header:X-Shop-Topic}"\nsubject = "{path:store}"\nkey = "{body:id}"\n'
        'context = { store = "{path:store}", lines = "{body:lines}", no = "{body:no}", null = "{body:null}", '
        'text = "{path:store}/{body:id}" }\ntimestamp = "{body:at}"\ndata = "{body:payload}"'
    )
    payload = b'{"n": %b, "b": 1}' % HUGE
    body = b'{"id": 7, "at": 1700000000.5, "null": null, "lines": [ 1, 2 ], "payload": %b}' % payload
    event = event_of(source, body, {"X-Shop-Topic": "order.paid"})
    assert (event.type, event.subject, event.key) == ("order.paid", "berlin", "7")
    assert bytes(event.data) == payload
    assert {name: text_of(value) for name, value in event.context.items()} == {
        "store": "berlin",
        "lines": "[ 1, 2 ]",
        "text": "berlin/7",
        "timestamp": "1700000000.5",
    }


@pytest.mark.parametrize(
    ("keys", "body", "data"),
    [
        ("", b' {"a": 1.50} ', '{"a": 1.50}'),
        ("", b"[1]", "[1]"),
        ("", b"null", "null"),
        ('data = "{body:a}"', b'{"a": null}', "null"),
        ('data = "{body:a}"', b'{"a": {"b": [1.0, 9e999]}}', '{"b": [1.0, 9e999]}'),
        ('data = "{body:a}"', b'{"a": "Bob \\ud83d"}', '"Bob \\ud83d"'),
        ('data = "{body:a}-{body:b}"', b'{"a": 1, "b": "x"}', "1-x"),
        ('data = "{path:store}"', b"{}", "berlin"),
        ('data = "{body:a|upper}"', b'{"a": "x"}', "X"),
        ('data = "{body}"', b'{"a": 1}', '{"a": 1}'),
        ('body = "text"', "naïve\n".encode(), '"naïve\\n"'),
        ('body = "raw"', b"\x00\xff", '{"content_type":"image/png","base64":"AP8="}'),
    ],
)
def test_data_is_the_body_unless_a_template_sets_it(keys, body, data):
    assert text_of(event_of(load_table(keys), body, {"Content-Type": "image/png"}).data) == data


@pytest.mark.parametrize("body", [b"", b"{", b'{"a": 1}x', b'{"a": "\xff"}', b"\xef\xbb\xbf{}", b"[" * 5000])
def test_a_body_that_is_not_json_is_refused_with_any_templates(body):
    for keys in ("", 'data = "{path:store}"', 'type = "{body:a}"'):
        with pytest.raises(Malformed):
            event_of(load_table(keys), body)


def test_a_missing_data_path_is_refused_and_a_missing_subject_is_absent():
    with pytest.raises(Invalid, match="not valid") as error:
        event_of(load_table('data = "{body:payload}"'), b"{}")
    assert error.value.detail == "payload: field is required"
    event = event_of(
        load_table('subject = "{body:x}"\ncontext = { a = "{body:x}" }\ntimestamp = "{body:x}"'), b"{}"
    )
    assert (event.subject, event.context, event.key) == (None, {}, None)
    assert event_of(load_table(""), b"{}").context is EMPTY


@pytest.mark.parametrize(
    ("template", "body", "key"),
    [
        ("{body:id}", b'{"id": 7}', "7"),
        ("{body:id}", b'{"id": ""}', None),
        ("{body:id}", b'{"id": "  "}', None),
        ("{body:id}", b"{}", None),
        ("{body:id}", b'{"id": null}', None),
        ("{header:X-Topic}.{body:id}", b"{}", None),
        ("{header:X-Topic}.{body:id}", b'{"id": 7}', "paid.7"),
        ("{header:X-Topic}.{body:id|default:-}", b"{}", "paid.-"),
    ],
)
def test_a_key_is_complete_or_there_is_none(template, body, key):
    assert event_of(load_table(f'key = "{template}"'), body, {"X-Topic": "paid"}).key == key


def test_several_values_of_a_name_are_refused_unless_the_first_one_counts():
    headers = {"X-A": "one"}
    twice = msgspec.structs.replace(incoming(headers=headers), headers=_twice("X-A", "one", "two"))
    for place, request in (
        ("header:X-A", twice),
        ("query:a", incoming(query="a=one&b=x&a=two")),
        ("form:a", incoming(b"a=one&a=two", FORM)),
    ):
        with pytest.raises(Invalid) as error:
            load_table(f'type = "{{{place}}}"').receive(request)
        assert "several values" in error.value.detail or "more than once" in error.value.detail
        first = load_table(f'type = "{{{place}}}"\nfirst_of_list = ["{place.replace("X-A", "x-a")}"]')
        assert first.receive(request).event.type == "one"


def _twice(name, *values):
    from multidict import CIMultiDict, CIMultiDictProxy  # noqa: PLC0415 - one test needs it

    return CIMultiDictProxy(CIMultiDict([(name, value) for value in values]))


@pytest.mark.parametrize(
    ("keys", "body", "type_", "data"),
    [
        ('type = "{body:event}"', b"event=paid&x=%C3%A9+1&x=2&y=", "paid",
         '{"event":"paid","x":["é 1","2"],"y":""}'),
        ('type = "{form:event}"', b"event=paid", "paid", '{"event":"paid"}'),
        ('type = "{body:a.b}"\nform_field = "payload"', b"payload=%7B%22a%22:%7B%22b%22:1.50%7D%7D", "1.50",
         '{"a":{"b":1.50}}'),
        ('type = "{body:command}"\nform_field = "payload"', b"command=%2Fweather", "/weather",
         '{"command":"/weather"}'),
        ('type = "{form:payload|truncate:3}"\nform_field = "payload"', b"payload=%5B1%5D", "[1]", "[1]"),
    ],
)  # fmt: skip
def test_a_form_is_its_json_or_the_map_of_its_fields(keys, body, type_, data):
    event = event_of(load_table(keys), body, FORM)
    assert (event.type, text_of(event.data)) == (type_, data)


@pytest.mark.parametrize(
    ("body", "error"),
    [(b"payload=%7B", Invalid), (b"payload=1&payload=2", Invalid), (b"payload=1,%22type%22:2", Invalid),
     (b"a=%FF", Malformed), (b"\xff=1", Malformed), (b"a&" * 1001, Malformed)],
)  # fmt: skip
def test_a_broken_form_is_refused(body, error):
    with pytest.raises(error):
        event_of(load_table('form_field = "payload"'), body, FORM)


def test_text_needs_utf8_and_bytes_are_kept_as_base64():
    with pytest.raises(Malformed):
        event_of(load_table('body = "text"'), b"\xff")
    body = bytes(range(256))
    data = msgspec.json.decode(event_of(load_table('body = "raw"'), body).data)
    assert base64.b64decode(data["base64"]) == body
    assert data["content_type"] == "application/octet-stream"


def test_a_get_source_maps_its_query():
    source = load_table('methods = ["GET"]\ntype = "{query:event}"\nkey = "{query:id}"')
    event = event_of(source, b"", method="GET", query="event=ring&id=7&x=a&x=b%26")
    assert (event.type, event.key) == ("ring", "7")
    assert event.data == {"event": "ring", "id": "7", "x": ["a", "b&"]}
    with pytest.raises(Invalid):
        event_of(source, b"", method="GET", query="event=%FF")


# --- batches --------------------------------------------------------------------------------------------

BATCH = 'events = "{body:items}"\ntype = "{body:kind}.{item:name}"\nkey = "{item:id}"\nmax_events = 3'


def test_a_batch_becomes_an_event_for_each_item():
    accepted = load_table(BATCH).receive(
        incoming(b'{"kind": "k", "items": [{"name": "a", "id": 1}, {"name": "b"}]}')
    )
    assert accepted.event is None
    assert [(each.type, each.key, text_of(each.data)) for each in accepted.events] == [
        ("k.a", "1", '{"name": "a", "id": 1}'),
        ("k.b", None, '{"name": "b"}'),
    ]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"{}", "items: field is required"),
        (b'{"items": null}', "items: field is required"),
        (b'{"items": {}}', "items: expected a list"),
        (b'{"items": [{"name": "a"}, {"name": []}]}',
         "items.1: name: expected text, a number, true or false, got a list"),
        (b'{"items": [1]}', "items.0: type: missing: kind, name"),
    ],
)  # fmt: skip
def test_a_broken_batch_is_refused_and_the_item_named(body, detail):
    with pytest.raises(Invalid) as error:
        load_table(BATCH.replace("{body:kind}.", "{body:kind}")).receive(incoming(body))
    assert error.value.detail == detail


def test_a_batch_has_a_limit_and_an_empty_one_only_a_reply():
    source = load_table(BATCH + "\nreply = { status = 202, json = { ok = true, id = '{event_id}' } }")
    with pytest.raises(TooLarge, match="more than 3 events"):
        source.receive(incoming(b'{"items": [1, 2, 3, 4]}'))
    reply = source.receive(incoming(b'{"items": []}'))
    assert isinstance(reply, Reply)
    assert (reply.status, reply.body) == (202, b'{"ok":true,"id":""}')
    assert isinstance(load_table(BATCH).receive(incoming(b'{"items": []}')), Reply)


def test_a_whole_body_can_be_the_batch():
    accepted = load_table('events = "{body}"\ntype = "{item:0}"').receive(incoming(b'[["a"], ["b"]]'))
    assert [each.type for each in accepted.events] == ["a", "b"]


# --- replies and handshakes -----------------------------------------------------------------------------


def reply_of(keys, request=None):
    accepted = load_table(keys).receive(request or incoming(b'{"a": {"n": 1.50}, "t": "x"}'))
    reply = accepted.reply if isinstance(accepted, Accepted) else accepted
    return reply(Receipt(event_id="evt_1")) if callable(reply) else reply


def test_the_usual_reply_names_the_event():
    assert reply_of("") == {"status": "accepted", "event_id": "evt_1"}


@pytest.mark.parametrize(
    ("keys", "status", "body", "content_type"),
    [
        ("reply = { status = 202, json = { ok = true } }", 202, b'{"ok":true}', None),
        ("reply = { json = ['{body:a}', '{body:zzz}', 'is {body:t}', '{event_id}'] }", 200,
         b'[{"n": 1.50},null,"is x","evt_1"]', None),
        ("reply = { text = 'got {body:t}' }", 200, b"got x", "text/plain; charset=utf-8"),
        ("reply = { text = '<Response/>', content_type = 'text/xml' }", 200, b"<Response/>", "text/xml"),
        ("reply = { empty = true }", 200, b"", None),
        ("reply = { status = 204, empty = true }", 204, b"", None),
        ("reply = { json = false }", 200, b"false", None),
    ],
)  # fmt: skip
def test_a_reply_is_json_text_or_empty(keys, status, body, content_type):  # None: JSON, or no body
    reply = reply_of(keys)
    assert (reply.status, reply.body, reply.content_type) == (status, body, content_type)


def test_a_reply_header_takes_no_control_characters():
    keys = "reply = { empty = true, headers = { X-Echo = '{body:t}' } }"
    assert reply_of(keys).headers == {"X-Echo": "x"}
    with pytest.raises(Invalid):
        reply_of(keys, incoming(b'{"t": "a\\r\\nSet-Cookie: b"}'))


SLACK = (
    'handshakes = [{ method = "POST", when = { "{body:type}" = "url_verification" }, '
    'reply = { json = { challenge = "{body:challenge}" } } }]'
)
META = (
    'verify_tokens = ["open"]\nhandshakes = [{ method = "GET", when = { "{query:hub.mode}" = "subscribe" }, '
    'token = "{query:hub.verify_token}", verified = false, reply = { text = "{query:hub.challenge}" } }, '
    '{ method = "HEAD", verified = false, reply = { empty = true } }]'
)


def test_a_verified_handshake_is_answered_without_an_event():
    source = load_table(SLACK)
    request = incoming(b'{"type": "url_verification", "challenge": "abc"}')
    assert source.handshake(request) is None
    assert source.receive(request).body == b'{"challenge":"abc"}'
    assert source.receive(incoming(b'{"type": "other"}')).event.type == "order"
    assert source.receive(incoming(b'{"type": ["url_verification"]}')).event.type == "order"


def test_a_handshake_before_verification_needs_its_token():
    source = load_table(META)
    asked = "hub.mode=subscribe&hub.verify_token={}&hub.challenge=1158201444"
    reply = source.handshake(incoming(b"", method="GET", query=asked.format("open")))
    assert (reply.body, reply.content_type) == (b"1158201444", "text/plain; charset=utf-8")
    assert reply.headers == {"X-Content-Type-Options": "nosniff"}
    for token in ("", "opem", "open%00"):
        with pytest.raises(Forbidden):
            source.handshake(incoming(b"", method="GET", query=asked.format(token)))
    assert source.handshake(incoming(b"", method="GET", query=asked.format("%FF"))) is None
    assert source.handshake(incoming(b"", method="GET", query="x=y")) is None
    assert source.handshake(incoming(b"{}")) is None
    assert source.handshake(incoming(b"", method="HEAD")).body == b""
    with pytest.raises(MethodNotAllowed):
        source.answer(incoming(b"", method="GET", query="x=y"))


def test_a_star_stands_for_any_value():
    source = load_table(
        'handshakes = [{ method = "GET", when = { "{header:X-Challenge}" = "*" }, '
        'reply = { json = { verification = "{header:X-Challenge}" } } }]'
    )
    assert source.answer(incoming(b"", {"X-Challenge": "c"}, method="GET")).body == b'{"verification":"c"}'
    with pytest.raises(MethodNotAllowed):
        source.answer(incoming(b"", {"X-Challenge": ""}, method="GET"))


def test_samples_are_requests_to_the_first_path():
    source = load_table('samples = [{ name = "a", headers = { X-T = "y" }, body = "{}", query = "q=1" }]')
    (sample,) = source.samples()
    assert (sample.method, sample.path, sample.query) == ("POST", "/hooks/shop/store", "q=1")
    assert source.receive(sample).event.type == "order"


def test_without_samples_there_is_an_empty_request_to_fill():
    (sample,) = load_table("").samples()
    assert (sample.label, sample.method, sample.body) == ("request", "POST", b"{}")
    (sample,) = load_table('methods = ["GET"]').samples()
    assert (sample.method, sample.body) == ("GET", b"")


@pytest.mark.parametrize(
    ("table", "body", "types"),
    [
        ('type = "{body:type}"', {"type": "example"}, ["example"]),
        ('type = "{body:a.b}.{body:a.c}.{header:X-Kind}"', {"a": {"b": "example", "c": "example"}},
         ["example.example.example"]),
        ('type = "{body:a}.{body:a}"', {"a": "example"}, ["example.example"]),
        ('events = "{body:items}"\ntype = "{item:name}"', {"items": [{"name": "example"}]}, ["example"]),
        ('events = "{body}"\ntype = "{item:name}"', [{"name": "example"}], ["example"]),
    ],
)  # fmt: skip
def test_without_samples_the_request_has_a_type(table, body, types):
    source = load_table(table)
    (sample,) = source.samples()
    assert json.loads(sample.body) == body
    accepted = source.receive(sample)
    assert [each.type for each in accepted.events or [accepted.event]] == types


def test_a_list_of_many_items_is_not_read_to_its_end():
    many = b"[" + b"1," * 300_000 + b"1]"
    batch, position = load_table('events = "{body}"'), load_table('type = "{body:2}"\ndata = "{body:2}"')
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            batch.receive(incoming(many))
        assert position.receive(incoming(many)).event.type == "1"
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
    assert event_of(load_table('type = "{body:5000}"'), b'{"5000": "key"}').type == "key"
    items = [{"name": chr(0xD83D)}, {"name": "b"}]
    accepted = load_table('events = "{body}"\ntype = "{item:name}"').receive(
        incoming(json.dumps(items).encode())
    )
    assert [each.type for each in accepted.events] == ["\\ud83d", "b"]
