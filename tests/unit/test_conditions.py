import json
import re
import tomllib
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_event

from relay.routing.conditions import Mismatch, compile_conditions
from relay.routing.envelope import EnvelopeView


def view(data=b"{}", context=b"{}", subject=None):
    return EnvelopeView(
        make_event(
            type="adorn.attire.sold",
            subject=subject,
            data=data if isinstance(data, bytes) else json.dumps(data).encode(),
            context=context,
        )
    )


def where(toml):
    """Compile the TOML value of `where =`."""
    return compile_conditions(tomllib.loads(f"where = {toml}")["where"])


def holds(condition, value):
    """Return whether one value meets one condition, given as TOML."""
    return where(f'{{ "data.v" = {condition} }}').matches(view(b'{"v":' + value.encode() + b"}"))


@pytest.mark.parametrize(
    ("condition", "met_by", "not_met_by"),
    [
        ("true", ["true"], ["false", "1", '"true"', "null", "[]", "{}"]),
        ("false", ["false"], ["true", "0", '""', "null"]),
        ("1", ["1", "1.0", "1e0"], ["true", '"1"', "2", "[1]", "null"]),
        ("0", ["0", "-0", "0.0"], ["false", "null", '""']),
        ("45000.0", ["45000", "45000.00", "4.5e4"], ["45000.01", '"45000.00"']),
        ("9007199254740993", ["9007199254740993"], ["9007199254740992", "9007199254740992.0"]),
        ('"a"', ['"a"', '"\\u0061"'], ['"A"', '["a"]', "null"]),
        ('""', ['""'], ["null", "0", "false"]),
        ("[1, true, 'a']", ['[1.0, true, "a"]'], ['[1, 1, "a"]', "[1, true]", '[1, true, "a", null]', "1"]),
        ("[]", ["[]"], ["{}", "null", "[null]"]),
        ("{ in = [1, 'a', true] }", ["1", "1.0", '"a"', "true"], ['"1"', "false", "0", "null", "[1]"]),
        ("{ in = [[1], 2] }", ["[1]", "2"], ["1", "[2]"]),
        ("{ prefix = 'ab' }", ['"ab"', '"abc"'], ['"Abc"', '"cab"', "12", '["ab"]', "null"]),
        ("{ suffix = '.pdf' }", ['".pdf"', '"a.pdf"'], ['"a.PDF"', '"a.pdf "', "1", "null"]),
        ("{ glob = 'a*[0-9]' }", ['"a1"', '"a.b\\n.2"'], ['"a"', '"b1"', '"A1"', '"a1\\n"', "1", "null"]),
        ("{ gte = 100 }", ["100", "100.0", "1e3", "9" * 30, "1e400"], ["99.99", '"100"', "true", "null"]),
        ("{ gt = 100 }", ["100.01", "9" * 5000], ["100", '"a"', "-1e400"]),
        ("{ lte = 0.5 }", ["0.5", "0", "-1"], ["0.51", "false", '""', "null"]),
        ("{ lt = 0 }", ["-1", "-0.01"], ["0", "-0", "false"]),
        ("{ gt = 9007199254740992.0 }", ["9007199254740993"], ["9007199254740992"]),
        ("{ gte = 'b', lt = 'd' }", ['"b"', '"cz"'], ['"a"', '"d"', "3", "null"]),
        ("{ gte = 1, lt = 5 }", ["1", "4.9"], ["0", "5"]),
        ("{ exists = true }", ["0", "false", '""', "[]", "{}"], ["null"]),
        ("{ exists = false }", ["null"], ["0", "false", '""', "[]", "{}"]),
        ("{ not = true }", ["false", "1", "null", '"true"'], ["true"]),
        ("{ not = { prefix = 'test-' } }", ['"live-1"', "1", "null"], ['"test-1"']),
        ("{ not = { gte = 1, lt = 5 } }", ["0", "5", '"x"', "null"], ["1", "4"]),
        ("{ not = { not = 1 } }", ["1"], ["2", "null"]),
        ("{ not = { in = ['a'] }, exists = true }", ['"b"', "1"], ['"a"', "null"]),
    ],
)
def test_conditions_compare_json_values(condition, met_by, not_met_by):
    assert [value for value in met_by if not holds(condition, value)] == []
    assert [value for value in not_met_by if holds(condition, value)] == []


def test_an_absent_value_meets_only_exists_false_and_not():
    absent = view({"other": 1})
    for condition in (
        "true",
        "0",
        "''",
        "{ in = [1] }",
        "{ glob = '*' }",
        "{ gte = 0 }",
        "{ exists = true }",
    ):
        assert not where(f'{{ "data.v" = {condition} }}').matches(absent)
    for condition in ("{ exists = false }", "{ not = 1 }", "{ not = { glob = '*' } }"):
        assert where(f'{{ "data.v" = {condition} }}').matches(absent)


def test_a_table_matches_if_all_its_conditions_hold():
    both = where('{ "data.sold" = true, "context.store_id" = "st_9" }')
    assert both.matches(view({"sold": True}, b'{"store_id":"st_9"}'))
    assert not both.matches(view({"sold": False}, b'{"store_id":"st_9"}'))
    assert not both.matches(view({"sold": True}, b'{"store_id":"st_8"}'))


def test_a_list_matches_if_one_of_its_tables_does():
    either = where(
        '[{ "data.sold" = true }, { "subject" = { prefix = "vip-" }, "data.total" = { gte = 5 } }]'
    )
    assert either.matches(view({"sold": True}))
    assert either.matches(view({"total": 5}, subject="vip-1"))
    assert not either.matches(view({"total": 4}, subject="vip-1"))
    assert not either.matches(view({"total": 5}, subject="s-1"))


def test_timestamps_compare_as_text():
    assert where('{ "timestamp" = { gte = "2023-11-14", lt = "2023-11-15" } }').matches(view())
    assert not where('{ "timestamp" = { gte = "2023-11-15" } }').matches(view())


def test_misses_are_listed_per_alternative_and_condition():
    either = where('[{ "data.sold" = true, "data.total" = { gte = 100, lt = 500 } }, { "subject" = "s-1" }]')
    assert either.misses(view({"sold": False, "total": 500}, subject="s-2")) == (
        (
            Mismatch(path="data.sold", expected="true", found="false"),
            Mismatch(path="data.total", expected="< 500", found="500"),
        ),
        (Mismatch(path="subject", expected='"s-1"', found='"s-2"'),),
    )
    assert either.misses(view({"sold": False}, subject="s-1"))[1] == ()


@pytest.mark.parametrize(
    ("condition", "value", "line"),
    [
        ("true", "null", "data.v is absent, expected true"),
        ("'é'", '"è"', 'data.v is "è", expected "é"'),
        ("[1, 'a']", "[1]", 'data.v is a list of 1, expected [1, "a"]'),
        ("{ in = [1, 'a'] }", "2", 'data.v is 2, expected one of 1, "a"'),
        ("{ prefix = 'a' }", '"b\\n"', 'data.v is "b\\n", expected text that starts with "a"'),
        ("{ suffix = 'a' }", "{}", 'data.v is an object of 0, expected text that ends with "a"'),
        ("{ glob = 'a*' }", "1.50", 'data.v is 1.5, expected text like "a*"'),
        ("{ gt = 1.5 }", r'"\ud800"', r'data.v is "\\ud800", expected > 1.5'),
        ("{ exists = true }", "null", "data.v is absent, expected any value"),
        ("{ exists = false }", "0", "data.v is 0, expected absent"),
        ("{ not = { gte = 1, lt = 5 } }", "3", "data.v is 3, expected not (>= 1 and < 5)"),
        ("1", f'"{"x" * 500}"', f'data.v is "{"x" * 118}…, expected 1'),
    ],
)
def test_a_mismatch_is_one_line_that_can_be_stored(condition, value, line):
    shown = view(b'{"v":' + value.encode() + b"}")
    ((miss,),) = where(f'{{ "data.v" = {condition} }}').misses(shown)
    assert str(miss) == line
    assert str(miss).encode()


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("true", "expected a table of conditions, or a list of such tables"),
        ("[]", "expected a table of conditions, or a list of such tables"),
        ("[1]", "expected a table of conditions, or a list of such tables"),
        ("{}", "a table without conditions matches every event; remove it"),
        ('[{ "data.v" = 1 }, {}]', "a table without conditions"),
        ('{ "sale_made" = true }', 'did you mean "data.sale_made"?'),
        ('{ "data.v" = {} }', "data.v: expected a value or a table of in, prefix"),
        ('{ "data.v" = { prefx = "a" } }', 'data.v: unknown operator "prefx"; did you mean "prefix"?'),
        (
            '{ "data.v" = { ">" = 1 } }',
            'data.v: unknown operator ">"; use in, prefix, suffix, glob, gte',
        ),
        ("{ data.sale_made = true }", 'data: unknown operator "sale_made"; use in, prefix'),
        ("{ data.sale_made = true }", 'for a nested field quote the whole path, as in "data.total"'),
        ('{ "data.v" = { in = "a" } }', "data.v: in: expected a list of values"),
        ('{ "data.v" = { in = [] } }', "data.v: in: expected a list of values"),
        ('{ "data.v" = { in = [{ prefix = "a" }] } }', "data.v: in: expected text, a number, true, false"),
        ('{ "data.v" = { prefix = 1 } }', "data.v: prefix: expected text"),
        ('{ "data.v" = { glob = ["a"] } }', "data.v: glob: expected text"),
        ('{ "data.v" = { gte = true } }', "data.v: gte: expected a number or text"),
        ('{ "data.v" = { gte = nan } }', "data.v: gte: expected a number or text"),
        ('{ "data.v" = { lt = [1] } }', "data.v: lt: expected a number or text"),
        ('{ "data.v" = { exists = "yes" } }', "data.v: exists: expected true or false"),
        (
            '{ "data.v" = { not = { gtee = 1 } } }',
            'data.v: not: unknown operator "gtee"; did you mean "gte"?',
        ),
        ('{ "data.v" = nan }', "data.v: expected text, a number, true, false or a list of these"),
        ('{ "data.v" = 2023-11-14 }', "data.v: expected text, a number, true, false or a list of these"),
    ],
)
def test_an_invalid_condition_is_reported_with_its_path(toml, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        where(toml)
    assert "\n" not in str(caught.value)


def test_a_toml_date_is_refused_everywhere():
    for value in (datetime(2023, 11, 14, tzinfo=UTC), [datetime(2023, 11, 14, tzinfo=UTC)]):
        with pytest.raises(ValueError, match="expected text"):
            compile_conditions({"timestamp": value})


scalars = (
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4)
)
literals = scalars | st.lists(scalars, max_size=3)
operators = st.fixed_dictionaries(
    {},
    optional={
        "in": st.lists(literals, min_size=1, max_size=3),
        "prefix": st.text(max_size=2),
        "suffix": st.text(max_size=2),
        "glob": st.text("a*?b", max_size=3),
        "gte": st.integers(-3, 3) | st.text(max_size=2),
        "lt": st.integers(-3, 3) | st.floats(-3, 3),
        "exists": st.booleans(),
        "not": literals,
    },
).filter(bool)
tables = st.dictionaries(st.sampled_from(["data.a", "data.b", "subject"]), literals | operators, min_size=1)
wheres = tables | st.lists(tables, min_size=1, max_size=3)
objects = st.fixed_dictionaries({}, optional={"a": st.none() | literals, "b": literals})


@settings(max_examples=50)
@given(value=wheres, data=objects, subject=st.none() | st.text(max_size=3))
def test_misses_agree_with_matches(value, data, subject):
    compiled, shown = compile_conditions(value), view(data, subject=subject)
    assert compiled.matches(shown) is any(not misses for misses in compiled.misses(shown))


@given(table=tables, data=objects)
def test_a_list_of_one_table_equals_the_table(table, data):
    assert compile_conditions(table).matches(view(data)) is compile_conditions([table]).matches(view(data))


@given(literal=literals, data=objects)
def test_not_negates_every_literal(literal, data):
    plain, turned = compile_conditions({"data.a": literal}), compile_conditions({"data.a": {"not": literal}})
    assert plain.matches(view(data)) is not turned.matches(view(data))


@given(left=literals, right=literals)
def test_a_literal_matches_equal_json_values(left, right):
    """Compare two JSON texts in one canonical form, in which whole floats are integers."""
    equal = json.dumps(canonical(left)) == json.dumps(canonical(right))
    assert compile_conditions({"data.a": left}).matches(view({"a": right})) is equal


def canonical(value):
    if isinstance(value, list):
        return [canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
