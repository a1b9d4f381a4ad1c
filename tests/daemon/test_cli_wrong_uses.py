"""Invalid use of every command that talks to the relay: the message, the exit code, and the next step."""

import asyncio

import click
import pytest
from click.testing import CliRunner
from commands import LEAVES, arguments_of
from daemons import SOURCES, destination, running, write_config

from relay.cli import main
from relay.cli.main import OneOf

TOKEN = "an-admin-token"


def talks(command):
    return any("--socket" in each.opts for each in command.params)


TALKING = {path: arguments_of(path) for path, command in LEAVES.items() if talks(command)}


@pytest.fixture
def filled(tmp_path):
    """Write a command as its words, with a file for each file argument."""
    file = tmp_path / "events.jsonl"
    file.write_text("")

    def fill(path, *more):
        return [*path, *(each.format(file=file) for each in TALKING[path]), *map(str, more)]

    return fill


def run(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


def has_next_step(text):
    """Return whether a sentence is followed by a line with the next step."""
    return len(text.splitlines()) >= 2 and text.splitlines()[1].startswith("  ") and "Traceback" not in text


@pytest.fixture
async def relay(tmp_path):
    file = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/hook"))
    file.write_text(file.read_text().replace("[admin]", f'[admin]\ntokens = ["{TOKEN}"]'))
    async with running(file) as relay:
        yield relay


async def test_a_wrong_token_exits_with_5_in_every_command(relay, filled, tmp_path):
    (tmp_path / "guess").write_text("a-guess-of-mine")
    for path in TALKING:
        words = filled(path, "--url", relay.addresses.admin, "--token-file", tmp_path / "guess")
        code, text = await asyncio.to_thread(run, words)
        assert (code, has_next_step(text)) == (5, True), (path, code, text)
        assert text.startswith("missing or unknown token\n")
        assert "a-guess-of-mine" not in text


@pytest.mark.parametrize(
    "words",
    [
        ["destinations", "show", "crn"],
        ["destinations", "pause", "crn"],
        ["destinations", "test", "crn"],
        ["sources", "show", "adron"],
        ["sources", "pause", "adron"],
        ["jobs", "run", "retension"],
    ],
    ids=" ".join,
)
async def test_a_misspelt_name_exits_with_4_and_a_suggestion(relay, words):
    code, text = await asyncio.to_thread(run, [*words, "--socket", str(relay.addresses.socket)])
    assert (code, has_next_step(text)) == (4, True), text
    assert "did you mean" in text


def misspelt(word):
    """Leave out the second-last letter."""
    return word[:-2] + word[-1]


WORDS = [path for path in LEAVES if len(path[-1]) > 3 and (*path[:-1], misspelt(path[-1])) not in LEAVES]


@pytest.mark.parametrize("path", WORDS, ids=" ".join)
def test_a_misspelt_command_exits_with_2_and_a_suggestion(path):
    code, text = run([*path[:-1], misspelt(path[-1])])
    assert code == 2
    assert f'unknown command "{misspelt(path[-1])}", did you mean "' in text


OPTIONS = [
    (path, option)
    for path, command in LEAVES.items()
    for each in command.params
    for option in each.opts
    if option.startswith("--") and len(option) > 6
]


@pytest.mark.parametrize(
    ("path", "option"), OPTIONS, ids=lambda value: value if isinstance(value, str) else None
)
def test_a_misspelt_option_exits_with_2_and_a_suggestion(path, option):
    code, text = run([*path, *arguments_of(path), misspelt(option)])
    assert code == 2
    assert "did you mean" in text.lower()
    assert option in text


CHOICES = [
    (path, each, word)
    for path, command in LEAVES.items()
    for each in command.params
    if isinstance(each.type, click.Choice)
    for word in each.type.choices
    if len(str(word)) > 3
]


@pytest.mark.parametrize(
    ("path", "parameter", "word"), CHOICES, ids=[f"{' '.join(path)} {word}" for path, _, word in CHOICES]
)
def test_a_misspelt_value_exits_with_2_and_a_suggestion(path, parameter, word):
    assert isinstance(parameter.type, OneOf)
    wrong = misspelt(str(word)).lower()
    words = arguments_of(path)
    if isinstance(parameter, click.Option):
        words = [*words, parameter.opts[-1], wrong]
    else:
        words = [wrong if each == parameter.type.choices[0] else each for each in words]
    code, text = run([*path, *words])
    assert code == 2
    assert f'Did you mean "{word}"?' in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("developmet = true", 'developmet: unknown key, did you mean "development"?'),
        ("[server]\nlisten_on = 1", 'server.listen_on: unknown key, did you mean "listen"?'),
        ("[sorces.a]\nplugin = 'adorn'", 'sorces: unknown key, did you mean "sources"?'),
        ("[sources.a]\nplugin = 'adron'", 'no plugin offers the kind "adron", did you mean "adorn"?'),
        ("[sources.a]\nplugin = 'adorn'\ntoken = []", 'unknown key, did you mean "tokens"?'),
        ("[destinations.a]\nurl = 'http://a'\nevent = []", 'unknown key, did you mean "events"?'),
        ("[destinations.a]\nurl = 'http://a'\nmethod = 'PSOT'", 'expected "POST" or "PUT", got "PSOT"'),
    ],
)
@pytest.mark.parametrize(
    "command", [["check-config"], ["config", "show", "-c"], ["serve", "-c"]], ids=" ".join
)
def test_a_misspelt_key_fails_every_command_that_needs_the_whole_configuration(
    tmp_path, command, wrong, message
):
    file = tmp_path / "config.toml"
    file.write_text(wrong)
    code, text = run([*command, str(file)])
    assert code == (78 if command[0] == "serve" else 1)
    assert message in text
    assert f"{file.name}:" in text
