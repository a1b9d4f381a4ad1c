"""JSON Schemas of the data of events: accepted and refused data, and faults that stop the start."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path

import msgspec
import pytest

from relay.config.problems import ConfigError
from relay.errors import Invalid
from relay.plugin_loading.loader import load
from relay.schemas import Schemas

USER = {
    "type": "object",
    "$defs": {"item": {"type": "object", "properties": {"quantity": {"type": "integer"}}}},
    "properties": {"email": {"type": "string"}, "items": {"items": {"$ref": "#/$defs/item"}}},
    "required": ["email"],
}


def written(folder: Path, schema: object, name: str = "user.created.json") -> Path:
    """Write a schema; text is written as it is."""
    path = folder / name
    path.write_bytes(schema.encode() if isinstance(schema, str) else msgspec.json.encode(schema))
    return path


def with_schema(folder: Path, schema: object) -> Schemas:
    schemas = Schemas("payload")
    schemas.add("user.created", written(folder, schema))
    return schemas


def test_data_that_satisfies_its_schema_is_accepted(tmp_path):
    schemas = with_schema(tmp_path, USER)
    schemas.check("user.created", b'{"email": "a@b", "items": [{"quantity": 2.0}], "total": 50.00}')


@pytest.mark.parametrize(
    ("payload", "field", "issue"),
    [
        ("{}", "payload", "'email' is a required property"),
        ('{"email": 5}', "payload.email", "5 is not of type 'string'"),
        (
            '{"email": "a", "items": [{}, {"quantity": "x"}]}',
            "payload.items[1].quantity",
            "'x' is not of type 'integer'",
        ),
        ('{"email": "a", "n": 1e999}', "payload", "too deep or too large to check"),
    ],
)
def test_data_that_violates_its_schema_is_refused_with_the_path(tmp_path, payload, field, issue):
    schemas = with_schema(tmp_path, USER)
    with pytest.raises(Invalid) as caught:
        schemas.check("user.created", payload.encode())
    assert (caught.value.field, caught.value.issue) == (field, issue)


def test_a_long_schema_error_is_shortened(tmp_path):
    schemas = with_schema(tmp_path, USER)
    with pytest.raises(Invalid) as caught:
        schemas.check("user.created", f'{{"email": [{"1," * 900}1]}}'.encode())
    assert len(caught.value.issue) == 300


def test_deep_data_is_refused_by_a_recursive_schema(tmp_path):
    schemas = with_schema(tmp_path, {"items": {"$ref": "#"}, "properties": {"n": {"$ref": "#"}}})
    with pytest.raises(Invalid) as caught:
        schemas.check("user.created", b'{"n": ' + b"[" * 400 + b"]" * 400 + b"}")
    assert caught.value.issue == "too deep or too large to check"


def test_the_exact_type_counts_before_the_first_pattern_that_fits(tmp_path):
    never, number, text = (
        written(tmp_path, schema, f"{n}.json")
        for n, schema in enumerate([{"not": {}}, {"type": "number"}, {"type": "string"}])
    )
    schemas = Schemas()
    for type_, path in {"order.*": never, "order.paid": number, "*": text}.items():
        schemas.add(type_, path)
    schemas.check("order.paid", b"1")
    schemas.check("other", b'"text"')
    for type_, data in (("order.sent", b"1"), ("order.paid", b'"text"'), ("other", b"1")):
        with pytest.raises(Invalid):
            schemas.check(type_, data)


def test_other_types_have_no_schema(tmp_path):
    with_schema(tmp_path, USER).check("user.deleted", b"{}")


@pytest.mark.parametrize(
    ("data", "is_unique"),
    [
        ('[1, true, "1", [1], [true], {"a": 1}, {"a": true}, null, "array", {}, []]', True),
        ("[1, 1.0]", False),
        ('[{"a": [1], "b": 2}, {"b": 2.0, "a": [1.0]}]', False),
        ("[[], []]", False),
        ("[null, null]", False),
        ('"aa"', True),
    ],
)
@pytest.mark.parametrize("draft", ["2019-09/schema", "2020-12/schema"])
def test_items_of_a_list_can_have_to_be_unique(tmp_path, data, is_unique, draft):
    schema = {
        "$schema": f"https://json-schema.org/draft/{draft}",
        "uniqueItems": True,
        "properties": {"inner": {"$ref": "#"}},
    }
    schemas = with_schema(tmp_path, schema)
    for text in (data, f'{{"inner": {data}}}'):
        with nullcontext() if is_unique else pytest.raises(Invalid):
            schemas.check("user.created", text.encode())


def test_a_long_list_of_unique_objects_is_checked_in_linear_time(tmp_path):
    schemas = with_schema(tmp_path, {"$ref": "#/$defs/list", "$defs": {"list": {"uniqueItems": True}}})
    began = time.perf_counter()
    schemas.check("user.created", msgspec.json.encode([{"a": n} for n in range(30_000)]))
    assert time.perf_counter() - began < 10  # jsonschema alone takes half an hour


@pytest.mark.parametrize(
    ("schema", "data"),
    [
        (
            {"patternProperties": {"^x": True}, "unevaluatedProperties": False},
            {f"x{n}": n for n in range(60_000)},
        ),
        (
            {"$ref": "#/$defs/list", "$defs": {"list": {"items": True}}, "unevaluatedItems": False},
            [0] * 60_000,
        ),
    ],
)
def test_unevaluated_members_are_checked_up_to_a_limit(tmp_path, schema, data):
    schemas = with_schema(tmp_path, schema)
    few = dict([*data.items()][:2000]) if isinstance(data, dict) else data[:2000]
    schemas.check("user.created", msgspec.json.encode(few))
    began = time.perf_counter()
    with pytest.raises(Invalid, match="not valid") as caught:
        schemas.check("user.created", msgspec.json.encode(data))
    assert caught.value.issue == "too deep or too large to check"
    assert time.perf_counter() - began < 10  # jsonschema takes a minute


def test_schemas_are_equal_if_their_files_had_the_same_content(tmp_path):
    before, same = with_schema(tmp_path, USER), with_schema(tmp_path, USER)
    assert (before, hash(before)) == (same, hash(same))
    assert before != with_schema(tmp_path, {})


def test_the_json_schema_draft_of_a_schema_is_used(tmp_path):
    tuple_of_integers = {
        "properties": {"pair": {"items": [{"type": "integer"}]}}
    }  # `items` lists are draft 7
    schema = {"$schema": "http://json-schema.org/draft-07/schema#"} | tuple_of_integers
    schemas = with_schema(tmp_path, schema)
    with pytest.raises(Invalid):
        schemas.check("user.created", b'{"pair": ["x"]}')


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ("{", "not a JSON object: Input data was truncated"),
        ("[]", "not a JSON object: Expected `object`, got `array`"),
        ({"type": 5}, "not a JSON Schema: $.type: 5 is not valid under any of the given schemas"),
        ({"$ref": "#/$defs/none"}, "the target of $ref does not exist: /$defs/none"),
        ({"$dynamicRef": "#none"}, "the target of $ref does not exist: none"),
        ({"pattern": "("}, "not a JSON Schema: $.pattern: '(' is not a 'regex'"),
        (
            {"properties": {"a": {"$ref": "https://example.com/schema"}}},
            "the target of $ref does not exist: https://example.com/schema",
        ),
    ],
)
def test_a_broken_schema_stops_the_start_and_names_its_line_and_file(tmp_path, schema, complaint):
    path = written(tmp_path, schema)
    config = tmp_path / "config.toml"
    config.write_text(
        "[sources.adorn]\nplugin = 'adorn'\n[sources.adorn.schemas]\n'image.*' = 'user.created.json'\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(config, {})
    [problem] = caught.value.problems
    assert str(problem) == f'{config}:4: sources.adorn.schemas."image.*": {path}: {complaint}'


def test_a_missing_schema_file_stops_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: No such file or directory"):
        Schemas().add("a", tmp_path / "none.json")


def test_schemas_without_the_library_have_a_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ValueError, match=r"-m pip install jsonschema$"):
        with_schema(tmp_path, USER)
