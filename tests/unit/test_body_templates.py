"""Request bodies written in config.toml: values stay values, and none breaks out of its place."""

import html
import json
import random
import tomllib
import tracemalloc
from urllib.parse import parse_qsl
from xml.etree import ElementTree as ET

import pytest
from commands import run
from daemons import write_config
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.config.problems import SettingError
from relay.formats import template as module
from relay.formats.template import compile_body
from relay.model import StoredEvent

NUMBER = "1" * 4000
DATA = (
    '{"order":{"id":"A-1","items":[{"sku":"x"},{"sku":"y"}],"a.b":"dotted"},"total":45000.00,"big":'
    + NUMBER
    + ","
    '"none":null,"empty":"","yes":true,"list":[1, 2],"half":"Bob \\ud83d","quote":"a\\"b\\\\c</x>&\\n",'
    '"at":1700000000,"twice":1,"twice":2}'
).encode()


def event(data=DATA, **changes):
    fields = {
        "id": 7,
        "public_id": "evt_018bcfe5-6800-7000-8000-000000000001",
        "source": "shop",
        "type": "shop.order",
        "subject": None,
        "received_at": 1_700_000_000_123_456,
        "data": data,
        "context": b'{"shop": "one"}',
        "body": b"",
        "content_type": "",
        "sha256": b"",
    }
    return StoredEvent(**fields | changes)


def fill(template, content_type=None, **changes):
    return compile_body(template, content_type).render(event(**changes)).decode()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{type} {subject}!", "shop.order !"),
        ("{subject|default:nobody}", "nobody"),
        ("{id} {source}", "evt_018bcfe5-6800-7000-8000-000000000001 shop"),
        ("{timestamp}", "2023-11-14T22:13:20.123Z"),
        ("{timestamp|date:%d.%m.%Y}", "14.11.2023"),
        ("{data.at|date:%H:%M}", "22:13"),
        ("{data.order.id|lower}", "a-1"),
        ("{data:order.id}", "A-1"),
        ("{data.order.items.1.sku|upper}", "Y"),
        ("{data.order.'a.b'}", "dotted"),
        ("{data.order.items.9.sku}{data.order.id.x}{data.none}{data.nope.x}", ""),
        ("{data.empty|default:-}", "-"),
        ("{data.total} {data.yes} {data.twice}", "45000.00 true 2"),
        ("{data.list}", "[1, 2]"),
        ("{data.list|upper}", "[1, 2]"),
        ("{data.order.id|date}", "A-1"),
        ("{data.half}", "Bob \\ud83d"),
        ("{data.order.id|truncate:2}", "A…"),
        ("{data.order.id|json}", '"A-1"'),
        ("{context.shop}", "one"),
        ("{{{type}}}", "{shop.order}"),
        ("{data.big}", NUMBER),
    ],
)
def test_placeholders_in_text(template, text):
    assert fill(template, "text/plain") == text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ({"a": "{data.total}", "b": "{data.big}"}, '{"a":45000.00,"b":' + NUMBER + "}"),
        ({"a": "{data.order.id}", "b": "no {data.order.id}"}, '{"a":"A-1","b":"no A-1"}'),
        (
            {"a": "{data.none}", "b": "{data.nope|default:x}", "c": "x{data.nope}"},
            '{"a":null,"b":"x","c":"x"}',
        ),
        ({"a": "{data.list}", "b": ["{data.yes}", 1, True, 1.5]}, '{"a":[1, 2],"b":[true,1,true,1.5]}'),
        ({"a": "{data.order.id|json}", "b": "{data.list|json}"}, '{"a":"A-1","b":[1, 2]}'),
        (["{type}", {"x": {"y": "{{}}"}}], '["shop.order",{"x":{"y":"{}"}}]'),
        ('{{"a": "{data.quote}", "b": {data.quote}, "c": {data.total}, "d": {data.nope}}}', None),
        ('{{"{data.quote}": "x{data.list}y", "n": {data.order.id|upper|json}}}', None),
        ('[{data.half}, "{data.half}", {data.big}]', None),
    ],
)
def test_json_has_values_as_sent_and_text_as_strings(template, text):
    body = fill(template)
    assert text is None or body == text
    json.loads(body, parse_int=str)


def test_a_json_text_escapes_inside_strings_and_writes_values_elsewhere():
    body = fill(
        '{{"a": "say {data.quote}", "b": {data.quote}, "c": [{data.total}, {data.nope}], "\\"": "{type}"}}'
    )
    assert '"c": [45000.00, null]' in body
    assert json.loads(body) == {
        "a": 'say a"b\\c</x>&\n',
        "b": 'a"b\\c</x>&\n',
        "c": [45000.0, None],
        '"': "shop.order",
    }


JSON_TEXT = (
    '{{"in": "<{data.v}>", "out": {data.v}, "filtered": {data.v|default:"x"}, "list": ["{data.v|json}"]}}'
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
)


@settings(max_examples=50)
@given(value=VALUES)
def test_no_value_breaks_out_of_its_place(value):
    data = json.dumps({"v": value}, ensure_ascii=False).encode()
    body = json.loads(fill(JSON_TEXT, data=data))
    assert set(body) == {"in", "out", "filtered", "list"}
    assert body["out"] == value
    assert body["filtered"] == ("x" if value in (None, "") else value)
    assert isinstance(body["in"], str)
    assert json.loads(body["list"][0]) == value
    table = json.loads(fill({"in": "<{data.v}>", "out": "{data.v}"}, data=data))
    assert (table["in"], table["out"]) == (body["in"], value)
    text = value if isinstance(value, str) else body["in"][1:-1]
    form = fill("v={data.v}&end=1", "application/x-www-form-urlencoded", data=data)
    assert parse_qsl(form, keep_blank_values=True) == [("v", text), ("end", "1")]
    markup = fill('<a b="{data.v}">{data.v}</a>', "application/xml", data=data)
    found = ET.fromstring(markup)
    assert (found.tag, list(found), list(found.attrib)) == ("a", [], ["b"])
    page = fill("<p>{data.v}</p>", "text/html; charset=utf-8", data=data)
    assert "<" not in page[3:-4]
    assert not set('"<>') & set(page[3:-4])
    assert (
        html.unescape(page[3:-4]).split()
        == "".join(c if c >= " " or c in "\t\r\n" else " " for c in text).split()
    )


@pytest.mark.parametrize("data", [b"null", b"[]", b"7", b"{", b"", b"\xff", b"[" * 100_000])
def test_data_that_is_not_an_object_has_no_values(data):
    assert fill("{data.a.b}|{data.0}", "text/plain", data=data) == "|"


@pytest.mark.parametrize(
    ("template", "content_type", "used"),
    [
        ({"a": 1}, None, "application/json"),
        ({"a": 1}, "application/vnd.api+json", "application/vnd.api+json"),
        (' {{"a": 1}}', None, "application/json"),
        ("[1]", None, "application/json"),
        ("{type}", None, "text/plain; charset=utf-8"),
        ("a={type}", "application/x-www-form-urlencoded", "application/x-www-form-urlencoded"),
    ],
)
def test_the_content_type_follows_from_the_template(template, content_type, used):
    assert compile_body(template, content_type).content_type == used


@pytest.mark.parametrize(
    ("template", "content_type", "key", "problem"),
    [
        ("{typ}", None, ("template",), 'did you mean "type"?'),
        ("{data.x|uper}", None, ("template",), 'column 1: unknown filter "uper"; did you mean "upper"?'),
        ("a\nb {data", None, ("template",), "line 2, column 3 of the template: no } closes the placeholder"),
        (
            "a\nb {order.id}",
            None,
            ("template",),
            'line 2, column 3 of the template: "order.id": a path starts with',
        ),
        ('{{"a": {type}', None, ("template",), "line 1 of the template is not JSON: expecting ',' delimiter"),
        (
            '{"a": 1}',
            "application/json",
            ("template",),
            "column 1: write {{ and }} for the braces of JSON, or a table",
        ),
        ('{{"a":\n "{type}" "b"}}', None, ("template",), "line 2 of the template is not JSON"),
        ('{{"a": "\\{type}"}}', None, ("template",), "a placeholder follows a backslash"),
        ({"a": [{"b": "{typ}"}]}, None, ("template", "a", 0, "b"), 'did you mean "type"?'),
        ({"a": 1}, "text/plain", ("content_type",), "a table is sent as JSON"),
        ("x", "text", ("content_type",), "expected a content type"),
        ("x", "text/plain\r\nX: y", ("content_type",), "expected a content type"),
        (7, None, ("template",), "expected text, a table or a list, got 7"),
        ("x" * 70_000, None, ("template",), "a template has at most 65536 characters"),
    ],
)
def test_a_wrong_template_names_key_place_and_remedy(template, content_type, key, problem):
    with pytest.raises(SettingError) as caught:
        compile_body(template, content_type)
    assert problem in str(caught.value)
    assert caught.value.key == key


def test_a_body_beyond_the_limit_is_an_error_and_not_sent(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    body = compile_body('["{data}"]', None)
    with pytest.raises(ValueError, match="the template makes a body of 304 bytes; the limit is 100"):
        body.render(event(data=json.dumps("\1" * 50).encode()))
    with pytest.raises(ValueError, match="the values of the template have more than 100 bytes"):
        body.render(event(data=json.dumps("x" * 101).encode()))


@pytest.mark.parametrize(
    "template", ["{data.a}" * 8000, {"list": ["{data.a}"] * 5000}, '["' + "{data.a}" * 8000 + '"]']
)
def test_many_placeholders_cannot_fill_the_memory(template):
    body, large = compile_body(template, None), event(data=b'{"a":"%b"}' % (b"x" * 2**20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="the values of the template have more than 16777216 bytes"):
        body.render(large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_no_event_of_a_hostile_corpus_breaks_a_body():
    words = [
        '"',
        "\\",
        "}}",
        "{{",
        "</x>",
        "&",
        "\u0000",
        "\u202e",
        "😀",
        "\ud83d",
        "a",
        ",",
        ":",
        "null",
        "\n",
        "'",
        "%",
        "[",
        "1e400",
    ]
    dice = random.Random(13)
    text = compile_body(
        '{{"a": "{data.v}", "b": {data.v}, "key {data.k|truncate:9}": [{data.w|default:x}]}}', None
    )
    table = compile_body({"a": "x{data.v}", "b": "{data.v}", "c": ["{data.w}", {"d": "{data.k}"}]}, None)

    def odd(depth=0):
        if depth < 2 and dice.random() < 0.2:
            return [odd(depth + 1), {odd_text(): odd(depth + 1)}]
        return dice.choice([None, True, 0, 10**400, -1.5, odd_text()])

    def odd_text():
        return "".join(dice.choices(words, k=dice.randrange(6)))

    for _ in range(10_000):
        data = {"v": odd(), "w": odd(), "k": odd_text()}
        given = event(data=json.dumps(data).encode())
        one, other = json.loads(text.render(given)), json.loads(table.render(given))
        assert len(one) == 3
        assert isinstance(one["a"], str)
        assert one["b"] == other["b"]
        assert list(other) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("more", "line", "problem"),
    [
        ('template = "{typ}"', "template", 'destinations.api.template: column 1: "typ"'),
        ("template = '''\nx\n{typ}\n'''", "template", "line 2, column 1 of the template"),
        ('[destinations.api.template]\na = 1\nb = "{typ}"', "b", "destinations.api.template.b: column 1"),
        (
            'content_type = "text/plain"',
            "content_type",
            "needs `template`; a format has its own",
        ),
        ("template = 7", "template", "destinations.api.template: expected text, a table or a list, got 7"),
    ],
)
def test_a_mistake_is_a_problem_with_its_line(tmp_path, more, line, problem):
    path = write_config(tmp_path, f'[destinations.api]\nurl = "https://api.example/"\n{more}\n')
    result = run("check-config", "-c", path, code=1).err
    assert problem in result
    numbers = [n for n, text in enumerate(path.read_text().splitlines(), 1) if text.startswith(f"{line} =")]
    assert f"{path}:{numbers[-1]}: " in result


def test_config_show_prints_the_template(tmp_path):
    more = 'template = { text = "{type}", list = [1, true], sub = { "a b" = "{{}}" } }'
    path = write_config(tmp_path, f'[destinations.api]\nurl = "https://api.example/"\n{more}\n')
    shown = tomllib.loads(run("config", "show", "-c", path).out)["destinations"]["api"]
    assert shown["template"] == tomllib.loads(more)["template"]
