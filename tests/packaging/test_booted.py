"""The Debian package under a real systemd: install, break, follow the printed advice, recover.

One machine for all tests, which run in their order. Run them with `RELAY_TEST_BOOTED=1 pytest
tests/packaging/test_booted.py`.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from booted import VARIABLE, Booted, missing
from machines import CHECKOUT, copy_checkout, offline

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

CONFIG = "/etc/relay/config.toml"
MOVING = (CHECKOUT / "docs" / "moving.md").read_text()
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```sh\n(.*?)```", MOVING, re.DOTALL))

SEND = r"""
python3 - "$@" <<'END OF PROGRAM'
import sys, urllib.error, urllib.request
token, member = sys.argv[1:] or ("second", "1")
body = b'{"event_type":"member_joined","discord_id":"%s","metadata":{}}' % member.encode()
headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
request = urllib.request.Request("http://127.0.0.1:8080/internal/event/notify", body, headers)
try:
    print(urllib.request.urlopen(request, timeout=30).status)
except urllib.error.HTTPError as error:
    print(error.code)
END OF PROGRAM
"""


@pytest.fixture(scope="module")
def package(request, tmp_path_factory):
    """A folder with the package."""
    folder = tmp_path_factory.mktemp("package")
    given = os.environ[VARIABLE]
    if given.endswith(".deb"):
        (folder / Path(given).name).write_bytes(Path(given).read_bytes())
        return folder
    wheels = request.getfixturevalue("wheels")
    checkout = copy_checkout(folder / "hookferry")
    subprocess.run(
        ["packaging/deb/build", folder],
        cwd=checkout, env={**os.environ, **offline(wheels)}, check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def vm(package):
    with Booted(package) as vm:
        yield vm


def advice(text):
    """Return the commands between backquotes in the output of a command."""
    return re.findall(r"`([^`]+)`", text)


def send(vm, token, member="1"):
    return int(vm.run(f"send() {{ {SEND} }}; send {token} {member}").out)


def pid(vm):
    return vm.run("systemctl show -P MainPID relay.service").out.strip()


def shown(vm, command):
    return json.loads(vm.run(f"relay {command} --json").out)


def edit(vm, change):
    before = vm.get(CONFIG)
    after = change(before)
    assert after != before
    vm.put(CONFIG, after)


def token_of(vm):
    return vm.get("/etc/relay/secrets/moddy").strip()


def test_an_installation_starts_nothing_and_the_commands_of_init_work_as_printed(vm):
    vm.run("cd /shared && apt-get install -y ./hookferry_*.deb")
    units = "relay.service relay.socket relay-admin.socket"
    assert vm.run(f"systemctl is-enabled {units}", codes=(1,)).out.split() == ["disabled"] * 3
    assert vm.run(f"systemctl is-active {units}", codes=(3,)).out.split() == ["inactive"] * 3
    refused = vm.run("relay init --yes --run service --source moddy", codes=(1,))
    assert f"{CONFIG} already exists; nothing was written\n  --overwrite replaces it" in refused.err
    words = "--source moddy --source github --to receiver=http://127.0.0.1:9000/"
    result = vm.run(f"relay init --yes --run service {words} --overwrite").out
    _, _, end = result.partition("\nTry it (a command with … keeps running: use another terminal):\n\n")
    for line in map(str.strip, end.splitlines()):
        command, _, keeps_running = line.partition("   # ")
        if keeps_running:
            vm.put("/root/receiver", f"exec {command}")
            vm.run("systemd-run --unit=receiver --property=Restart=no bash /root/receiver")
            vm.until("ss -ltn", ":9000")
        else:
            vm.run(command)
    vm.until("relay deliveries list --state delivered -q | wc -l", "2")
    assert "signature ok" in vm.run("journalctl -u receiver -o cat").out
    modes = vm.run("stat -c '%a %U %n' /etc/relay/secrets /etc/relay/secrets/moddy").out
    assert modes == "700 relay /etc/relay/secrets\n600 relay /etc/relay/secrets/moddy\n"


def test_a_token_is_rotated_by_environment_file_and_reload_without_a_restart(vm):
    before = pid(vm)
    first = token_of(vm)
    more = '{ file = "secrets/moddy" }, { env = "MODDY_TOKEN_2" }'
    edit(vm, lambda text: text.replace('{ file = "secrets/moddy" }', more))
    for command in ("relay check-config", "relay reload", "systemctl reload relay"):
        result = vm.run(command, codes=(1,))
        if command.startswith("relay"):
            assert "MODDY_TOKEN_2 is not set; set it (under systemd in /etc/relay/environment)" in result.err
    vm.run("echo \"MODDY_TOKEN_2='second'\" >>/etc/relay/environment")
    vm.run("relay check-config && systemctl reload relay")
    assert (send(vm, first), send(vm, "second"), send(vm, "wrong")) == (200, 200, 403)
    tokens = vm.run("relay sources show moddy").out.splitlines()[-2:]
    assert [line.split("\t")[0] for line in tokens] == ["secrets/moddy", "MODDY_TOKEN_2"]
    edit(vm, lambda text: text.replace(more, '{ env = "MODDY_TOKEN_2" }'))
    vm.run("relay reload")
    assert (send(vm, first), send(vm, "second")) == (403, 200)
    assert pid(vm) == before


def test_the_circuit_of_a_repaired_receiver_is_closed_by_a_test(vm):
    vm.run("systemctl stop receiver")
    for number in range(8):
        assert send(vm, "second", f"down-{number}") == 200
    vm.until("relay destinations list", "circuit open")
    shown_advice = advice(vm.run("relay destinations show receiver").err)
    assert shown_advice == ["relay destinations test receiver --close-circuit"]
    failed = vm.run(shown_advice[0], codes=(1,))
    assert "refused" in failed.out + failed.err
    vm.run("systemd-run --unit=receiver --property=Restart=no bash /root/receiver")
    vm.until("ss -ltn", ":9000")
    [retry] = advice(vm.run(shown_advice[0]).err)
    vm.run(f"{retry} --yes")
    vm.until("relay deliveries list --state pending -q | wc -l", "0", 30)


def test_the_journal_has_fields_to_search_by(vm):
    vm.run("relay destinations pause receiver && relay destinations resume receiver")
    vm.until("journalctl -q DESTINATION=receiver -o cat", "paused by an operator")
    [event] = vm.run("relay events list --subject down-0 -q").out.split()
    vm.until(f"journalctl -q EVENT_ID={event} -o cat", "receiver")
    audit = vm.run("journalctl -q -u relay LOGGER=relay.audit -o cat").out
    assert re.search(r"root \(uid 0\), pid \d+: POST /api/destinations/receiver/pause: 200", audit)
    assert vm.run("journalctl -q SOURCE=moddy --grep=refused -o cat").out
    assert "LOGGER=relay.audit" in vm.run("journalctl -q LOGGER=relay.audit -o verbose -n 1").out


def test_check_config_reports_all_faults_at_once(vm):
    before = vm.get(CONFIG)
    faults = (
        '\n[sources.a]\nplugin = "adron"\n[sources.b]\nplugin = "moddy"\ntokens = [{ env = "NOT_SET" }]\n'
        '[destinations.c]\nurl = "crm.example"\n[destinations.d]\nurl = "https://d.example"\n'
        'ca_file = "gone.pem"\n'
        '[servre]\nlisten = "x"\n'
    )
    vm.put(CONFIG, before + faults)
    result = vm.run("relay check-config", codes=(1,)).err
    texts = ('did you mean "adorn"?', "NOT_SET is not set", "starts with http", "gone.pem", '"server"?')
    assert [text for text in texts if text not in result] == [], result
    assert "5 problems; correct and run" in result
    vm.put(CONFIG, before)
    vm.run("relay check-config")


def test_socket_units_and_their_addresses_are_explained(vm):
    vm.run("systemctl stop relay && systemctl enable --now relay.socket relay-admin.socket relay.service")
    edit(vm, lambda text: text.replace('listen = "127.0.0.1:8080"', 'listen = "127.0.0.1:8085"'))
    result = vm.run("relay check-config")
    assert 'server.listen: "127.0.0.1:8085" has no effect' in result.err
    assert "relay.socket listens on 127.0.0.1:8080" in result.err
    change, restart = advice(result.err)
    assert change == "systemctl edit relay.socket"
    vm.run("mkdir -p /etc/systemd/system/relay.socket.d")
    vm.put(
        "/etc/systemd/system/relay.socket.d/override.conf",
        "[Socket]\nListenStream=\nListenStream=127.0.0.1:8085",
    )
    vm.run(f"systemctl daemon-reload; {restart}")  # `systemctl edit` reloads the units as well
    assert vm.run("relay check-config").err == ""
    vm.run("relay send moddy")
    vm.run("ss -ltn | grep -q 127.0.0.1:8085")
    edit(vm, lambda text: text.replace("127.0.0.1:8085", "127.0.0.1:8080"))
    vm.run(f"rm -r /etc/systemd/system/relay.socket.d; systemctl daemon-reload; {restart}")
    assert vm.run("relay check-config").err == ""
    assert send(vm, "second", "by-socket") == 200


def test_a_restart_with_a_broken_configuration_refuses_with_503_and_recovers_by_the_advice(vm):
    before = vm.get(CONFIG)
    vm.put(CONFIG, before + "\n[servre]\n")
    vm.run("systemctl restart relay")
    assert send(vm, "second", "standby") == 503
    status = vm.run("relay status", codes=(1,))
    assert 'unknown key, did you mean "server"?' in status.out + status.err
    assert "relay reload" in status.out + status.err
    assert vm.run("systemctl is-active relay").out == "active\n"
    vm.put(CONFIG, before)
    vm.run("relay reload")
    vm.until("relay status")
    assert send(vm, "second", "recovered") == 200


def test_a_killed_daemon_comes_back_with_its_events(vm):
    before = vm.run("relay events list -q").out.splitlines()
    main = pid(vm)
    vm.run(f"kill -9 {main}")
    assert send(vm, "second", "killed") == 200  # the socket units hold the connection
    after = vm.run("relay events list -q").out.splitlines()
    assert set(before) < set(after)
    assert pid(vm) != main


def test_a_user_without_permission_joins_the_group_that_the_error_names(vm):
    vm.run("useradd --create-home olga")
    refused = vm.run("runuser -u olga -- relay status", codes=(5,))
    [command] = advice(refused.err)
    assert command == "adduser NAME relay"
    vm.run(command.replace("NAME", "olga"))
    vm.run("runuser -l olga -c 'relay status'")
    vm.run("runuser -l olga -c 'relay destinations pause receiver && relay destinations resume receiver'")
    audit = vm.run("journalctl -q LOGGER=relay.audit -o cat").out
    assert re.search(r"olga \(uid \d+\), pid \d+: POST /api/destinations/receiver/pause: 200", audit)
    configuration = vm.run("runuser -u nobody -- relay check-config", codes=(5,))
    assert "run the command as root, or as a member of the group relay" in configuration.err


def test_no_second_daemon_starts_beside_the_service_or_its_database(vm):
    vm.run("systemctl stop relay.socket relay-admin.socket relay.service")
    refused = vm.run("relay serve", codes=(1,))
    assert (
        "relay.service serves /etc/relay/config.toml with the database /var/lib/relay/relay.db" in refused.err
    )
    vm.run(advice(refused.err)[0])
    vm.run("test ! -e /etc/relay/relay.db")
    units = "relay.service relay.socket relay-admin.socket"
    assert vm.run(f"systemctl is-active {units}").out.split() == ["active"] * 3
    vm.run(f"systemctl stop {units}")
    stopped = vm.run("relay status", codes=(3,))
    vm.run(advice(stopped.err)[0])
    assert vm.run(f"systemctl is-active {units}").out.split() == ["active"] * 3


def test_ten_quick_restarts_reach_no_limit(vm):
    for _ in range(10):
        vm.run("systemctl restart relay")
    assert send(vm, "second", "still-there") == 200
    assert vm.run("systemctl is-active relay.service relay.socket").out == "active\nactive\n"


def test_a_backup_is_on_display_and_survives_a_purge(vm):
    assert shown(vm, "status")["backups"] is None
    edit(vm, lambda text: f'{text}\n[backup]\nevery = "1d"\n')
    vm.run("relay reload")
    vm.run("relay db backup")
    assert shown(vm, "status")["backups"]["last_success"] is not None
    metrics = "python3 -c 'import urllib.request as u; print(u.urlopen(\"http://127.0.0.1:8081/metrics\").read().decode())'"
    exported = vm.run(metrics).out
    assert re.search(r"^relay_backup_last_success_timestamp_seconds [1-9]", exported, re.MULTILINE)
    assert re.search(r"^relay_backup_size_bytes [1-9]", exported, re.MULTILINE)


def test_the_relay_moves_by_the_five_commands_of_the_page(vm):
    """To the same machine, after a purge: as on a new one, only the package is there."""
    events = vm.run("relay events list -q --limit 500").out
    vm.run("relay destinations pause receiver")
    assert send(vm, "second", "moved") == 200
    vm.run(f"scp() {{ :; }}\n{BLOCKS['old']}")
    assert (
        vm.run("systemctl is-active relay.service relay.socket", codes=(3,)).out.split() == ["inactive"] * 2
    )
    result = vm.run("apt-get purge -y hookferry").out
    assert "Backups of hookferry stay in /var/lib/relay" in result
    left = vm.run("find /var/lib/relay -type f").out.split()
    assert left
    assert all(re.fullmatch(r".*/backups/relay-\d+T\d+Z\.db", path) for path in left)
    assert vm.run("ls -d /etc/relay /opt/relay", codes=(2,)).out == ""
    vm.run("cd /shared && apt-get install -y ./hookferry_*.deb")
    vm.run(BLOCKS["new"])
    vm.run(BLOCKS["check"].replace("relay doctor", "relay doctor || test $? = 1"))
    assert set(events.split()) < set(vm.run("relay events list -q --limit 500").out.split())
    [pending] = vm.run("relay deliveries list --state pending --subject moved -q").out.split()
    vm.run("relay destinations resume receiver")
    vm.until(f"relay deliveries show {pending}", "delivered")
    assert send(vm, "second", "after-the-move") == 200


def test_a_backup_is_restored_after_a_loss_by_the_commands_of_the_page(vm):
    page = (CHECKOUT / "docs" / "install.md").read_text()
    blocks = dict(re.findall(r"<!-- run: (\w+) -->\n```sh\n(.*?)```", page, re.DOTALL))
    vm.run(blocks["backup"])
    kept = set(vm.run("relay events list -q --limit 500").out.split())
    assert send(vm, "second", "after-the-backup") == 200
    vm.run(blocks["restore"])
    vm.until("relay status")
    assert set(vm.run("relay events list -q --limit 500").out.split()) == kept
    assert send(vm, "second", "restored") == 200
