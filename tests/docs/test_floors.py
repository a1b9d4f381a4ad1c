"""The floors of docs/design.md: a module imports only from below, or from earlier on its own floor."""

import ast
import functools
import graphlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = (
    ("relay", "errors", "base", "model", "process"),
    (
        "config.problems", "config.secrets", "config.signatures", "keys", "signing", "routing.envelope",
        "routing.conditions", "routing.condition_text", "routing.subscription",
        "schemas", "config", "formats", "delivery.retry", "workers.rules", "store.retention_policy",
        "metrics", "routing",
    ),
    ("ingest.implementation", "source", "hookspecs", "store", "api.query_params", "api.words", "api.views"),
    ("plugin_loading", "ingest", "delivery", "jobs.replay", "workers", "jobs", "state",
     "reload", "doctor", "diagnosis"),
    ("api", "ui"),
    ("standby", "app", "demo"),
    ("cli",),
)  # fmt: skip
"""From the ground up. A package stands for all of its modules that are not named themselves."""

HOUSES = ("relay", "plugins")
SPEAKERS = {
    "aiosqlite": {"relay.store"},
    "asyncpg": {"relay.store.postgres"},
    "apscheduler": {"relay.jobs.scheduler"},
    "click": {"relay.cli"},
    "cryptography": {"relay.keys"},
    "pluggy": {"relay.hookspecs", "relay.plugin_loading.loader"},
    "prometheus_client": {"relay.api", "relay.metrics"},
}
"""The modules that use a library: only these change when it is replaced."""


def name_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for house in HOUSES for file in sorted((ROOT / house).rglob("*.py"))}
ORDER = [name if name == "relay" else f"relay.{name}" for floor in FLOORS for name in floor]


@functools.cache
def imports(module):
    """Return the modules that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module
            if node.level:  # a plugin is `plugins.x` here and `relay.sources.x` when it is installed
                assert (node.level, module.partition(".")[0]) == (1, "plugins"), f"{module}: relative"
                source = ".".join(filter(None, (_package(module), node.module)))
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in FILES else source)
    return found


def _package(module):
    """Return the package that a relative import of a module begins at."""
    return module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]


def place(module):
    """Return the position of a module: the index of the longest name in `ORDER` that covers it."""
    covering = [
        name for name in ORDER if module == name or (name != "relay" and module.startswith(f"{name}."))
    ]
    assert covering, f"{module} has no place in FLOORS"
    return ORDER.index(max(covering, key=len))


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("relay")])
def test_a_module_imports_only_from_below(module):
    mine = place(module)
    wrong = {name for name in imports(module) if name in FILES and place(name) > mine}
    assert not wrong


PLUGINS = sorted({".".join(name.split(".")[:2]) for name in FILES if name.startswith("plugins.")})


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_source_imports_the_contract_and_neither_io_nor_a_clock(plugin):
    modules = [name for name in FILES if name == plugin or name.startswith(f"{plugin}.")]
    found = set().union(*map(imports, modules))
    assert {name for name in found if name.startswith("relay")} == {"relay.hookspecs", "relay.source"}
    outside = {
        "aiohttp",
        "asyncio",
        "datetime",
        "http",
        "os",
        "random",
        "socket",
        "sqlite3",
        "time",
        "urllib",
    }
    assert not {name.partition(".")[0] for name in found} & outside


def test_imports_are_never_circular():
    graph = {module: imports(module) & FILES.keys() for module in FILES}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == FILES.keys()


@pytest.mark.parametrize("library", SPEAKERS)
def test_a_library_is_used_in_one_place(library):
    speakers = {
        module for module in FILES if any(name.partition(".")[0] == library for name in imports(module))
    }
    places = {next((name for name in SPEAKERS[library] if f"{module}.".startswith(f"{name}.")), module)
              for module in speakers}  # fmt: skip
    assert places == SPEAKERS[library]


def test_every_name_on_the_floors_is_a_module():
    assert len(ORDER) == len(set(ORDER))
    assert [name for name in ORDER if name not in FILES] == []


def test_the_design_page_draws_the_same_floors():
    page = (ROOT / "docs" / "design.md").read_text()
    drawn = re.findall(r"^(\d)  (.+)$", page, re.MULTILINE)
    assert [(int(number), tuple(names.split())) for number, names in drawn] == list(enumerate(FLOORS))


def test_every_package_of_the_relay_is_installed():
    """An installation has only the packages that pyproject.toml names; a checkout runs without that list."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "relay").rglob("__init__.py")}
    assert {name for name in listed if not name.startswith("relay.sources")} == found
