"""`relay plugins new`: the new plugin passes its own test and check-config, and accepts events."""

import asyncio
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from commands import run
from daemons import running, write_config

from relay.cli.plugins import TEMPLATES

ROOT = Path(__file__).parents[2]
PLUGIN, TEST = ((TEMPLATES / f"{name}.py.template").read_text() for name in ("plugin", "test_plugin"))


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELAY_CONFIG", raising=False)
    return write_config(tmp_path)


def add(config, table):
    config.write_text(config.read_text() + "\n" + table)


@pytest.mark.parametrize("name", ["parcels", "my_shop2"])
async def test_the_new_plugin_passes_its_test_and_serves_requests(config, name):
    result = run("plugins", "new", name, "-c", config, "--json").json
    assert result["plugin"] == str(config.parent / "plugins.d" / f"{name}.py")

    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    for options in ([], ["-m", "pytest", "-q", "-p", "no:cacheprovider"]):
        tested = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-B", *options, result["test"]],
            capture_output=True, text=True, check=False, timeout=60, env=environ, cwd=config.parent,
        )  # fmt: skip
        assert tested.returncode == 0, tested.stdout + tested.stderr
        assert ("3 passed" if options else "Ran 3 tests") in tested.stdout + tested.stderr

    add(config, result["config"])
    assert run("check-config", config).out.endswith("ok (1 source, 0 destinations)\n")
    [row] = [row for row in run("plugins", "list", "-c", config).rows if row[0] == name]
    assert row[1:3] == ["source", "dirs"]

    async with running(config) as relay:
        sent = await asyncio.to_thread(
            run, "send", name, "-c", config, "--to", relay.addresses.public, "--json"
        )
        [event] = await relay.rows()
        assert json.loads(sent.json["body"]) == {"ok": True, "id": event["id"]}
        assert (event["type"], event["subject"]) == (f"{name}.thing.happened", "42")


def test_the_output_has_the_next_steps(config):
    out = run("plugins", "new", "parcels", "-c", config).out
    assert f"{config.parent}/plugins.d/parcels.py: written\n" in out
    assert f"`{sys.executable} {config.parent}/plugins.d/test_parcels.py`" in out
    assert f'Add to {config}:\n\n[sources.parcels]\nplugin = "parcels"\n' in out
    assert "`relay check-config`" in out
    assert "`relay send parcels`" in out


def test_another_folder_is_added_to_those_of_the_configuration(config):
    result = run("plugins", "new", "parcels", "--dir", "mine", "-c", config, "--json").json
    assert Path(result["plugin"]) == Path("mine/parcels.py")
    assert tomllib.loads(result["config"])["plugins"]["dirs"] == [str(config.parent / "plugins.d"), "mine"]
    add(config, result["config"])
    assert "ok (1 source" in run("check-config", config).out


def test_the_default_folder_is_plugins_d(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELAY_CONFIG", raising=False)
    out = run("plugins", "new", "parcels").out
    assert "Add to config.toml:" in out
    assert "dirs" not in out
    assert (tmp_path / "plugins.d" / "test_parcels.py").exists()


@pytest.mark.parametrize("there", ["parcels.py", "test_parcels.py"])
def test_existing_files_are_kept_and_no_partial_file_is_left(config, there):
    folder = config.parent / "plugins.d"
    folder.mkdir()
    (folder / there).write_text("_ = 'mine'\n")
    result = run("plugins", "new", "parcels", "-c", config, code=1)
    assert result.err.startswith(f"{folder / there} already exists\n  choose another name")
    assert [file.name for file in folder.iterdir()] == [there]
    assert (folder / there).read_text() == "_ = 'mine'\n"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("My-Parcels", 2, "for example `relay plugins new my_parcels`"),
        ("1", 2, "for example `relay plugins new parcels`"),
        ("class", 2, "is not a valid module name"),
        ("test_parcels", 2, "for example `relay plugins new parcels`"),
        ("../parcels", 2, "is not a valid module name"),
        ("adorn", 1, 'a source of the kind "adorn" already exists'),
        ("json", 1, '"json" is a module of Python or of an installed package'),
        ("relay", 1, '"relay" is a module of Python'),
    ],
)
def test_an_invalid_name_is_refused(config, name, code, message):
    assert message in run("plugins", "new", name, "-c", config, code=code).err
    assert not (config.parent / "plugins.d").exists()


def test_a_folder_that_cannot_be_written_is_an_error(config):
    (config.parent / "file").write_text("")
    result = run("plugins", "new", "parcels", "-c", config, "--dir", "file", code=1)
    assert result.err.startswith("cannot write file")
    assert "choose another folder with --dir DIR" in result.err


def test_the_templates_are_short_and_well_formed(tmp_path):
    full = [line for line in PLUGIN.splitlines() if line]
    assert len(full) <= 45
    for name, text in (("parcels.py", PLUGIN), ("test_parcels.py", TEST)):
        (tmp_path / name).write_text(text.replace("@name@", "parcels").replace("@Class@", "Parcels"))
    checks = (("format", "--check"), ("check", "--select", "F,E,W,I,UP,B", "--ignore", "I001"))
    for args in checks:
        command = [
            sys.executable,
            "-m",
            "ruff",
            *args,
            "--config",
            str(ROOT / "pyproject.toml"),
            str(tmp_path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
