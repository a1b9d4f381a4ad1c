"""`relay check-config` and `relay plugins list`, as an operator uses them."""

import contextlib
import json
import os
import pkgutil
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from relay import __version__
from relay.cli import COMMANDS, main
from relay.cli.output import count
from relay.config import paths
from relay.errors import RelayError

ROOT = Path(__file__).parents[2]

GOOD = '[sources.adorn]\nplugin = "adorn"\n[destinations.crm]\nurl = "https://crm.example"\n'
BAD = '[server]\nmax_boddy = "2 MiB"\nlisten = 8080\n'


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELAY_CONFIG", raising=False)
    monkeypatch.setattr(paths, "PLACES", (Path("config.toml"), tmp_path / "etc" / "config.toml"))
    return tmp_path


@pytest.fixture
def relay(here):
    def run(*args, **environ):
        return CliRunner().invoke(main, args, env=environ)

    return run


def test_a_valid_config_prints_one_line_and_its_warnings(relay, here):
    (here / "config.toml").write_text(GOOD)
    result = relay("check-config")
    assert result.exit_code == 0
    assert result.stdout == "config.toml: ok (1 source, 1 destination)\n"
    source, destination = result.stderr.splitlines()
    assert source.startswith("warning: config.toml:1: sources.adorn: open to everyone")
    assert destination.startswith("warning: config.toml:3: destinations.crm: unsigned")


def test_every_problem_is_a_line_on_stderr_followed_by_a_hint(relay, here):
    (here / "config.toml").write_text(BAD)
    result = relay("check-config")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        'config.toml:2: server.max_boddy: unknown key, did you mean "max_body"?',
        "config.toml:3: server.listen: expected a string, got 8080",
        "2 problems; correct and run `relay check-config config.toml` again",
    ]


def test_problems_print_as_json(relay, here):
    (here / "config.toml").write_text(BAD)
    result = relay("check-config", "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert answer["ok"] is False
    assert answer["problems"][1] == {
        "file": "config.toml",
        "line": 3,
        "key": "server.listen",
        "problem": "expected a string, got 8080",
    }


def test_a_valid_config_prints_as_json_with_its_warnings(relay, here):
    (here / "config.toml").write_text(GOOD)
    result = relay("check-config", "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert (answer["ok"], answer["problems"], len(answer["warnings"])) == (True, [], 2)


@pytest.mark.parametrize(
    ("args", "environ", "file"),
    [
        ([], {}, "config.toml"),
        ([], {"RELAY_CONFIG": "variable.toml"}, "variable.toml"),
        (["-c", "option.toml"], {"RELAY_CONFIG": "variable.toml"}, "option.toml"),
        (["argument.toml"], {"RELAY_CONFIG": "variable.toml"}, "argument.toml"),
    ],
)
def test_the_config_is_found_by_argument_option_variable_and_place(relay, here, args, environ, file):
    for name in ("config.toml", "variable.toml", "option.toml", "argument.toml"):
        (here / name).write_text(GOOD)
    assert relay("check-config", *args, **environ).stdout.startswith(f"{file}: ok")


def test_the_last_default_is_the_system_s_configuration(relay, here):
    (here / "etc").mkdir()
    (here / "etc" / "config.toml").write_text(GOOD)
    assert relay("check-config").stdout.startswith(f"{here}/etc/config.toml: ok")


def test_a_missing_config_has_a_hint_how_to_name_one(relay):
    result = relay("check-config")
    assert result.exit_code == 1
    assert "neither config.toml nor " in result.stderr
    assert "-c FILE or RELAY_CONFIG=FILE" in result.stderr


def test_a_missing_file_is_a_problem(relay):
    result = relay("check-config", "no.toml")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == "no.toml: cannot be read: No such file or directory"


def test_two_files_are_a_usage_error(relay):
    assert relay("check-config", "a.toml", "-c", "b.toml").exit_code == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["chek-config"], 'unknown command "chek-config", did you mean "check-config"?'),
        (["plugins", "lst"], 'unknown command "lst", did you mean "list"?'),
        (["xyz"], 'unknown command "xyz"'),
        (["--nope"], "--nope"),
    ],
)
def test_an_unknown_command_is_a_usage_error_with_a_suggestion(relay, args, message):
    result = relay(*args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_version_is_the_package_s(relay):
    assert relay("--version").stdout == f"hookferry {__version__}\n"


def test_help_lists_each_command_with_the_first_line_of_its_help(relay):
    text = relay("--help").stdout
    for name, (_, summary) in COMMANDS.items():
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert command.get_short_help_str(200) == summary
        assert f"{name} " in text
        assert summary in " ".join(text.split())


@pytest.mark.parametrize("args", [["--help"], ["check-config", "{config}"], ["plugins", "list"]])
def test_check_config_does_not_import_the_server(here, args):
    (here / "config.toml").write_text(GOOD)
    args = [arg.format(config=here / "config.toml") for arg in args]
    program = (
        "import sys; from relay.cli import main; main(sys.argv[1:], standalone_mode=False);"
        "print([m for m in ('aiohttp', 'prometheus_client', 'aiosqlite', 'apscheduler') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_plugins_are_listed_tab_separated_when_piped(relay):
    result = relay("plugins", "list")
    assert result.exit_code == 0
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    kinds = [row[0] for row in rows if row[1] == "source"]
    assert kinds == [module.name for module in pkgutil.iter_modules([str(ROOT / "plugins")])]
    assert "adorn" in kinds
    presets = sorted(file.stem for file in (ROOT / "plugins" / "presets").glob("*.toml"))
    assert [row[0] for row in rows if row[1] == "preset"] == presets
    assert len(rows) == len(kinds) + len(presets)
    assert rows[0][1:4] == ["source", "bundled", __version__]
    assert rows[0][4].endswith("adorn.py")


def test_plugins_are_an_aligned_table_on_a_terminal(here):
    ours, theirs = pty.openpty()
    program = [sys.executable, "-c", "from relay.cli import main; main(['plugins', 'list'])"]
    running = subprocess.Popen(program, stdout=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the program has ended
        while part := os.read(ours, 65_536):
            shown += part
    os.close(ours)
    assert running.wait(30) == 0
    lines = shown.decode().splitlines()
    assert lines[0].split() == ["NAME", "KIND", "ORIGIN", "VERSION", "FILE"]
    assert {line.index("bundled") for line in lines[1:]} == {lines[0].index("ORIGIN")}


def test_plugins_of_the_configured_folders_are_listed(relay, here):
    (here / "config.toml").write_text("[plugins]\ndirs = ['mine']\n[server]\nlisten = 1\n")
    (here / "mine").mkdir()
    (here / "mine" / "shop.py").write_text(
        "from relay.hookspecs import hookimpl\nfrom relay.source import Source\n"
        "from relay.formats import Format\nfrom relay.model import Job\n"
        "class Shop(Source, kind='shop'): pass\n@hookimpl\ndef relay_sources(): return [Shop]\n"
        "@hookimpl\ndef relay_formats(): return [Format(name='line', content_type=None, render=bytes)]\n"
        "async def work(): pass\n"
        "@hookimpl\ndef relay_jobs(): return [Job(name='tidy', every=60, work=work)]\n"
        "@hookimpl\ndef relay_events_stored(events): pass\n"
    )
    listed = json.loads(relay("plugins", "list", "--json").stdout)["items"]
    mine = [row for row in listed if row["file"] == str(here / "mine" / "shop.py")]
    assert {(row["door"], row["version"]) for row in mine} == {("dirs", "")}
    assert [(row["name"], row["offer"]) for row in mine] == [
        ("shop", "source"),
        ("line", "format"),
        ("shop", "relay_events_stored"),
        ("shop.tidy", "job"),
    ]
    assert relay("plugins", "list", "-q").stdout.splitlines() == [row["name"] for row in listed]


def test_a_broken_plugin_fails_the_list_and_hides_nothing(relay, here):
    (here / "config.toml").write_text("")
    (here / "plugins.d").mkdir()
    (here / "plugins.d" / "bad.py").write_text("def f(:")
    result = relay("plugins", "list")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{here}/plugins.d/bad.py:1: cannot be imported")
    kinds = [line.split("\t")[0] for line in result.stdout.splitlines()]
    assert {"adorn", "compozy", "generic", "lazychat", "moddy", "whatsapp"} <= set(kinds)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RelayError("the disk is full", hint="make room"), 1, "the disk is full\n  make room\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_in_a_command_has_no_traceback(error, code, message):
    @click.group(cls=type(main))
    def group():
        pass

    @group.command()
    def fail():
        raise error

    result = CliRunner().invoke(group, ["fail"])
    assert (result.exit_code, result.stderr) == (code, message)


@pytest.mark.parametrize(("number", "text"), [(0, "0 events"), (1, "1 event"), (1204, "1 204 events")])
def test_counts_have_the_right_plural(number, text):
    assert count(number, "event") == text
