"""docs/moving.md: its commands move a relay from one folder to another, with all that the page promises."""

import re
import subprocess
from pathlib import Path

import pytest
from commands import run
from daemons import Daemon, Recorder, adorn, destination
from support import until
from wire import exchange, request

PAGE = (Path(__file__).parents[2] / "docs" / "moving.md").read_text()
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```sh\n(.*?)```", PAGE, re.DOTALL))
WORKER = {"Authorization": "Bearer a-worker-token"}
KEY = {"Idempotency-Key": "order-1"}

CONFIG = """\
state_dir = "../../var/lib/relay"
[server]
listen = "127.0.0.1:0"
[admin]
listen = "127.0.0.1:0"
[sources.adorn]
plugin = "adorn"
tokens = [{{ file = "secrets/adorn" }}]
[sources.whatsapp]
plugin = "whatsapp"
tokens = [{{ file = "secrets/whatsapp" }}]
{destinations}
"""

SHIMS = """\
systemctl() { echo "systemctl $*"; }
scp() { echo "scp $*"; }
"""


def machine(folder, url):
    """Make a machine with the files of an installation, and return its config.toml."""
    etc = folder / "etc" / "relay"
    (etc / "secrets").mkdir(parents=True)
    (folder / "var" / "lib" / "relay").mkdir(parents=True)
    for name in ("adorn", "whatsapp"):
        secret = etc / "secrets" / name
        secret.write_text({"adorn": "an-adorn-token", "whatsapp": "a-worker-token"}[name])
        secret.chmod(0o600)
    (etc / "secrets" / "crm").write_text("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    both = [
        destination(name, url).replace(
            '["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]', '[{ file = "secrets/crm" }]'
        )
        for name in ("crm", "erp")
    ]
    config = etc / "config.toml"
    config.write_text(CONFIG.format(destinations="\n".join(both)))
    return config


def follow(block, root, cwd):
    """Run a block of the page with `/` as another folder; systemd and the network are only named."""
    script = f"{SHIMS}{BLOCKS[block]}".replace("-C / ", f"-C {root} ")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(("systemctl ", "scp "))]


def test_the_move_is_five_commands():
    lines = [line for name in ("old", "new") for line in BLOCKS[name].splitlines()]
    assert len(lines) == 5


async def sent(daemon, session, **headers):
    headers |= {"Authorization": "Bearer an-adorn-token"}
    return await exchange(daemon.url, request("POST", "/v1/events", adorn(session), **headers))


async def test_a_relay_moves_with_pending_deliveries_workers_secrets_and_idempotency_keys(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    new.mkdir()
    async with Recorder() as recorder:
        config = machine(old, recorder.url)
        daemon = Daemon(config)
        door = old / "var/lib/relay/relay.sock"
        async with daemon:
            for name in ("crm", "erp"):
                run_at(door, "destinations", "pause", name)
            first = await sent(daemon, "s-1", **KEY)
            path = "/api/v1/workers/worker-1/heartbeat"
            assert (await exchange(daemon.url, request("PUT", path, b"{}", **WORKER))).status == 200
            assert await daemon.stop() == 0
        assert follow("old", old, tmp_path) == [
            "systemctl disable --now relay.socket relay-admin.socket relay.service",
            "scp relay-move.tgz root@new.example.com:",
        ]
        assert follow("new", new, tmp_path) == [
            "systemctl daemon-reload",
            "systemctl enable --now relay.socket relay-admin.socket relay.service",
        ]
        secret = new / "etc/relay/secrets/adorn"
        assert (secret.stat().st_mode & 0o777, secret.read_text()) == (0o600, "an-adorn-token")
        async with Daemon(new / "etc/relay/config.toml") as daemon:
            door = new / "var/lib/relay/relay.sock"
            again = await sent(daemon, "s-1", **KEY)
            assert (again.status, again.json) == (first.status, first.json)
            assert len(run_at(door, "events", "list", "--source", "adorn").rows) == 1
            assert run_at(door, "workers", "list").rows[0][0] == "worker-1"
            assert (
                len(run_at(door, "deliveries", "list", "--state", "pending", "--source", "adorn").rows) == 2
            )
            assert recorder.ids == []
            for line in BLOCKS["check"].splitlines():
                run_at(door, *line.split()[1:], code=1 if line == "relay doctor" else 0)  # finds the pauses
            run_at(door, "destinations", "resume", "crm")
            await until(lambda: len(recorder.ids) == 2)
            [held] = [
                row for row in run_at(door, "destinations", "list", "--json").json["items"] if row["held"]
            ]
            assert held["name"] == "erp"
            await daemon.stop()


def run_at(door, *words, code=0):
    return run(*words, "--socket", door, code=code)


@pytest.mark.parametrize("folder", ["etc/relay", "var/lib/relay", "etc/systemd/system/relay.service.d"])
def test_the_archive_has_every_folder_that_the_page_names(folder):
    assert f"`/{folder}`" in PAGE
    assert f" {folder}" in BLOCKS["old"]
