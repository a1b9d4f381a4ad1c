"""The commands, their help pages and docs/cli.md agree. `make docs` rewrites the generated parts."""

import re
import subprocess
import sys

import pytest
from commands import EVERY, LEAVES
from golden.pages import HELP, PAGE, TABLE, file_of, help_of, table

from relay.api.app import describe
from relay.cli import COMMANDS
from relay.cli.endpoint import route_of
from relay.cli.main import EXIT_CODES

TEXT = PAGE.read_text()
HEAVY = ("aiohttp", "aiosqlite", "apscheduler", "pluggy", "prometheus_client")
NAMES = [" ".join(path) for path in EVERY]
REWRITE = "run `make docs` to rewrite the generated pages, and read the difference"


@pytest.mark.parametrize("path", EVERY, ids=NAMES)
def test_the_help_of_a_command_is_its_golden_page(path):
    assert file_of(path).exists(), REWRITE
    assert help_of(path) == file_of(path).read_text(), REWRITE


@pytest.mark.parametrize("path", LEAVES, ids=[" ".join(path) for path in LEAVES])
def test_help_begins_with_an_example_after_one_sentence(path):
    lines = [line.strip() for line in help_of(path).splitlines()]
    example = next(number for number, line in enumerate(lines) if line.startswith("Example: "))
    assert "relay " + " ".join(path) in lines[example]
    assert len([line for line in lines[:example] if not line]) == 2  # the usage and the sentence


def test_every_golden_page_has_a_command():
    assert {file.name for file in HELP.iterdir()} == {file_of(path).name for path in EVERY}, REWRITE


def test_the_page_has_every_command_with_the_first_sentence_of_its_help():
    assert TABLE.search(TEXT)[2] == table(), REWRITE


def test_every_option_on_the_page_exists():
    options = {option for command in LEAVES.values() for each in command.params for option in each.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT)) - {"--help"} <= options


@pytest.mark.parametrize("path", LEAVES, ids=[" ".join(path) for path in LEAVES])
def test_every_command_that_prints_has_json(path):
    silent = {("serve",), ("completion",), ("config", "init"), ("config", "schema")}
    has = any("--json" in each.opts for each in LEAVES[path].params)
    assert has is (path not in silent)


def test_the_page_has_every_exit_code():
    codes = {
        value
        for name, value in vars(sys.modules["relay.cli.main"]).items()
        if name.isupper() and isinstance(value, int)
    }
    rows = re.findall(r"^\| (\d+) \| ", TEXT, re.MULTILINE)
    assert {int(row) for row in rows} == codes | {0, 2}  # 2 is click's own


ROUTES = {path: route for path, command in LEAVES.items() if (route := route_of(command))}


@pytest.mark.parametrize("path", ROUTES, ids=[" ".join(path) for path in ROUTES])
def test_the_declared_endpoint_of_a_command_is_in_the_openapi_document(path):
    method, _, route = ROUTES[path].partition(" ")
    parts = re.sub(r"{.*?}", "x", f"{method}/api/{route}").split("/")
    assert any(
        len(parts) == len(operation)
        and all(
            mine == theirs or theirs.startswith("{") for mine, theirs in zip(parts, operation, strict=True)
        )
        for operation in OPERATIONS
    )
    assert len(ROUTES) >= 15


OPERATIONS = [
    f"{method.upper()}{path}".split("/")
    for path, operations in describe()["paths"].items()
    for method in operations
]


def modules_of(code):
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.splitlines()[-1].split())


def test_help_imports_neither_a_command_nor_anything_heavy():
    modules = modules_of("from relay.cli import main\nmain(['--help'], standalone_mode=False)")
    assert not modules & {*HEAVY, "relay.plugin_loading.loader", "relay.store"}
    assert not modules & ({where.partition(":")[0] for where, _ in COMMANDS.values()} - {"relay.cli.main"})


def test_importing_a_command_does_not_import_aiohttp():
    modules = sorted(where.partition(":")[0] for where, _ in COMMANDS.values())
    code = f"import {', '.join(modules)}"
    assert not modules_of(code) & {"aiohttp", "aiosqlite"}


def test_completion_imports_nothing_heavy():
    code = (
        "from click.shell_completion import BashComplete\nfrom relay.cli import main\n"
        "shell = BashComplete(main, {}, 'relay', '_RELAY_COMPLETE')\n"
        "shell.get_completions(['destinations', 'show', '--socket', 'absent'], '')"
    )
    assert not modules_of(code) & {*HEAVY, "asyncio", "relay.store", "relay.cli.offline"}


def test_commands_that_only_call_the_api_import_no_event_loop_and_no_store():
    asks = ("attempts", "deliveries", "destinations", "doctor", "events", "stats", "status", "workers")
    code = f"import {', '.join(f'relay.cli.{name}' for name in asks)}"
    assert not modules_of(code) & {"asyncio", "relay.store", "relay.cli.offline"}


def test_the_exit_codes_are_on_the_page():
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", TEXT.partition("## Exit codes")[2], re.MULTILINE)
    assert dict(rows) == {str(code): meaning for code, meaning in EXIT_CODES.items()}
