"""Templates: parsing, filters, and error messages."""

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.base.json_path import find, parse_path
from relay.base.template import MOST_CHARACTERS, Placeholder, parse, text_of


def parts_of(text):
    return [
        part if isinstance(part, str) else (part.kind, part.argument, *(f.name for f in part.filters))
        for part in parse(text).parts
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("push", ["push"]),
        ("{body}", [("body", "")]),
        ("{header:X-GitHub-Event}.{body:action}", [("header", "X-GitHub-Event"), ".", ("body", "action")]),
        ("v0:{timestamp}:{body}", ["v0:", ("timestamp", ""), ":", ("body", "")]),
        ("{ body : a.b }", [("body", "a.b")]),
        ("{body:'a|b'.c}", [("body", "'a|b'.c")]),
        ('{body:"a}b"}', [("body", '"a}b"')]),
        ("{data.'a:b'.c}", [("data.'a:b'.c", "")]),
        ("{form:sorted}{url}", [("form", "sorted"), ("url", "")]),
        ("{body:a|upper|truncate:8}", [("body", "a", "upper", "truncate")]),
        ("{body|json}", [("body", "", "json")]),
        ("{query:hub.mode}", [("query", "hub.mode")]),
        ('{{"a":{{"b":{x}}}}}', ['{"a":{"b":', ("x", ""), "}}"]),
        ("{{}}", ["{}"]),
        ("{{{x}}}", ["{", ("x", ""), "}"]),
    ],
)
def test_a_template_has_literal_texts_and_placeholders(text, parts):
    assert parts_of(text) == parts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a}b", "column 2: a single }; write }} for a brace"),
        ("{}", "column 1: a placeholder needs a name; write {{ and }} for braces"),
        ("x {body", "column 3: no } closes the placeholder '{body'; write {{ for a brace"),
        ('{"a": {"b": 1}}', "column 1: no } closes the placeholder"),
        ("{body:'a}", "no } closes the placeholder"),
        ("{a{b}}", "column 1: no } closes"),
        ("{body:}", "column 1: {body:} has nothing after the colon"),
        ("{body:|upper}", "{body:} has nothing after the colon"),
        ("{body:a|uper}", 'column 1: unknown filter "uper"; did you mean "upper"?'),
        ("{body:a|}", 'unknown filter ""; known: date, default, json, lower, truncate, upper'),
        ("{body:a|upper:x}", 'the filter "upper" takes no argument'),
        ("{body:a|truncate}", 'the filter "truncate" needs an argument: truncate:…'),
        ("{body:a|truncate:x}", "truncate: expected a number of characters, such as truncate:80"),
        ("{body:a|truncate:0}", "expected a number of characters"),
        ("{body:a|date:%Q}", "date: %Q is not one of"),
        ("{body:a|date:%}", "date: % is not one of"),
        ("x" * (MOST_CHARACTERS + 1), "at most 65536 characters"),
    ],
)
def test_a_faulty_template_is_refused_with_its_column_and_a_hint(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{bdy:a}", "column 1: unknown placeholder {bdy:a}; did you mean {body}?"),
        ("{zzz}", "unknown placeholder {zzz}; known here: {body}, {header}, {method}; {{ is a brace"),
        ('{"a": 1}', 'unknown placeholder {"a":1}; known here: {body}, {header}, {method}; {{ is a brace'),
        ("x{header}", "column 2: {header} needs an argument: {header:…}"),
        ("{method:x}", "{method:x} takes no argument; write {method}"),
        ("{body|json}", 'the filter "json" does not work here; known here: upper'),
    ],
)
def test_a_user_names_the_placeholders_and_filters_that_it_knows(text, words):
    known = {"body": "either", "header": "argument", "method": "nothing"}
    with pytest.raises(ValueError, match=re.escape(words)):
        parse(text).check(known, frozenset({"upper"}))
    parse("{body}{body:a|upper}{header:x}{method}").check(known, frozenset({"upper"}))


def test_a_lone_placeholder_is_recognised():
    lone = parse("{body:a}").lone
    assert isinstance(lone, Placeholder)
    assert (lone.kind, lone.argument, lone.column) == ("body", "a", 1)
    assert parse("{body:a} ").lone is None
    assert parse("text").lone is None
    assert parse("").lone is None


HUGE = b"9" * 4000


@pytest.mark.parametrize(
    ("filters", "value", "result"),
    [
        ("upper", "straße", "STRASSE"),
        ("lower", True, "true"),
        ("upper", None, None),
        ("json", "a\nb", '"a\\nb"'),
        ("json", None, "null"),
        ("json", {"a": [1, 2.0]}, '{"a":[1,2.0]}'),
        ("json", msgspec.Raw(HUGE), HUGE.decode()),
        ("default:none", None, "none"),
        ("default:none", "", "none"),
        ("default:none", 0, 0),
        ("default:'a|b}'", None, "a|b}"),
        ("default:don't", None, "don't"),
        ("default:", None, ""),
        ("truncate:4", "abcd", "abcd"),
        ("truncate:4", "abcde", "abc…"),
        ("truncate:1", 12, "…"),
        ("default:abcdef|truncate:3|upper", None, "AB…"),
        ("date", 1_700_000_000, "2023-11-14T22:13:20Z"),
        ("date", "1700000000123", "2023-11-14T22:13:20Z"),
        ("date:%d.%m.%Y %H:%M", "2026-01-02T03:04:05.123456789+01:00", "02.01.2026 02:04"),
        ("date:%Y", msgspec.Raw(b"1700000000"), "2023"),
        ("date", None, None),
    ],
)
def test_filters_change_a_value(filters, value, result):
    assert parse(f"{{x|{filters}}}").lone.filtered(value) == result


@pytest.mark.parametrize(
    ("filters", "value"),
    [("upper", []), ("truncate:3", {"a": 1}), ("date", "yesterday"), ("date", 1e300), ("date", [])],
)
def test_a_filter_refuses_a_value_that_it_cannot_change(filters, value):
    with pytest.raises(ValueError, match="expected"):
        parse(f"{{x|{filters}}}").lone.filtered(value)


def test_more_filters_can_be_added():
    lone = parse("{x|twice}", {"twice": lambda value: value * 2}).lone
    assert lone.filtered("ab") == "abab"
    with pytest.raises(ValueError, match='did you mean "twice"'):
        parse("{x|twise}", {"twice": str})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"), (None, ""), (True, "true"), (False, "false"), (7, "7"), (1.50, "1.5"),
        (msgspec.Raw(HUGE), HUGE.decode()), (msgspec.Raw(b"1.50"), "1.50"), (msgspec.Raw(b'"\\u00e9"'), "é"),
        (msgspec.Raw(b"true"), "true"), (msgspec.Raw(b"null"), ""), (msgspec.Raw(b"-1e400"), "-1e400"),
    ],
)  # fmt: skip
def test_scalars_become_text_as_json_writes_them(value, text):
    assert text_of(value) == text


@pytest.mark.parametrize("value", [[], {}, msgspec.Raw(b"[1]"), msgspec.Raw(b"{}")])
def test_lists_and_objects_cannot_become_text(value):
    with pytest.raises(ValueError, match="expected text, a number, true or false, got a"):
        text_of(value)


@given(st.text(alphabet="{}ab:|'\". %", max_size=30))
def test_any_text_is_parsed_or_refused_with_a_sentence(text):
    try:
        template = parse(text)
    except ValueError as error:
        assert str(error).startswith("column ")  # noqa: PT017 - most texts are valid
    else:
        assert all(template.parts)


@given(st.text())
def test_doubled_braces_are_literal(text):
    assert parse(text.replace("{", "{{").replace("}", "}}")).parts == ((text,) if text else ())


@pytest.mark.parametrize(
    ("path", "value"),
    [("a.b", 1), ("a.'c.d'.0", 2), ('a."c.d".1', None), ("l.0", 3), ("l.'0'", None), ("l.1", None),
     ("a.n", None), ("a.b.c", None), ("x", None)],
)  # fmt: skip
def test_a_path_leads_to_a_value_or_nowhere(path, value):
    tree = {"a": {"b": 1, "c.d": [2], "n": None}, "l": [3]}
    assert find(tree, parse_path(path)) == value


@pytest.mark.parametrize("path", ["", ".", "a.", ".a", "a..b", "'a", "'a'b", "a'b'"])
def test_a_malformed_path_is_refused(path):
    with pytest.raises(ValueError, match="is not a path"):
        parse_path(path)
