"""The wheel: built from the sources and installed in a separate environment."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest

import relay

ROOT = Path(__file__).parents[2]
SHIPPED = ("relay", "plugins", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def run(*command, cwd, timeout=60):
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy, so that the checkout stays clean; offline."""
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", ".", cwd=source)
    [file] = (source / "dist").iterdir()
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Install the wheel with the dependencies of this environment, and without the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    run(
        sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"),
        "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel), cwd=folder,
    )  # fmt: skip
    # A path in a .pth file is only appended: .pth files behind it, such as an editable install's, do nothing.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_has_every_module_and_only_the_name_relay(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        licences = [name for name in file.namelist() if name.endswith("licenses/LICENSE")]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "relay").rglob("*.py")}
    plugins = ROOT / "plugins"
    sources = {
        f"relay/sources/{path.relative_to(plugins)}"
        for path in plugins.rglob("*")
        if path.suffix in (".py", ".toml")
    }
    assert "relay/sources/presets/github.toml" in sources
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "relay" / "cli" / "templates").iterdir()}
    templates |= {str(path.relative_to(ROOT)) for path in (ROOT / "relay" / "ui" / "static").iterdir()}
    templates.add("relay/demo/config.toml.template")
    assert held == modules | sources | templates | {"relay/py.typed", "relay/config/config.schema.json"}
    assert len(licences) == 1


RELATIVE = re.compile(r"\]\((?!https?:|#)|src=\"(?!https?:)")


def test_the_description_of_the_wheel_has_only_links_that_work_elsewhere(wheel):
    with zipfile.ZipFile(wheel) as file:
        [name] = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        text = file.read(name).decode()
    assert "\nDescription-Content-Type: text/markdown\n" in text
    assert "\n# hookferry\n" in text
    assert RELATIVE.search((ROOT / "README.md").read_text())
    assert not RELATIVE.search(text)
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hookferry"]
    assert ("Project-URL: " in text) is bool(own["repository"])


@pytest.mark.parametrize("repository", ["", "https://forge.example/name/hookferry/"])
def test_one_key_sets_the_urls_and_the_links_of_the_description(repository):
    build = runpy.run_path(str(ROOT / "setup.py"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project["tool"]["hookferry"]["repository"] = repository
    address, files, raw = build["addresses"](project)
    urls = build["urls"](address, files)
    text = build["readme"]((ROOT / "README.md").read_text(), files, raw)
    assert not RELATIVE.search(text)
    assert "[Standard Webhooks](https://www.standardwebhooks.com)" in text
    if not repository:
        assert (urls, "All keys: docs/configuration.md." in text, "<img" in text) == ({}, True, False)
        return
    own = "https://forge.example/name/hookferry"
    assert urls["Source"] == own
    assert urls["Documentation"] == f"{own}/blob/main/docs/index.md"
    assert f'<img src="{own}/raw/main/docs/architecture.svg"' in text
    linked = set(
        re.findall(rf"{own}/(?:blob|raw)/main/([^)\"#]+)", text + " ".join(map("({})".format, urls.values())))
    )
    assert len(linked) > 10
    assert [path for path in linked if not (ROOT / path).exists()] == []


def test_the_installed_wheel_runs_the_demo_from_another_folder(environment, tmp_path):
    where = run(environment / "bin" / "python", "-c", "import relay; print(relay.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    output = run(environment / "bin" / "relay", "serve", "--demo", "--exit", cwd=tmp_path)
    assert "every signature valid." in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["relay", "hookferry"])
def test_both_commands_are_the_same_program(environment, tmp_path, command):
    output = run(environment / "bin" / command, "--version", cwd=tmp_path)
    assert output == f"hookferry {relay.__version__}\n"


def test_the_installed_version_is_the_one_in_the_code():
    assert metadata.version("hookferry") == relay.__version__


def test_every_imported_package_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = (extras[name] for name in ("fast", "schemas", "ed25519", "postgres"))
    needs = [*project["dependencies"], *chain.from_iterable(optional)]
    declared = {re.match(r"[a-z-]+", need)[0].replace("-", "_") for need in needs}
    declared |= {"multidict", "yarl", "referencing"}  # the languages of aiohttp and of jsonschema
    imported = set()
    for file in (*(ROOT / "relay").rglob("*.py"), *(ROOT / "plugins").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"relay"} == declared
