"""The Debian package under a real systemd: install, break, follow the printed advice, recover.

One machine for all tests, which run in their order. Run them with `RELAY_TEST_BOOTED=1 pytest
tests/packaging/test_booted.py`.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import postgres
import pytest
from booted import VARIABLE, Booted, Prometheus, missing
from machines import CHECKOUT, copy_checkout, needs, offline

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

CONFIG = "/etc/relay/config.toml"


def blocks(page):
    """Return the blocks of commands of a page that are marked with `run`, by their name."""
    text = (CHECKOUT / "docs" / page).read_text()
    return dict(re.findall(r"<!-- run: (\w+) -->\n```sh\n(.*?)```", text, re.DOTALL))


BLOCKS = blocks("moving.md")

SEND = r"""
python3 - "$@" <<'END OF PROGRAM'
import json, sys, urllib.error, urllib.request
token, member, most, size = sys.argv[1:]
headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
for number in range(int(most)):
    content = {"event_type": "member_joined", "discord_id": member.replace("#", str(number))}
    body = json.dumps({**content, "metadata": {"text": "x" * int(size)}}).encode()
    request = urllib.request.Request("http://127.0.0.1:8080/internal/event/notify", body, headers)
    try:
        print(urllib.request.urlopen(request, timeout=30).status)
    except urllib.error.HTTPError as error:
        print(error.code)
        break
END OF PROGRAM
"""
"""Sends events until one is refused. Arguments: token, subject (# is the number), how many, size."""

FETCH = """
import sys, urllib.request
url, body = sys.argv[1:]
response = urllib.request.urlopen(url, body.encode() or None, timeout=30)
print(response.headers, response.read().decode(), sep="")
"""
METRICS = "http://127.0.0.1:8081/metrics"
RECEIVER = "systemd-run --unit=receiver --property=Restart=no bash /root/receiver"
UNITS = "relay.socket relay-admin.socket relay.service"


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


@pytest.fixture(scope="module")
def prometheus(vm, tmp_path_factory):
    with Prometheus(vm, tmp_path_factory.mktemp("prometheus")) as prometheus:
        yield prometheus


@pytest.fixture
def small_disk(vm):
    """Keeps the state directory on a file system of 64 MiB; senders leave 16 MiB free."""
    before = vm.get(CONFIG)
    vm.run(f"systemctl stop {UNITS} && cp -a /var/lib/relay /root/state")
    vm.run("mount -t tmpfs -o size=64m,mode=0700,uid=relay,gid=relay tmpfs /var/lib/relay")
    vm.put(CONFIG, f'{before}\n[storage]\nmin_free_disk = "16 MiB"\n[backup]\nevery = "1d"\n')
    vm.run(f"cp -a /root/state/. /var/lib/relay && systemctl start {UNITS}")
    yield
    vm.run(f"systemctl stop {UNITS}; rm -r /root/state; cp -a /var/lib/relay /root/state")
    vm.run("umount /var/lib/relay && rm -rf /var/lib/relay && mv /root/state /var/lib/relay")
    vm.put(CONFIG, before)
    vm.run(f"systemctl start {UNITS}")


def advice(text):
    """Return the commands between backquotes in the output of a command."""
    return re.findall(r"`([^`]+)`", text)


def send(vm, token, member="1"):
    [status] = send_many(vm, token, member, 1)
    return status


def send_many(vm, token, member, most, size=0):
    """Send up to `most` events, until one is refused; return all status codes."""
    result = vm.run(f"send() {{ {SEND} }}; send {token} '{member}' {most} {size}", timeout=300)
    return [int(line) for line in result.out.split()]


def fetch(vm, url, body=""):
    """Return the headers and the body of a response."""
    return vm.run(f"python3 -c '{FETCH}' {url} '{body}'").out


def start_receiver(vm):
    vm.run(RECEIVER)
    vm.until("ss -ltn", ":9000")


def open_circuit(vm, member):
    """Stop the receiver, and send events until its circuit is open."""
    vm.run("systemctl stop receiver")
    assert send_many(vm, "second", member, 8) == [200] * 8
    vm.until("relay destinations list", "circuit open")


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
            start_receiver(vm)
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
    uses = [line.split("\t")[:2] for line in tokens]
    assert uses == [["secrets/moddy", "2"], ["MODDY_TOKEN_2", "1"]]  # `relay send` was the first
    assert 'relay_token_uses_total{source="moddy",token="MODDY_TOKEN_2"} 1.0' in fetch(vm, METRICS)
    edit(vm, lambda text: text.replace(more, '{ env = "MODDY_TOKEN_2" }'))
    vm.run("relay reload")
    assert (send(vm, first), send(vm, "second")) == (403, 200)
    assert pid(vm) == before


def test_the_circuit_of_a_repaired_receiver_is_closed_by_a_test(vm):
    open_circuit(vm, "down-#")
    checks = vm.run("relay doctor", codes=(1,))
    assert re.search(r"held\tFAILED\treceiver: [1-9]\d* pending, circuit open", checks.out)
    assert "held: relay destinations test receiver --close-circuit\n" in checks.err
    assert "circuit" in vm.run("relay destinations resume receiver").err  # it ends pauses only
    shown_advice = advice(vm.run("relay destinations show receiver").err)
    assert shown_advice == ["relay destinations test receiver --close-circuit"]
    failed = vm.run(shown_advice[0], codes=(1,))
    assert "refused" in failed.out + failed.err
    start_receiver(vm)
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


def test_a_restart_without_socket_units_fails_once_and_starts_after_the_correction(vm):
    vm.run(f"systemctl stop {UNITS}")
    before = vm.get(CONFIG)
    vm.put(CONFIG, before + "\n[servre]\n")
    for _ in range(6):  # more than the limit of systemd's default
        vm.run("systemctl start relay.service", codes=(1,))
    state = vm.run("systemctl show -p ExecMainStatus -p NRestarts relay.service").out.split()
    assert set(state) == {"ExecMainStatus=78", "NRestarts=0"}
    assert 'unknown key, did you mean "server"?' in vm.run("journalctl -u relay -o cat -n 20").out
    vm.put(CONFIG, before)
    vm.run(f"relay check-config && systemctl start {UNITS}")
    assert send(vm, "second", "corrected") == 200


def test_commands_of_root_know_the_environment_and_the_user_of_the_service(vm):
    assert 'state_dir = "/var/lib/relay"' in vm.run("relay config show").out
    vm.run("relay send moddy")
    head = "POST /internal/event/notify HTTP/1.1\nAuthorization: Bearer second\nContent-Length: 2\n\n{}"
    vm.put("/root/request", head)
    result = vm.run("relay verify --source moddy --request /root/request", codes=(1,)).out  # no valid body
    assert "matches: sources.moddy.tokens[0]\n" in result
    vm.run("chown root: /etc/relay/secrets/receiver && chmod 600 /etc/relay/secrets/receiver")
    unreadable = vm.run("relay check-config", codes=(1,)).err
    repair, _ = advice(unreadable)
    assert repair.startswith("chgrp relay /etc/relay/secrets/receiver && ")
    vm.run(repair)
    vm.run("relay check-config")


def test_small_things_are_right_the_first_time(vm):
    """Spelling, the receiver's answer, offline reads, JSON Lines, warnings, versions."""
    for command, text in (
        ("relay events list --source modddy", 'unknown source "modddy", did you mean "moddy"?'),
        ("relay deliveries list --destination receivr", 'did you mean "receiver"?'),
    ):
        assert text in vm.run(command, codes=(4,)).err
    vm.run("relay send moddy")
    vm.until("relay deliveries list --state delivered --limit 1 -q")
    [delivery] = vm.run("relay deliveries list --limit 1 -q").out.split()
    [event] = vm.run("relay events list --limit 1 -q").out.split()
    shown_online = [
        vm.run(f"relay {what}").out for what in (f"deliveries show {delivery}", f"events show {event}")
    ]
    assert "\tok\t204\t" in shown_online[0]
    vm.run("systemd-run --unit=lines sh -c 'exec relay listen 9001 --json >/root/lines 2>/dev/null'")
    vm.until("ss -ltn", ":9001")
    for path in ("/0", "/1"):
        fetch(vm, f"http://127.0.0.1:9001{path}", body="{}")
    vm.run("systemctl stop lines")
    assert [json.loads(line)["path"] for line in vm.get("/root/lines").splitlines()] == ["/0", "/1"]
    [test] = advice(vm.run("relay plugins new trial").out)[:1]
    vm.run(test)
    vm.run("rm /etc/relay/plugins.d/*trial.py")
    for address in ("127.0.0.1:8080", "127.0.0.1:8081"):
        answer = fetch(vm, f"http://{address}/health")
        assert "ok" in answer
        assert re.search(r"Server:|\b\d+\.\d+\.\d+", answer, re.IGNORECASE) is None
    vm.run(f"systemctl stop {UNITS}")
    offline_ = [
        vm.run(f"relay {what} --offline").out
        for what in (f"deliveries show {delivery}", f"events show {event}")
    ]
    assert offline_ == shown_online
    vm.run(f"systemctl start {UNITS}")
    started = vm.run("journalctl -u relay -o cat -n 20").out.rpartition("Starting relay.service")[2]
    warnings = [line for line in started.splitlines() if line.startswith("relay")]
    assert warnings
    assert len(warnings) == len(set(warnings))


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
    vm.run(f"systemctl stop {UNITS}")
    refused = vm.run("relay serve", codes=(1,))
    assert (
        "relay.service serves /etc/relay/config.toml with the database /var/lib/relay/relay.db" in refused.err
    )
    vm.run(advice(refused.err)[0])
    vm.run("test ! -e /etc/relay/relay.db")
    assert vm.run(f"systemctl is-active {UNITS}").out.split() == ["active"] * 3
    vm.run(f"systemctl stop {UNITS}")
    stopped = vm.run("relay status", codes=(3,))
    vm.run(advice(stopped.err)[0])
    assert vm.run(f"systemctl is-active {UNITS}").out.split() == ["active"] * 3
    assert "relay: the database is /var/lib/relay/relay.db\n" in vm.run("journalctl -u relay -o cat").out
    assert "database\tok\t/var/lib/relay/relay.db\n" in vm.attempt("relay doctor").out


def test_ten_quick_restarts_reach_no_limit(vm):
    for _ in range(10):
        vm.run("systemctl restart relay")
    assert send(vm, "second", "still-there") == 200
    assert vm.run("systemctl is-active relay.service relay.socket").out == "active\nactive\n"


@needs("prometheus")
def test_alerts_fire_and_are_resolved_by_their_commands(vm, prometheus):
    open_circuit(vm, "alert-#")
    command = prometheus.until_firing("RelayDestinationFailing")
    assert command == "relay destinations show receiver"
    [test] = advice(vm.run(command).err)
    start_receiver(vm)
    [retry] = advice(vm.run(test).err)
    vm.run(f"{retry} --yes")
    prometheus.until_resolved("RelayDestinationFailing")
    vm.until("relay deliveries list --state pending -q | wc -l", "0", 30)

    before = vm.get(CONFIG)
    vm.put(CONFIG, before + "\n[servre]\n")
    vm.run("relay reload", codes=(1,))
    problems = vm.run(prometheus.until_firing("RelayConfigReloadFailed"), codes=(1,)).err
    vm.put(CONFIG, before)
    assert problems.endswith(f"1 problem; correct and run `relay check-config {CONFIG}` again\n")
    vm.run(f"{advice(problems)[0]} && relay reload")
    prometheus.until_resolved("RelayConfigReloadFailed")

    vm.run(f"systemctl stop {UNITS}")
    command = prometheus.until_firing("RelayDown")
    assert "inactive (dead)" in vm.run(command, codes=(3,)).out
    vm.run(f"systemctl start {UNITS}")
    prometheus.until_resolved("RelayDown")


@needs("prometheus")
def test_an_alert_about_a_wrong_token_leads_to_its_sender(vm, prometheus):
    assert [send(vm, "wrong", "unknown") for _ in range(3)] == [403] * 3
    listed = vm.run(prometheus.until_firing("RelayUnauthorized")).out.splitlines()
    assert len(listed) >= 3
    assert all("\tmoddy\tauth\t403\tPOST\t/internal/event/notify\t" in line for line in listed)
    shown = vm.run(f"relay refused show {listed[0].split(chr(9))[1]}").out
    assert "127.0.0.1" in shown
    assert "Authorization: <token>" in shown


@needs("prometheus")
def test_a_full_disk_refuses_senders_and_recovers_without_loss_by_the_advice(vm, prometheus, small_disk):
    """The relay fills the disk, and then another program does."""
    large = 400_000
    taken, deadline = [], time.monotonic() + 120
    while True:  # a checkpoint frees the room of the log
        *more, refused = send_many(vm, "second", f"fill-{len(taken)}-#", 500, large)
        taken += more
        status = vm.run("relay status 2>&1")
        if refused == 503 and "large requests are refused with 503" in status.out:
            break
        assert time.monotonic() < deadline, status
    assert "  df -h /var/lib/relay\n" in status.out
    assert send(vm, "second", "small") == 200

    vm.run("systemctl stop receiver")
    assert send_many(vm, "second", "kept-#", 3) == [200] * 3
    vm.run("dd if=/dev/zero of=/var/lib/relay/others bs=4k status=none", codes=(1,))  # to the last byte
    status = vm.until("relay status 2>&1 || test $? = 1", "not ready: less free space than min_free_disk")
    assert "min_free_disk is 16 MiB\n  df -h /var/lib/relay\n" in status.out
    assert send_many(vm, "second", "refused", 1) == [503]
    assert prometheus.until_firing("RelayStorageFull") == "relay status"
    assert "tmpfs" in vm.run(prometheus.until_firing("RelayDiskLow")).out
    checks = vm.run("relay doctor", codes=(1,))
    assert re.search(r"disk\tFAILED\t.*min_free_disk is 16 MiB", checks.out)
    [find] = re.findall(r"disk: .+: (df -h /var/lib/relay, relay db status)\n", checks.err)
    vm.run(find.replace(", ", " && "))
    # A backup takes no room from senders.
    assert "B free, a copy may need" in vm.run("relay jobs run backup", codes=(1,)).out

    vm.run("rm /var/lib/relay/others")
    vm.until("relay status")
    assert send(vm, "second", "again") == 200
    [shorten] = re.findall(r"or shorten \[retention\] and run: (.+)", checks.err)
    edit(vm, lambda text: text.replace('events = "14d"', 'events = "1s"'))
    listed = "relay events list -q --limit 500 --type '*.member_joined'"
    assert len(vm.run(listed).out.split()) > len(taken)
    vm.run(shorten)
    vm.until(f"{shorten.partition('&& ')[2]}; send() {{ {SEND} }}; send second fits 1 {large}", "200")
    edit(vm, lambda text: text.replace('events = "1s"', 'events = "14d"'))
    vm.run("relay reload")
    pending = vm.run("relay deliveries list --state pending").out
    assert pending.count("receiver") >= 3  # retention deletes no event with a pending delivery
    start_receiver(vm)
    vm.run("relay destinations test receiver --close-circuit")
    vm.run("relay deliveries retry --destination receiver --state pending --yes", codes=(0, 4))
    vm.until("relay deliveries list --state pending -q | wc -l", "0", 30)
    for number in range(3):
        assert vm.run(f"relay events list --subject kept-{number} -q").out
    prometheus.until_resolved("RelayStorageFull")
    assert "conservation\tok" in vm.run("relay doctor", codes=(0, 1)).out


@needs("prometheus")
def test_the_status_shows_a_failed_backup_and_its_advice_resolves_the_alert(vm, prometheus):
    assert shown(vm, "status")["backups"] is None
    edit(vm, lambda text: f'{text}\n[backup]\nevery = "1d"\ndir = "/var/backups/relay"\n')
    vm.run("relay reload && relay status")
    command = prometheus.until_firing("RelayBackupOld")
    failed = vm.run(command, codes=(1,))
    assert "/var/backups/relay: Read-only file system" in failed.out + failed.err
    assert "the last backup failed" in vm.run("relay status").err
    edit(vm, lambda text: text.replace('dir = "/var/backups/relay"\n', ""))
    vm.run(f"relay reload && {command}")
    prometheus.until_resolved("RelayBackupOld")
    assert vm.run("relay status").err == ""
    assert shown(vm, "status")["backups"]["last_success"] is not None
    exported = fetch(vm, METRICS)
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
    commands = blocks("install.md")
    vm.run(commands["backup"])
    kept = set(vm.run("relay events list -q --limit 500").out.split())
    assert send(vm, "second", "after-the-backup") == 200
    vm.run(commands["restore"])
    vm.until("relay status")
    assert set(vm.run("relay events list -q --limit 500").out.split()) == kept
    assert send(vm, "second", "restored") == 200


@pytest.fixture(scope="module")
def postgresql(vm):
    """A PostgreSQL server in the machine's network, with the database of docs/storage.md."""
    folder = Path(tempfile.mkdtemp(prefix="relay-postgres-"))
    settings = ("fsync=on", "full_page_writes=on", "autovacuum=on")
    server = postgres.start(folder, port=5432, settings=settings, keep=True, enter=vm.in_its_network())
    server.run("CREATE ROLE relay LOGIN")
    server.run("CREATE DATABASE relay OWNER relay ENCODING 'UTF8' TEMPLATE template0")
    yield server
    server.crash()
    shutil.rmtree(folder, ignore_errors=True)


@postgres.needs_postgres
def test_the_database_moves_to_postgresql_by_the_commands_of_the_page(vm, postgresql):
    """Afterwards, the daemon is a cluster of one node."""
    vm.run("relay destinations pause receiver")
    assert send(vm, "second", "before-postgresql") == 200
    events = set(vm.run("relay events list -q --limit 500").out.split())
    edit(vm, lambda text: f'{text}\n[storage]\nurl = "postgresql://relay@127.0.0.1/relay"\n')
    assert "backup.every" in vm.run("relay check-config", codes=(1,)).err  # PostgreSQL has its own tools
    edit(vm, lambda text: text.replace('every = "1d"\n', ""))
    assert "restart needed: storage.url" in vm.run("relay reload", codes=(1,)).err
    vm.run("systemctl restart relay")  # before the data is moved
    assert send(vm, "second", "too-early") == 503
    assert (
        "has the events of this relay, with 1 pending delivery; stop the relay"
        in vm.run("relay status", codes=(1,)).err
    )
    moved = vm.run(blocks("storage.md")["postgresql"].replace("db.example", "127.0.0.1"))
    assert "moved and compared: " in moved.out
    vm.until("relay status")
    assert set(vm.run("relay events list -q --limit 500").out.split()) == events
    [pending] = vm.run("relay deliveries list --state pending -q").out.split()
    vm.run("relay destinations resume receiver")
    vm.until(f"relay deliveries show {pending}", "delivered")
    [node] = vm.run("relay nodes").out.splitlines()
    assert node.endswith("\treceiver")
    checks = vm.attempt("relay doctor").out
    assert "conservation\tok" in checks
    assert "nodes\tok" in checks


@postgres.needs_postgres
def test_a_single_node_has_its_lanes_at_once_after_a_restart_and_after_a_crash(vm, postgresql):
    for number, command in enumerate(("systemctl restart relay", "systemctl kill -s KILL relay")):
        vm.run(command)
        assert send(vm, "second", f"node-{number}") == 200
        [delivery] = vm.run(f"relay deliveries list --subject node-{number} -q").out.split()
        vm.until(f"relay deliveries show {delivery}", "delivered", 15)  # less than a lease
    [_] = vm.run("relay nodes").out.splitlines()


@needs("prometheus")
@postgres.needs_postgres
def test_an_outage_of_postgresql_is_reported_and_ends_without_a_restart(vm, prometheus, postgresql):
    before = pid(vm)
    postgresql.crash()
    assert send(vm, "second", "outage") == 503
    for alert in ("RelayStorageFull", "RelayClusterNodeStalled"):
        assert prometheus.until_firing(alert) == "relay status"
        assert send(vm, "second", "outage") == 503
    status = vm.run("relay status", codes=(1,))
    assert "not ready: the store cannot write: " in status.out
    assert "\n  relay doctor\n" in status.err
    assert "check that PostgreSQL runs and accepts connections" in vm.run("relay doctor", codes=(1,)).err
    postgresql.restart()
    vm.until("relay status")
    assert send(vm, "second", "outage-over") == 200
    [delivery] = vm.run("relay deliveries list --subject outage-over -q").out.split()
    vm.until(f"relay deliveries show {delivery}", "delivered")
    for alert in ("RelayStorageFull", "RelayClusterNodeStalled"):
        prometheus.until_resolved(alert)
    assert pid(vm) == before


@needs("prometheus")
@postgres.needs_postgres
def test_a_node_with_another_configuration_is_found_by_the_alert(vm, prometheus, postgresql):
    other = """
state_dir = "/root/other"
[server]
listen = "127.0.0.1:8090"
[admin]
listen = "127.0.0.1:8091"
[storage]
url = "postgresql://relay@127.0.0.1/relay"
[cluster]
node = "other"
"""
    vm.put("/root/other.toml", other)
    vm.run("systemd-run --unit=other relay serve -c /root/other.toml")
    nodes = vm.run(prometheus.until_firing("RelayClusterConfigDiffers")).out.splitlines()
    named = {line.split("\t")[0]: line.split("\t")[4] for line in nodes}
    assert len(named) == len(set(named.values())) == 2
    assert "other" in named
    assert send(vm, "second", "beside-the-other") == 200
    [delivery] = vm.run("relay deliveries list --subject beside-the-other -q").out.split()
    vm.until(f"relay deliveries show {delivery}", "delivered")  # the other node takes no lane
    vm.run("systemctl stop other")
    prometheus.until_resolved("RelayClusterConfigDiffers")
    assert vm.run("relay status").err == ""
