"""`relay init`: its files and its questions; the commands that it prints work as printed."""

import asyncio
import shlex
import socket
import stat
import tomllib
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import RELAY, run
from daemons import Daemon
from machines import needs_root

from relay.cli import init as module
from relay.cli import main
from relay.cli.add_source import offered
from relay.config.installed_service import Service
from relay.plugin_loading.loader import load

PUBLIC_KEYS = {  # of services that sign with a private key: an ed25519 and a P-256 key
    "discord-events": "3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29",
    "discord-interactions": "3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29",
    "sendgrid": "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEaxfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpZP40Li/"
    "hp/m47n60p8D54WK84zV2sxXs7LtkBoN79R9Q==",
}


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def free_ports(number):
    """Return ports of loopback that nobody uses at the moment."""
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [sock.getsockname()[1] for sock in socks]


def test_every_kind_of_source_gets_secrets_with_which_the_configuration_loads(tmp_path):
    kinds = offered(())
    words = [word for kind in kinds for word in ("--source", kind)]
    for name, key in PUBLIC_KEYS.items():
        (tmp_path / name).write_text(key)
        words += ["--secret", f"{name}={tmp_path / name}"]
    result = run(
        "init", tmp_path / "x", "--yes", *words, "--public-url", "https://hooks.example", "--json"
    ).json
    config = load(tmp_path / "x" / "config.toml", {}).config
    assert set(config.sources) == set(kinds)
    assert [each["name"] for each in result["sources"]] == list(kinds)
    assert mode(tmp_path / "x" / "secrets") == 0o700
    secrets = list((tmp_path / "x" / "secrets").iterdir())
    assert {mode(file) for file in secrets} == {0o600}
    assert len({file.read_text() for file in secrets}) == len(secrets) - 1  # one public key is there twice
    later = {Path(each["path"]).name: each["secret"] for each in result["later"]}
    assert later["stripe"] == "the endpoint's signing secret, whsec_…"
    assert not later.keys() & {"github", "adorn", "generic", *PUBLIC_KEYS}
    assert not any(file.read_text().strip() in str(result) for file in secrets)


async def test_the_commands_to_try_work_as_printed(tmp_path, monkeypatch):
    """In their order, those that keep running in the background, as in other terminals."""
    monkeypatch.chdir(tmp_path)
    public, admin, receiver = free_ports(3)
    words = ["init", "--yes", "--source", "github", "--source", "shop=stripe", "--source", "generic"]
    words += ["--to", f"http://127.0.0.1:{receiver}/", "--run", "here"]
    words += ["--listen", f"127.0.0.1:{public}", "--admin-listen", f"127.0.0.1:{admin}"]
    printed = await asyncio.to_thread(run, *words)
    _, _, end = printed.out.partition("\nTry it (a command with … keeps running: use another terminal):\n\n")
    lines = [line.strip() for line in end.splitlines()]
    assert [line.partition("   # …")[0].split()[1] for line in lines] == [
        "check-config", "listen", "serve", "status", "send", "send", "send", "deliveries"
    ]  # fmt: skip
    result = {}
    [listen] = [line for line in lines if line.endswith("   # …") and "listen" in line]
    [serve] = [line for line in lines if line.endswith("   # …") and "serve" in line]
    shell = listen.replace("relay", shlex.join(RELAY), 1)
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    listener = await asyncio.create_subprocess_shell(f"exec {shell}", **pipes)
    daemon = Daemon(tmp_path / shlex.split(serve, comments=True)[3])
    try:
        await daemon.start()
        await daemon.ready()
        assert (await listener.stderr.readline()).startswith(b"listening on ")
        for line in lines:
            if not line.endswith("# …"):
                result[line] = await asyncio.to_thread(run, *shlex.split(line)[1:])
        async with asyncio.timeout(30):
            arrived = [(await listener.stdout.readline()).decode() for _ in range(3)]
    finally:
        listener.kill()
        await listener.wait()
        await daemon.end()
    assert all("\tsignature ok\t" in line for line in arrived)
    assert result["relay check-config config.toml"].out == "config.toml: ok (3 sources, 1 destination)\n"
    assert len(result["relay deliveries list -c config.toml"].rows) == 3


def test_nothing_is_overwritten_without_asking(tmp_path):
    run("init", tmp_path, "--yes")
    config, secret = tmp_path / "config.toml", tmp_path / "secrets" / "generic"
    before, key = config.read_text(), secret.read_text()
    wrong = run("init", tmp_path, "--yes", "--source", "github", code=1)
    assert wrong.err == (
        f"{config} already exists; nothing was written\n"
        "  --overwrite replaces it; `relay sources add` adds a sender to it\n"
    )
    assert config.read_text() == before
    assert not (tmp_path / "secrets" / "github").exists()
    result = run("init", tmp_path, "--yes", "--source", "github", "--source", "generic", "--overwrite")
    assert f"{config}: replaced\n" in result.out
    assert f"{secret}: kept\n" in result.out
    assert secret.read_text() == key
    assert (tmp_path / "config.toml.old").read_text() == before
    assert set(tomllib.loads(config.read_text())["sources"]) == {"github", "generic"}


@pytest.fixture
def terminal(monkeypatch):
    """Run a command on a terminal, with typed answers."""
    monkeypatch.setattr(module, "is_terminal", lambda: True)
    monkeypatch.setattr(module, "installed", lambda: None)

    def typed(*words, answers):
        return CliRunner().invoke(
            main, ["init", *map(str, words)], input="".join(f"{each}\n" for each in answers)
        )

    return typed


def test_on_a_terminal_it_asks_for_missing_options(tmp_path, terminal):
    answers = ["github, stripe", "https://hooks.example", "https://crm.example/in", "whsec_typed"]
    result = terminal(tmp_path, answers=answers)
    assert result.exit_code == 0, result.output
    tables = tomllib.loads((tmp_path / "config.toml").read_text())
    assert list(tables["sources"]) == ["github", "stripe"]
    assert tables["destinations"]["crm"] == {
        "url": "https://crm.example/in", "events": ["*"], "secrets": [{"file": "secrets/crm"}]
    }  # fmt: skip
    assert (tmp_path / "secrets" / "stripe").read_text() == "whsec_typed\n"
    assert "whsec_typed" not in result.output
    assert f"Secret: the value of {tmp_path}/secrets/github" in result.output
    again = terminal(tmp_path, answers=["generic", "https://hooks.example", "https://crm.example/in", "n"])
    assert again.exit_code == 1
    assert "config.toml exists. Replace it (the previous one becomes config.toml.old)?" in again.output
    assert list(tomllib.loads((tmp_path / "config.toml").read_text())["sources"]) == ["github", "stripe"]
    options = ("--source", "adorn", "--to", "a=http://127.0.0.1:1/?b=c", "--public-url", "https://x.example")
    assert terminal(tmp_path / "new", *options, answers=[]).exit_code == 0
    assert tomllib.loads((tmp_path / "new" / "config.toml").read_text())["destinations"]["a"]["allow_private"]


@needs_root
def test_a_service_gets_its_own_files_and_a_dropin_only_if_its_unit_needs_one(tmp_path, monkeypatch):
    settings = {
        "ExecStart": ["/opt/relay/bin/relay serve -c /etc/relay/config.toml"], "User": ["nobody"],
        "Group": ["nogroup"], "ProtectHome": ["yes"],
    }  # fmt: skip
    service = Service(settings=settings, config=tmp_path / "etc" / "config.toml")
    monkeypatch.setattr(module, "installed", lambda: service)
    monkeypatch.setattr(module, "FOLDERS", (tmp_path / "units",))
    result = run("init", "--yes", "--run", "service", "--to", "https://crm.example/in", "--json").json
    assert [Path(each["path"]).name for each in result["files"]] == ["generic", "crm", "config.toml"]
    config = tmp_path / "etc" / "config.toml"
    assert (mode(config), config.group()) == (0o640, "nogroup")
    assert "state_dir" not in config.read_text()
    for file in (config.parent / "secrets", *(config.parent / "secrets").iterdir()):
        assert (file.owner(), mode(file)) == ("nobody", 0o700 if file.is_dir() else 0o600)
    assert [each["command"] for each in result["commands"]] == [
        f"relay check-config {config}", "systemctl enable relay.service", "systemctl restart relay.service",
        f"relay status -c {config}", f"relay send generic -c {config}", f"relay deliveries list -c {config}",
    ]  # fmt: skip
    result = run(
        "init", tmp_path / "else", "--yes", "--run", "service", "--listen", "127.0.0.1:443", "--json"
    ).json
    dropin = (tmp_path / "units" / "relay.service.d" / "init.conf").read_text()
    assert dropin.splitlines()[1:] == [
        "[Service]", "ExecStart=", f"ExecStart=/opt/relay/bin/relay serve -c {tmp_path}/else/config.toml",
        "ExecReload=", f"ExecReload=/opt/relay/bin/relay reload -c {tmp_path}/else/config.toml",
        "AmbientCapabilities=CAP_NET_BIND_SERVICE", "CapabilityBoundingSet=CAP_NET_BIND_SERVICE",
    ]  # fmt: skip
    assert "systemctl daemon-reload" in [each["command"] for each in result["commands"]]
    hidden = run("init", "/root/x", "--yes", "--run", "service", code=1)
    assert "/root/x is hidden from relay.service by ProtectHome=yes" in hidden.err
    assert not Path("/root/x").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "standard input is not a terminal: add --yes"),
        (["--yes", "--source", "gihtub"], 4, 'unknown kind of source "gihtub", did you mean "github"?'),
        (["--yes", "--source", "adorn", "--source", "adorn"], 2, 'two sources have the name "adorn"'),
        (["--yes", "--source", "twilio"], 2, "signs the URL: give its scheme and host with --public-url"),
        (["--yes", "--source", "sendgrid"], 2, "add --secret sendgrid=FILE"),
        (["--yes", "--to", "crm.example.com"], 2, "expected a URL that starts with http"),
        (["--yes", "--to", "generic=http://127.0.0.1:1/"], 2, 'the name "generic" is taken; write NAME=URL'),
        (["--yes", "--secret", "crm=/etc/hostname"], 2, '"crm" has no secret here; names: generic, receiver'),
        (["--yes", "--run", "service"], 1, "relay.service is not installed"),
    ],
)
def test_a_wrong_answer_has_a_hint_and_writes_nothing(tmp_path, monkeypatch, words, code, message):
    monkeypatch.setattr(module, "installed", lambda: None)
    result = run("init", tmp_path / "new", *words, code=code)
    assert message in result.err
    assert not (tmp_path / "new").exists()
