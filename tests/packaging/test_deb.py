"""The Debian package, built by the commands of docs/install.md and installed in a clean root."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from commands import EVERY
from machines import CHECKOUT, DEBIAN, Root, copy_checkout, offline
from wire import exchange, request

from relay import __version__

PAGE = (CHECKOUT / "docs" / "install.md").read_text()
[BLOCK] = re.findall(r"<!-- run: package -->\n```sh\n(.*?)```", PAGE, re.DOTALL)
HERE = "/root/hookferry"
STATE = ("/var/lib/relay/relay.db", "/etc/relay/config.toml")


@pytest.fixture(scope="module")
def package(wheels, tmp_path_factory):
    """The folder that the page is followed in, after its first command."""
    build, _install = BLOCK.splitlines()
    assert build == "packaging/deb/build"  # needs no make
    folder = copy_checkout(tmp_path_factory.mktemp("deb") / "hookferry")
    done = subprocess.run(
        build.split(),
        cwd=folder,
        env={
            **os.environ,
            **offline(wheels),
            "DPKG_DEB_COMPRESSOR_TYPE": "none",  # it is a test: be quick
            "PIP": str(Path(sysconfig.get_path("scripts"), "pip")),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    [deb] = (folder / "dist").iterdir()
    assert done.stdout.splitlines()[-1] == str(deb)
    return folder


@pytest.fixture(scope="module")
def installed(package, tmp_path_factory):
    """A clean root after the second command."""
    root = Root(tmp_path_factory.mktemp("root"), *DEBIAN)
    [deb] = (package / "dist").iterdir()
    deb = _put(root, deb)
    root.run("sh", "-c", BLOCK.splitlines()[1], cwd=HERE)
    deb.unlink()
    yield root
    root.remove()


@pytest.fixture
def root(installed, tmp_path):
    """A copy of `installed` for one test."""
    root = installed.copy(tmp_path / "root")
    yield root
    root.remove()


def _put(root, deb):
    there = root.path / HERE.removeprefix("/") / "dist" / deb.name
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_bytes(deb.read_bytes())
    return there


@pytest.fixture(scope="module")
def newer(package, tmp_path_factory):
    """A package of a later version, with another configuration, and without the libraries, to save time."""
    [deb] = (package / "dist").iterdir()
    tree = tmp_path_factory.mktemp("newer") / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", deb, tree], check=True)
    [site] = (tree / "opt/relay/lib").glob("python3.*/site-packages")
    for folder in site.iterdir():
        if folder.is_dir() and not folder.name.startswith(("relay", "hookferry")):
            shutil.rmtree(folder)
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace(f"Version: {__version__}", "Version: 99"))
    (tree / "etc/relay/config.toml").write_text("# theirs\n")
    made = tree.with_name("hookferry_99.deb")
    subprocess.run(("dpkg-deb", "-Znone", "--build", tree, made), check=True, capture_output=True)
    return made


def test_the_package_has_a_valid_configuration_that_only_the_service_can_read(installed):
    assert installed.run("relay", "check-config", "/etc/relay/config.toml") == (
        "/etc/relay/config.toml: ok (0 sources, 0 destinations)\n"
    )
    files = (
        "/etc/relay",
        *(f"/etc/relay/{name}" for name in ("conf.d", "config.toml", "environment", "credentials")),
    )
    modes = installed.run("stat", "-c", "%a %U:%G %n", *files)
    assert modes.splitlines() == [
        "750 root:relay /etc/relay",
        "750 root:relay /etc/relay/conf.d",
        "640 root:relay /etc/relay/config.toml",
        "640 root:relay /etc/relay/environment",
        "700 root:root /etc/relay/credentials",
    ]
    assert "development = true" not in installed.run("cat", "/etc/relay/config.toml")


def test_the_package_is_complete_and_starts_nothing(installed):
    assert installed.run("dpkg", "--verify", "hookferry") == ""
    assert installed.run("hookferry", "--version") == f"hookferry {__version__}\n"
    installed.run("/opt/relay/bin/python", "-c", "import asyncpg, uvloop, cryptography, jsonschema")
    listed = [line.split("\t")[:2] for line in installed.run("relay", "plugins", "list").splitlines()]
    presets = {file.stem for file in (CHECKOUT / "plugins" / "presets").glob("*.toml")}
    assert {name for name, kind in listed if kind == "preset"} == presets
    units = ("relay.service", "relay.socket", "relay-admin.socket")
    asked = installed.attempt("systemctl", "is-enabled", *units, SYSTEMD_OFFLINE="1")
    assert asked.stdout.split() == ["disabled"] * 3
    for unit in units:
        shipped = (installed.path / "lib/systemd/system" / unit).read_text()
        assert shipped == (CHECKOUT / "systemd" / unit).read_text()


def test_the_package_has_man_pages_completions_a_schema_and_a_bill_of_materials(installed):
    share = installed.path / "usr/share"
    pages = {path.name.removesuffix(".1.gz") for path in (share / "man/man1").iterdir()}
    assert pages == {"hookferry", *("-".join(("relay", *path)) for path in EVERY)}
    page = gzip.decompress((share / "man/man1/relay-events-list.1.gz").read_bytes()).decode()
    assert "\n.B \\-\\-source TEXT\nName of the source." in page
    for file, word in (
        ("bash-completion/completions/relay", "_RELAY_COMPLETE=bash_complete"),
        ("zsh/vendor-completions/_relay", "#compdef relay"),
        ("fish/vendor_completions.d/relay.fish", "_RELAY_COMPLETE=fish_complete"),
        ("doc/hookferry/config.schema.json", "hookferry's config.toml"),
    ):
        assert word in (share / file).read_text()
    bill = json.loads((share / "doc/hookferry/sbom.cdx.json").read_text())
    assert {"aiohttp", "asyncpg", "uvloop", "cryptography"} <= {each["name"] for each in bill["components"]}


def test_the_package_contains_no_build_path(package, installed):
    found = subprocess.run(
        ["grep", "-rl", "-e", "/tmp/", "--include=*.pyc", "--include=relay", "--include=*.cfg", "opt/relay"],
        cwd=installed.path,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    ours = [path for path in found.splitlines() if "/relay/" in path.removeprefix("opt/relay/")]
    assert ours == []
    records = list((installed.path / "opt/relay/lib").rglob("RECORD"))
    assert records
    assert not [each for each in records if "../bin/" in each.read_text()]  # scripts with the build's folder


async def test_the_installed_relay_serves_as_the_user_of_the_unit(root):
    config = root.path / "etc/relay/config.toml"
    text = re.sub(r"127\.0\.0\.1:80\d\d", "127.0.0.1:0", config.read_text())
    config.write_text(f'{text}[sources.moddy]\nplugin = "moddy"\ntokens = [{{ env = "SECRET" }}]\n')
    assert root.attempt("relay", "check-config").returncode == 1
    (root.path / "etc/relay/environment").write_text("SECRET='secret'\n")
    root.run("relay", "check-config")
    shown = json.loads(root.run("relay", "config", "show", "--json"))
    assert shown["state_dir"] == "/var/lib/relay"
    silent = root.attempt("relay", "status")
    assert silent.returncode == 3
    assert silent.stderr.startswith("cannot connect to the daemon at /run/relay/relay.sock: ")
    assert "`systemctl start relay`" in silent.stderr
    async with root.serve(SECRET="secret") as daemon:
        sent = request(
            "POST",
            "/internal/event/notify",
            b'{"event_type": "member_joined", "discord_id": "1", "metadata": {}}',
            authorization="Bearer secret",
        )
        assert (await exchange(daemon.url, sent)).status == 200
        status = json.loads(root.run("relay", "status", "--json"))
        assert (status["ready"], status["version"]) == (True, __version__)
        assert await daemon.stop() == 0
    assert root.run("stat", "-c", "%a %U:%G", STATE[0]) == "600 relay:relay\n"
    second = root.attempt("relay", "serve", SECRET="secret")
    assert (second.returncode, "/var/lib/relay/relay.db" in second.stderr) == (1, True)
    assert not (root.path / "etc/relay/relay.db").exists()


def test_data_outlives_an_upgrade_and_a_removal_but_only_backups_a_purge(root, newer):
    for path in STATE:
        root.add(path, "# mine\n", 0o640)

    def mine():
        return [(root.path / path[1:]).exists() and (root.path / path[1:]).read_text() for path in STATE]

    environment = root.path / "etc/relay/environment"
    environment.unlink()
    _put(root, newer)
    unasked = ("-o", "Dpkg::Options::=--force-confdef")  # the default answer: keep mine
    root.run("apt-get", "install", "-y", *unasked, f"./{newer.name}", cwd=f"{HERE}/dist")
    assert root.run("dpkg-query", "--show", "--showformat=${Version}", "hookferry") == "99"
    assert mine() == ["# mine\n", "# mine\n"]
    assert not environment.exists()
    root.run("systemctl", "enable", "relay.socket", "relay-admin.socket", "relay.service")
    assert len(list((root.path / "etc/systemd/system").rglob("relay*"))) == 3
    root.run("apt-get", "remove", "-y", "hookferry")
    assert mine() == ["# mine\n", "# mine\n"]
    assert list((root.path / "etc/systemd/system").rglob("relay*")) == []
    assert not (root.path / "opt/relay").exists()
    for name in ("relay.db-wal", "relay.db.mark", "backups/relay-20260131T120000Z.db-journal"):
        root.add(f"/var/lib/relay/{name}", "")
    root.add("/var/lib/relay/backups/relay-20260131T120000Z.db", "saved")
    root.add("/var/lib/relay/backups/before-upgrade.db", "by hand")
    result = root.run("apt-get", "purge", "-y", "hookferry")
    assert "Backups of hookferry stay in /var/lib/relay" in result
    assert mine() == [False, False]
    assert not Path(root.path / "etc/relay").exists()
    state = root.path / "var/lib/relay"
    left = sorted(str(path.relative_to(state)) for path in state.rglob("*"))
    assert left == ["backups", "backups/before-upgrade.db", "backups/relay-20260131T120000Z.db"]


def test_a_purge_without_backups_leaves_nothing(root):
    root.add("/var/lib/relay/relay.db", "")
    (root.path / "var/lib/relay/backups").mkdir()
    result = root.run("apt-get", "purge", "-y", "hookferry")
    assert "Backups" not in result
    assert not Path(root.path / "var/lib/relay").exists()


def test_an_upgrade_restarts_and_a_removal_stops_only_running_units(root, newer):
    _put(root, newer)
    (root.path / "run/systemd/system").mkdir(parents=True)
    root.add("usr/bin/systemctl", '#!/bin/sh\necho "$*" >>/calls\n', 0o755)

    def calls(*command):
        root.add("calls", "")
        root.run("apt-get", *command, "-y", cwd=f"{HERE}/dist")
        asked = (root.path / "calls").read_text().splitlines()
        return [call for call in asked if "relay" in call and not call.startswith("--quiet disable")]

    assert calls("install", f"./{newer.name}", "-o", "Dpkg::Options::=--force-confnew") == [
        "try-restart relay.service"
    ]
    assert calls("remove", "hookferry") == ["stop relay.socket relay-admin.socket relay.service"]
    assert calls("purge", "hookferry") == []
    assert calls("install", f"./{newer.name}") == []  # a first installation
