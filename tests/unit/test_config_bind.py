"""A record is filled by the types of its fields, and everything wrong is reported at once."""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from relay.base.units import Duration, Rate, Size
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.problems import ConfigError, Problem, SettingError, dotted
from relay.config.secrets import Secret, Secrets


class Inner(msgspec.Struct, frozen=True, kw_only=True):
    depth: int = 1
    note: str = ""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    wait: Duration = 1.0
    room: Size = 1
    pace: Rate | None = None
    key: Secret | None = None
    tokens: Secrets = Secrets()
    place: Path | None = None
    on: bool = False
    count: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1
    share: float = 0.5
    word: str = ""
    mode: Literal["full", "normal"] = "full"
    level: Literal[1, 2] = 1
    names: tuple[str, ...] = ()
    waits: tuple[Annotated[Duration, msgspec.Meta(gt=0)], ...] = ()
    places: dict[str, Path] = {}
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    free: Any = None
    odd: set[str] = msgspec.field(default_factory=set)
    short: Annotated[str, msgspec.Meta(max_length=3, pattern="^[a-z]*$")] = ""


def binder_of(tmp_path, text, **environ):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return Binder(read(path), environ)


def bind(tmp_path, text, type_=Record, **environ):
    binder = binder_of(tmp_path, text, **environ)
    record = binder.struct(type_, binder.document.data, ())
    assert binder.problems == []
    return record


def problems(tmp_path, text, type_=Record, **environ):
    binder = binder_of(tmp_path, text, **environ)
    binder.struct(type_, binder.document.data, ())
    return [f"{problem.line}: {problem.key}: {problem.problem}" for problem in sorted(binder.problems)]


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ('wait = "1h30m"', "wait", 5400.0),
        ('room = "2 MiB"', "room", 2_097_152),
        ('pace = "50/s"', "pace", Rate(50, 1)),
        ("on = true", "on", True),
        ("count = 9", "count", 9),
        ("share = 1", "share", 1.0),
        ("share = 0.25", "share", 0.25),
        ('word = "x"', "word", "x"),
        ('mode = "normal"', "mode", "normal"),
        ("level = 2", "level", 2),
        ('names = ["a", "b"]', "names", ("a", "b")),
        ('waits = ["5s", "5m"]', "waits", (5.0, 300.0)),
        ("inner = { depth = 2 }", "inner", Inner(depth=2)),
        ("inner.note = 'x'", "inner", Inner(note="x")),
        ("[[inners]]\ndepth = 3\n[[inners]]", "inners", (Inner(depth=3), Inner())),
        ("free = [{ a = 1 }]", "free", [{"a": 1}]),
        ("", "wait", 1.0),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(tmp_path, text, field, value):
    found = getattr(bind(tmp_path, text), field)
    assert found == value
    assert type(found) is type(value)


def test_paths_are_relative_to_the_config_file(tmp_path):
    record = bind(tmp_path, 'place = "x/y"\nplaces = { a = "b", c = "/d" }')
    assert record.place == tmp_path / "x/y"
    assert record.places == {"a": tmp_path / "b", "c": Path("/d")}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("wait = 15", '1: wait: expected a duration such as "15s", got 15'),
        ('wait = "soon"', '1: wait: expected a duration such as "90s", got "soon"'),
        ('wait = "99999999999d"', '1: wait: longer than 100 years: "99999999999d"'),
        ("wait = true", '1: wait: expected a duration such as "90s", got true'),
        ("room = 5", '1: room: expected a size such as "2 MiB", got 5'),
        (f'room = "{"9" * 400} GB"', "1: room: larger than any disk"),
        ('room = "99999999 TB"', '1: room: larger than any disk: "99999999 TB"'),
        ('pace = "0/s"', '1: pace: expected a rate such as "50/s", got "0/s"'),
        ("on = 1", "1: on: expected true or false, got 1"),
        ("count = true", "1: count: expected a whole number, got true"),
        ("count = 1.5", "1: count: expected a whole number, got 1.5"),
        ("count = 0", "1: count: must be at least 1, got 0"),
        ("count = 10", "1: count: must be at most 9, got 10"),
        ("share = nan", "1: share: expected a finite number, got NaN"),
        ("share = 'x'", '1: share: expected a number, got "x"'),
        (f"share = 1{'0' * 400}", "1: share: expected a number, got 1000"),
        ("word = 1979-05-27", "1: word: expected a string, got 1979-05-27"),
        ("place = ''", '1: place: expected a path, got ""'),
        ('place = "a\\n"', '1: place: expected a path, got "a\\n"'),
        ("mode = 'ful'", '1: mode: expected "full" or "normal", got "ful"'),
        ("level = true", "1: level: expected 1 or 2, got true"),
        ("names = 'a'", "1: names: expected a list, got a string"),
        ("names = [\n'a',\n5]", "3: names[1]: expected a string, got 5"),
        ("waits = ['5s', '0s']", "1: waits[1]: must be more than 0"),
        ("places = []", "1: places: expected a table, got a list"),
        ("inner = 5", "1: inner: expected a table, got 5"),
        ("[inner]\ndeph = 2", '2: inner.deph: unknown key, did you mean "depth"?'),
        ("[inner]\nxyz = 2", "2: inner.xyz: unknown key; known here: depth, note"),
        ("[[inners]]\n[[inners]]\ndepth = 'x'", '3: inners[1].depth: expected a whole number, got "x"'),
        ("short = 'abcd'", "1: short: must have at most 3"),
        ("short = '1'", "1: short: must match ^[a-z]*$"),
        ("odd = ['x']", "1: odd: config.toml cannot express this type: set[str]"),
        (f"mode = '{'x' * 100}'", '1: mode: expected "full" or "normal", got "xxx'),
    ],
)
def test_a_wrong_value_is_a_problem_at_its_line(tmp_path, text, problem):
    (found,) = problems(tmp_path, text)
    assert found.startswith(problem)
    assert len(found) < 160


def test_a_record_with_an_invalid_value_is_not_built(tmp_path):
    binder = binder_of(tmp_path, "inner = { depth = 'x' }")
    assert binder.struct(Record, binder.document.data, ()) is None


def test_every_problem_is_reported_at_once(tmp_path):
    assert len(problems(tmp_path, "wait = 1\nroom = 1\nwurd = 1\ninner = { depth = '', x = 1 }")) == 5


def test_a_missing_key_is_reported_at_its_table(tmp_path):
    class Strict(msgspec.Struct, kw_only=True):
        url: str

    class Outer(msgspec.Struct, kw_only=True):
        inner: Strict

    assert problems(tmp_path, "\n[inner]\n", Outer) == ["2: inner.url: missing; it has no default"]
    assert problems(tmp_path, "\n", Outer) == ["1: inner: missing; it has no default"]


def test_a_record_that_rejects_its_values_is_a_problem_at_its_key(tmp_path):
    class Pair(msgspec.Struct, kw_only=True):
        low: int = 0
        high: int = 9

        def __post_init__(self):
            if self.low > self.high:
                raise ValueError("low is above high")

    class Outer(msgspec.Struct, kw_only=True):
        pair: Pair = msgspec.field(default_factory=Pair)

    assert problems(tmp_path, "\npair = { low = 10 }", Outer) == ["2: pair: low is above high"]


def test_a_record_reports_several_faults_at_their_keys(tmp_path):
    class Faulty(msgspec.Struct, kw_only=True):
        paths: tuple[str, ...] = ()
        word: str = ""

        def __post_init__(self):
            faults = [SettingError("begins without a slash", "paths", 1), ValueError("too short")]
            raise ExceptionGroup("faults", [*faults, KeyError("x")])

    class Outer(msgspec.Struct, kw_only=True):
        inner: Faulty | None = None

    text = '[inner]\npaths = [\n"/a",\n"b"\n]'
    assert problems(tmp_path, text, Outer) == [
        "1: inner: KeyError: 'x'",
        "1: inner: too short",
        "4: inner.paths[1]: begins without a slash",
    ]


class Forms(msgspec.Struct, frozen=True, kw_only=True):
    paths: str | tuple[str, ...] = ()
    verify: Literal["none", "bearer"] | Inner | None = None
    tables: str | dict[str, str] = ""
    bounded: Annotated[str, msgspec.Meta(min_length=1)] | tuple[int, ...] = "x"


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ('paths = "/a"', "paths", "/a"),
        ('paths = ["/a", "/b"]', "paths", ("/a", "/b")),
        ('verify = "bearer"', "verify", "bearer"),
        ("verify = { depth = 2 }", "verify", Inner(depth=2)),
        ('tables.a = "b"', "tables", {"a": "b"}),
        ("bounded = [1]", "bounded", (1,)),
    ],
)
def test_the_toml_type_of_a_value_selects_the_type_of_a_union(tmp_path, text, field, value):
    assert getattr(bind(tmp_path, text, Forms), field) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("paths = 1", "1: paths: expected a string, got 1"),
        ("paths = [1]", "1: paths[0]: expected a string, got 1"),
        ('verify = "non"', '1: verify: expected "none" or "bearer", got "non"'),
        ("verify = { deep = 1 }", '1: verify.deep: unknown key, did you mean "depth"?'),
        ('bounded = ""', "1: bounded: must not be empty"),
    ],
)
def test_an_invalid_value_of_a_union_is_a_problem_of_the_selected_type(tmp_path, text, problem):
    assert problems(tmp_path, text, Forms) == [problem]


def test_preset_values_complete_a_nested_record(tmp_path):
    binder = binder_of(tmp_path, "inner = { depth = 5 }")
    given = {"inner": Inner(depth=3, note="kept"), "count": 7}
    record = binder.struct(Record, binder.document.data, (), given=given)
    assert record is not None
    assert record.inner == Inner(depth=5, note="kept")
    assert record.count == 7


def test_a_hidden_field_is_not_a_key(tmp_path):
    binder = binder_of(tmp_path, "word = 'x'\nfoo = 1\nfoz = 2")
    values = binder.fields(
        Record, binder.document.data, (), given={"word": "given"}, hidden={"word"}, others={"foo"}
    )
    assert values == {"word": "given"}
    assert [problem.key for problem in binder.problems] == ["word", "foz"]
    assert binder.problems[1].problem == 'unknown key, did you mean "foo"?'


def test_secrets_are_kept_as_digests_with_scopes_and_names(tmp_path):
    text = """
    tokens = [
      { env = "ONE" },
      { secret = { env = "TWO" }, scopes = ["events:write"], name = "shop" },
    ]
    """
    record = bind(tmp_path, text, ONE=" first ", TWO="second")
    first, second = record.tokens.find(b"first"), record.tokens.find(b"second")
    assert first.scopes is None
    assert (second.scopes, second.name) == (frozenset({"events:write"}), "shop")
    assert record.tokens.find(b"third") is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tokens = 'hush'", "1: tokens: expected a list of secrets, got a string"),
        ("tokens = [\n'hush']", "2: tokens[0]: a literal secret needs `development = true`"),
        ("tokens = [{ secret = 'hush' }]", "1: tokens[0].secret: a literal secret needs"),
        ("tokens = [{ env = 'GONE' }]", "1: tokens[0]: the environment variable GONE is not set"),
        (
            "tokens = [{ secret = { env = 'SET' }, scope = ['x'] }]",
            "1: tokens[0].scope: unknown key, did you",
        ),
        (
            "tokens = [{ secret = { env = 'SET' }, scopes = [''] }]",
            "1: tokens[0].scopes[0]: must not be empty",
        ),
        ("tokens = [{ name = 'x' }]", "1: tokens[0].secret: missing"),
        ("key = 'hush'", "1: key: a literal secret needs"),
        ("key = ['hush']", "1: key: expected { env"),
    ],
)
def test_a_wrong_secret_is_a_problem_that_does_not_show_it(tmp_path, text, problem):
    (found,) = problems(tmp_path, text, SET="hush")
    assert found.startswith(problem)
    assert "hush" not in found


def test_a_bound_record_prints_no_secret(tmp_path):
    record = bind(tmp_path, 'key = { env = "KEY" }\ntokens = [{ env = "KEY" }]', KEY="hush")
    assert record.key.reveal() == "hush"
    assert "hush" not in repr(record)
    assert "hush" not in f"{record} {record.key} {record.tokens}"
    with pytest.raises(TypeError):
        msgspec.json.encode(record)


def test_values_in_place_of_tables_are_reported(tmp_path):
    binder = binder_of(tmp_path, "sources = 5\n[destinations]\ncrm = 'x'\n[destinations.erp]\n")
    assert binder.tables("sources") == {}
    assert binder.tables("destinations") == {"erp": {}}
    assert [str(problem.key) for problem in binder.problems] == ["sources", "destinations.crm"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("a", "b"), "a.b"),
        (("a", 0, "b"), "a[0].b"),
        (("a.b", ""), '"a.b".""'),
        (("where", "ü"), 'where."ü"'),
        ((), ""),
    ],
)
def test_a_path_is_written_as_in_toml(path, text):
    assert dotted(path) == text


def test_an_error_lists_each_problem_once_in_the_order_of_the_file():
    late, early = Problem("f", 10, "k", "late"), Problem("f", 9, "k", "early")
    assert str(ConfigError([late, early, late])) == "f:9: k: early\nf:10: k: late"
