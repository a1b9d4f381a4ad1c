"""The JSON Schema of config.toml accepts what the relay accepts and refuses common mistakes."""

import re
import tomllib
from pathlib import Path

import msgspec
import pytest
from jsonschema import Draft7Validator

from relay.cli.config import kinds_of
from relay.config.json_schema import SCHEMA, json_schema
from relay.plugin_loading.loader import discover

ROOT = Path(__file__).parents[2]
VALIDATOR = Draft7Validator(msgspec.json.decode(SCHEMA.read_bytes()))
REWRITE = "run `make docs` to rewrite the schema, and read the difference"
SOURCE = '[sources.a]\nplugin = "moddy"\ntokens = [{ env = "T" }]\n'
DESTINATION = '[destinations.a]\nurl = "https://a.example"\n'


def rendered():
    """Return the schema for the bundled kinds of source, as the file has it."""
    kinds = kinds_of(discover(())[0].kinds.values())
    return msgspec.json.format(msgspec.json.encode(json_schema(kinds)), indent=1) + b"\n"


def blocks():
    """Yield every complete example of the pages, with its page."""
    for page in sorted((ROOT / "docs").glob("**/*.md")):
        for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
            if re.search(r"^\[(sources|destinations|server|retention)\b", block, re.MULTILINE):
                yield pytest.param(block, id=f"{page.stem}: {block.splitlines()[0][:40]}")


def problems(text):
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in VALIDATOR.iter_errors(tomllib.loads(text))
    ]


def test_the_schema_is_generated():
    assert SCHEMA.read_bytes() == rendered(), REWRITE


def test_the_schema_is_valid():
    Draft7Validator.check_schema(VALIDATOR.schema)


@pytest.mark.parametrize("file", ["config.toml", "relay/cli/templates/config.toml"])
def test_the_files_of_the_project_satisfy_the_schema(file):
    assert problems((ROOT / file).read_text()) == []


@pytest.mark.parametrize("block", list(blocks()))
def test_the_examples_of_the_pages_satisfy_the_schema(block):
    missing = re.compile(r"'\w+' is a required property")  # some examples show only a part of a table
    assert [each for each in problems(block) if not missing.search(each)] == []


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[server]\nlistn = 'x'", "server"),
        ("[server]\nmax_body = 5", "server.max_body"),
        ("[log]\nlevel = 'loud'", "log.level"),
        ("[sources.a]\nprefix = '/x'", "sources.a"),
        (SOURCE + "tokenz = 1", "sources.a"),
        (SOURCE.replace("tokens", "#"), "sources.a"),
        (SOURCE.replace("env", "envi"), "sources.a.tokens.0"),
        ("[sources.'A b']\nplugin = 'adorn'", "sources"),
        (DESTINATION + "method = 'GET'", "destinations.a.method"),
        (DESTINATION + "concurrency = 0", "destinations.a.concurrency"),
        (DESTINATION + "retry = { jitter = 2 }", "destinations.a.retry.jitter"),
    ],
)
def test_a_mistake_is_marked_at_its_place(text, where):
    assert [each.partition(":")[0] for each in problems(text)] == [where]


if __name__ == "__main__":
    SCHEMA.write_bytes(rendered())
