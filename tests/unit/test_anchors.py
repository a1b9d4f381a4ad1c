"""No pattern of the relay accepts a line break at the end of a text."""

import ast
import re
from pathlib import Path

import msgspec
import pytest

from relay.base.clock import SECOND
from relay.base.ids import EVENT, new_id
from relay.base.units import parse_duration, parse_rate, parse_size
from relay.config import binding, validators
from relay.config.secrets import Url
from relay.errors import RelayError
from relay.store.export import read_line, write_line

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "relay").rglob("*.py"), *(ROOT / "plugins").glob("*.py")])
TAKING = {"compile", "search", "match", "fullmatch", "sub", "split", "findall", "finditer"}


def patterns(file):
    """Return every pattern that stands in a file as a literal."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        named = [word.value for word in node.keywords if word.arg == "pattern"]
        if isinstance(function, ast.Attribute) and function.attr in TAKING:
            owner = function.value
            if isinstance(owner, ast.Name) and owner.id == "re" and node.args:
                named.append(node.args[0])
        for each in named:
            if isinstance(each, ast.Constant) and isinstance(each.value, str | bytes):
                yield each.value, "MULTILINE" in ast.unparse(node)


def ends_before_a_line_break(parsed):
    """Return whether a parsed pattern has a `$`."""
    for operation, value in parsed:
        if str(operation) == "AT" and str(value) == "AT_END":
            return True
        parts = value if isinstance(value, tuple | list) else (value,)
        for part in parts:
            inner = part if isinstance(part, list) else [part]
            if any(type(each).__name__ == "SubPattern" and ends_before_a_line_break(each) for each in inner):
                return True
    return False


def test_the_detector_finds_a_dollar_at_every_position():
    for text in ("a$", "^(a|b$)", "(?:a$)?", "(?=x|$)", "(a(b$)*)+"):
        assert ends_before_a_line_break(re._parser.parse(text)), text
    for text in (r"a\Z", "[$]", r"\$", "a"):
        assert not ends_before_a_line_break(re._parser.parse(text)), text


def test_no_pattern_of_the_relay_ends_in_a_dollar():
    found = [(file, text, multi) for file in FILES for text, multi in patterns(file)]
    assert len(found) > 40
    wrong = [(str(file), text) for file, text, multi in found
             if not multi and ends_before_a_line_break(re._parser.parse(text))]  # fmt: skip
    assert wrong == []


def line(**changed):
    event = {
        "id": new_id(EVENT, SECOND),
        "source": "shop",
        "type": "shop.a",
        "received_at": "2026-01-01T00:00:00Z",
        "content_type": "application/json",
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "context": {},
        "data": {},
        "body": "{}",
        "traceparent": "00-a",
    }
    return msgspec.json.encode({**event, **changed})


@pytest.mark.parametrize("field", ["id", "source", "type", "content_type", "traceparent"])
def test_an_imported_line_has_no_line_break_at_the_end_of_a_field(field):
    whole = msgspec.json.decode(line())
    assert write_line(read_line(line()))
    more = {"type": "shop\n.a"} if field == "source" else {}
    with pytest.raises(RelayError):
        read_line(line(**{field: whole[field] + "\n", **more}))


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (validators.name, "crm"),
        (validators.prefix, "/acme"),
        (validators.header_name, "x-a"),
        (validators.listen, "127.0.0.1:80"),
        (validators.network, "10.0.0.0/8"),
        (lambda text: validators.url(Url(text)).reveal(), "http://a/b"),
        (validators.web_origin, "https://a"),
        (validators.pattern, "shop.*"),
        (lambda text: validators.storage(Url(text)).reveal(), "sqlite:relay.db"),
    ],
)
def test_a_value_of_config_toml_has_no_line_break_at_its_end(check, text):
    assert check(text) == text
    for end in ("\n", "\r\n", "\r"):
        with pytest.raises(ValueError, match=r"."):
            check(text + end)


def test_a_pattern_of_a_plugin_setting_does_not_match_before_a_line_break():
    meta = msgspec.Meta(pattern="^[a-z]+$")
    binding.within(meta, "abc")
    with pytest.raises(ValueError, match="must match"):
        binding.within(meta, "abc\n")
    binding.within(msgspec.Meta(pattern=r"^[a-z\n]+$"), "abc\n")


# --- numbers with units that are too large ------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["9999999999d", f"{'9' * 400}d", "36501d", "3e9d", "100000000w", "50000d50000d"]
)
def test_a_duration_of_more_than_a_century_is_refused(text):
    with pytest.raises(ValueError, match=r"100 years|expected a duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", [f"{'9' * 400} KiB", "9999999999 GiB"])
def test_a_size_of_more_than_any_disk_is_refused(text):
    with pytest.raises(ValueError, match="larger than any disk"):
        parse_size(text)


@pytest.mark.parametrize("text", [f"{'9' * 5000}/s", "9999999999/s", f"1/{'9' * 400}h", "00/s", "1/00s"])
def test_an_absurdly_high_rate_is_refused(text):
    with pytest.raises(ValueError, match="rate"):
        parse_rate(text)
