"""Reloads of the whole relay: applied changes, refused changes, and no effect on anything else."""

import asyncio
import itertools
import json
import signal
import sys
from collections import Counter

import pytest
from commands import Commands
from daemons import SOURCES, Daemon, Recorder, adorn, destination, running, write_config
from support import FakeClock, until
from wire import Wire, exchange, request

from relay.base.clock import SECOND

RELAY = (sys.executable, "-c", "from relay.cli import main; main()")
ADORN = "/v1/events"
MODDY = json.dumps(
    {"type": "event", "event_type": "member_joined", "discord_id": "1", "metadata": {}}
).encode()
MISSPELT = "[server]\nmax_boddy = 1\n"


@pytest.fixture
async def crm():
    async with Recorder() as recorder:
        yield recorder


@pytest.fixture
async def other():
    async with Recorder() as recorder:
        yield recorder


async def ask(relay, method="POST", path="/api/reload"):
    return await exchange(relay.addresses.socket, request(method, path))


async def reload(relay):
    answer = await ask(relay)
    assert answer.status == 200, answer
    return {name: answer.json[name] for name in ("added", "changed", "removed")}


async def send(relay, session="s"):
    answer = await relay.exchange(request("POST", ADORN, adorn(session)))
    assert answer.status == 200, answer
    return answer.json["event_id"]


def say(answer):
    return answer.status, answer.json["error"]["code"]


# --- applied changes ----------------------------------------------------------------------------------


def place_of(config, key):
    """Return the file and line of the only line that sets a key."""
    [line] = [
        at for at, text in enumerate(config.read_text().splitlines(), 1) if text.startswith(f"{key} = ")
    ]
    return f"config.toml:{line}"


async def test_a_dry_run_shows_the_changed_keys_and_changes_nothing(tmp_path, crm):
    keys = 'headers = { authorization = "Bearer one" }\ntimeout = "10s"'
    config = write_config(tmp_path, SOURCES, destination("crm", crm.url, keys))
    async with running(config) as relay:
        before = relay.app.config
        text = config.read_text().replace("Bearer one", "Bearer two").replace('"10s"', '"5s"')
        config.write_text(text + destination("new", crm.url))
        answer = await exchange(relay.addresses.socket, request("POST", "/api/reload", b'{"dry_run": true}'))
        assert relay.app.config is before
        assert answer.json["added"] == ["destinations.new"]
        assert answer.json["changed"] == ["destinations.crm"]
        hidden = {"authorization": "<secret>"}
        places = [place_of(config, key) for key in ("headers", "timeout")]
        expected = [
            {
                "table": "destinations.crm",
                "key": "headers",
                "before": hidden,
                "after": hidden,
                "place": places[0],
            },
            {
                "table": "destinations.crm",
                "key": "timeout",
                "before": "10s",
                "after": "5s",
                "place": places[1],
            },
        ]
        assert answer.json["keys"] == expected
        assert (await ask(relay)).json["keys"] == expected
        assert relay.app.config.destinations["crm"].timeout == 5.0
        assert (await ask(relay)).json["keys"] == []


async def test_relay_reload_prints_the_changed_keys(tmp_path, crm):
    config = write_config(tmp_path, SOURCES, destination("crm", crm.url, 'timeout = "10s"'))
    async with running(config) as relay:
        commands = Commands(relay.addresses.socket)
        config.write_text(config.read_text().replace('timeout = "10s"', 'timeout = "5s"'))
        planned = await commands("reload", "--dry-run")
        assert planned.out.splitlines() == [
            f"a reload of {config} would make these changes: changed destinations.crm",
            f'  destinations.crm: timeout: "10s" -> "5s" ({place_of(config, "timeout")})',
        ]
        done = await commands("reload")
        assert done.out.splitlines()[0] == f"reloaded {config}: changed destinations.crm"
        assert done.out.splitlines()[1:] == planned.out.splitlines()[1:]
        assert (await commands("reload", "--dry-run")).out == f"a reload of {config}: no changes\n"


async def test_a_dry_run_reports_problems_and_changes_that_need_a_restart(tmp_path, crm):
    config = write_config(tmp_path, SOURCES, destination("crm", crm.url))
    valid = config.read_text()
    async with running(config) as relay:
        for text, status, code in (
            (valid + "\n[destinations.bad]\n", 400, "bad_config"),
            (valid.replace("[storage]", '[storage]\ndurability = "normal"'), 409, "restart_needed"),
        ):
            config.write_text(text)
            answer = await exchange(
                relay.addresses.socket, request("POST", "/api/reload", b'{"dry_run": true}')
            )
            assert (answer.status, answer.json["error"]["code"]) == (status, code), text


async def test_a_reload_reports_its_changes(tmp_path, crm):
    config = write_config(tmp_path, SOURCES, destination("crm", crm.url), destination("old", crm.url))
    async with running(config) as relay:
        assert await reload(relay) == {"added": [], "changed": [], "removed": []}
        changed = SOURCES.replace("worker-secret-token-12345", "another")
        write_config(
            tmp_path, changed, destination("crm", crm.url), destination("new", crm.url),
            '[retention]\nworker_metrics = "1d"',
        )  # fmt: skip
        assert await reload(relay) == {
            "added": ["destinations.new"],
            "changed": ["retention", "sources.whatsapp"],
            "removed": ["destinations.old"],
        }
        assert relay.app.config.retention.worker_metrics == 86_400


async def test_a_rotated_token_is_valid_after_the_reload(tmp_path):
    config = write_config(tmp_path, SOURCES)

    async def status(token):
        raw = request("POST", "/internal/event/notify", MODDY, authorization=f"Bearer {token}")
        return (await relay.exchange(raw)).status

    async with running(config) as relay:
        assert (await status("dev-token"), await status("new-token")) == (200, 403)
        write_config(tmp_path, SOURCES.replace('"moddy"\ntokens = ["dev-', '"moddy"\ntokens = ["new-'))
        await reload(relay)
        assert (await status("dev-token"), await status("new-token")) == (403, 200)


async def test_a_reload_adds_and_removes_sources_with_their_paths_and_metrics(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with running(config) as relay:
        await send(relay)
        second = '[sources.adorn2]\nplugin = "adorn"\nprefix = "/second"\n'
        write_config(tmp_path, SOURCES.replace('[sources.adorn]\nplugin = "adorn"\n', second))
        await reload(relay)
        assert relay.counted("relay_events_received_total", source="adorn2") == 0
        assert (await relay.exchange(request("POST", f"/second{ADORN}", adorn()))).status == 200
        assert (await relay.exchange(request("POST", ADORN, adorn()))).status == 404
    assert [row["source"] for row in await stored(relay)] == ["adorn", "adorn2"]


async def stored(relay):
    async with running(relay.app.config.path) as again:
        return await again.rows()


async def test_a_request_in_progress_uses_the_configuration_it_began_with(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with running(config) as relay, await Wire.open(relay.addresses.public) as slow:
        raw = request("POST", ADORN, adorn("under way"), expect="100-continue")
        await slow.send(raw[:-10])
        assert (await slow.answer()).status == 100
        write_config(tmp_path, SOURCES.replace('[sources.adorn]\nplugin = "adorn"\n', ""))
        await reload(relay)
        await slow.send(raw[-10:])
        answer = await slow.answer()
        assert answer.status == 200
        [row] = await relay.rows()
        assert row["id"] == answer.json["event_id"]
        assert relay.counted("relay_events_received_total", source="adorn") == 1


async def test_an_unchanged_rate_limit_keeps_its_count(tmp_path):
    limited = SOURCES.replace('plugin = "adorn"', 'plugin = "adorn"\nrate_limit = "2/h"')
    async with running(write_config(tmp_path, limited)) as relay:
        await send(relay)
        await send(relay)
        await reload(relay)
        assert (await relay.exchange(request("POST", ADORN, adorn()))).status == 429
        write_config(tmp_path, limited.replace("2/h", "3/h"))
        await reload(relay)
        assert (await relay.exchange(request("POST", ADORN, adorn()))).status == 200


async def test_a_repetition_is_recognised_across_a_reload(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with running(config) as relay:
        async with await Wire.open(relay.addresses.public) as wire:
            await wire.send(request("POST", ADORN, adorn("once")))
        await until(lambda: relay.counted("relay_events_received_total", source="adorn") == 1)
        await reload(relay)
        await relay.exchange(request("POST", ADORN, adorn("once")))
        assert relay.counted("relay_events_duplicate_total", source="adorn") == 1


async def test_a_changed_url_counts_while_an_attempt_hangs_at_the_old_one(tmp_path, crm, other):
    crm.open.clear()
    config = write_config(tmp_path, SOURCES, destination("crm", crm.url, "concurrency = 1"))
    async with running(config) as relay:
        first = await send(relay, "hangs")
        await until(lambda: crm.busy == 1)
        write_config(tmp_path, SOURCES, destination("crm", other.url, "concurrency = 2"))
        await reload(relay)
        second = await send(relay, "continues")
        await until(lambda: other.ids == [second])
        crm.open.set()
        await until(lambda: finished(relay, "crm", "delivered") == 2)
    assert crm.ids == [first]


def finished(relay, name, outcome):
    return relay.counted("relay_deliveries_finished_total", destination=name, outcome=outcome)


async def test_filters_and_replays_use_the_new_routes(tmp_path, crm):
    crm_only = destination("crm", crm.url, 'where = { subject = "a" }')
    async with running(write_config(tmp_path, SOURCES, crm_only)) as relay:
        unwanted = await send(relay, "b")
        assert crm.ids == []
        write_config(tmp_path, SOURCES, crm_only.replace('"a"', '"b"'))
        await reload(relay)
        wanted = await send(relay, "b")
        await until(lambda: crm.ids == [wanted])
        body = json.dumps({"events": [unwanted]}).encode()
        await exchange(relay.addresses.socket, request("POST", "/api/replays", body))
        await until(lambda: crm.ids == [wanted, unwanted])
        explained = await relay.operator("GET", f"/api/events/{unwanted}/explain")
        assert [each["matches"] for each in explained["destinations"]] == [True]


async def test_worker_rules_and_the_sweep_interval_change_with_a_reload(tmp_path):
    clock = FakeClock()
    token = {"authorization": "Bearer worker-secret-token-12345"}
    beat = request("PUT", "/api/v1/workers/w1/heartbeat", b"{}", **token)
    async with running(write_config(tmp_path, SOURCES), clock=clock) as relay:
        write_config(tmp_path, SOURCES, '[workers]\noffline_after = "2s"\ncheck_every = "1s"\n')
        await relay.app.watch.sweep()
        clock.advance(9)
        await reload(relay)
        assert relay.app.watch.interval == 1.0
        assert (await relay.exchange(beat)).status == 200
        for _ in range(3):
            clock.advance(1)
            await relay.app.watch.sweep()
        assert [row["type"] for row in await relay.rows()] == [
            "whatsapp.worker.registered",
            "whatsapp.worker.offline",
        ]


# --- destinations that leave and return ---------------------------------------------------------------


async def test_deliveries_of_a_removed_destination_are_held_visibly_until_it_returns(tmp_path, crm, other):
    both = destination("crm", crm.url), destination("audit", other.url)
    other.open.clear()
    config = write_config(tmp_path, SOURCES, *both)
    async with running(config) as relay:
        ids = [await send(relay, f"session {number}") for number in range(20)]
        await until(lambda: other.busy == 8)
        write_config(tmp_path, SOURCES, both[0])
        await reload(relay)
        await send(relay, "while it is gone")
        [_, audit] = (await relay.operator("GET", "/api/destinations"))["items"]
        assert (audit["name"], audit["held"], audit["in_flight"]) == ("audit", "not_in_config", 8)
        assert audit["pending"] == 20
        assert await states(relay, "audit") == {"in_flight": 8, "held": 12, "due": 0, "waiting": 0}
        other.open.set()
        await until(lambda: finished(relay, "audit", "delivered") == 8)
        shown = await relay.operator("GET", "/api/destinations/audit")
        assert (shown["held"], shown["in_flight"], shown["pending"]) == ("not_in_config", 0, 12)
        assert await states(relay, "audit") == {"in_flight": 0, "held": 12, "due": 0, "waiting": 0}
    async with running(config) as relay:
        assert len(other.ids) == 8
        write_config(tmp_path, SOURCES, *both)
        await reload(relay)
        await until(lambda: len(other.ids) == 20)
        await until(lambda: finished(relay, "audit", "delivered") == 12)
        assert len((await relay.operator("GET", "/api/destinations"))["items"]) == 2
    assert Counter(other.ids) == Counter(ids)


async def states(relay, name):
    """Return a destination's pending deliveries by state, from the metrics."""
    await relay.app.ledger_check.check()
    assert relay.counted("relay_deliveries_unaccounted", destination=name) == 0
    return {
        state: relay.counted("relay_deliveries_pending", destination=name, state=state)
        for state in ("in_flight", "held", "due", "waiting")
    }


async def test_pending_deliveries_of_a_removed_destination_can_be_cancelled(tmp_path, crm):
    config = write_config(tmp_path, SOURCES, destination("crm", crm.url))
    async with running(config) as relay:
        await relay.operator("POST", "/api/destinations/crm/pause")
        await send(relay)
        write_config(tmp_path, SOURCES)
        await reload(relay)
        body = json.dumps({"filter": {"destination": "crm"}}).encode()
        answer = await exchange(relay.addresses.socket, request("POST", "/api/deliveries/cancel", body))
        assert answer.json == {"cancelled": 1, "in_flight": 0}
        assert (await relay.operator("GET", "/api/destinations"))["items"] == []
        write_config(tmp_path, SOURCES, destination("crm", crm.url))
        await reload(relay)
        [crm_] = (await relay.operator("GET", "/api/destinations"))["items"]
        assert (crm_["held"], crm_["pending"]) == ("paused", 0)


# --- pauses of sources --------------------------------------------------------------------------------


async def test_a_source_stays_paused_over_reloads_restarts_and_its_removal(tmp_path):
    config = write_config(tmp_path, SOURCES)

    async def status():
        return (await relay.exchange(request("POST", ADORN, adorn()))).status

    async with running(config) as relay:
        await relay.operator("POST", "/api/sources/adorn/pause")
        await reload(relay)
        assert await status() == 503
    async with running(config) as relay:
        assert await status() == 503
        write_config(tmp_path)
        await reload(relay)
        assert await status() == 404
        write_config(tmp_path, SOURCES)
        await reload(relay)
        assert await status() == 503
        await relay.operator("POST", "/api/sources/adorn/resume")
        assert await status() == 200
    async with running(config) as relay:
        assert await status() == 200


async def test_a_pause_while_a_reload_is_being_prepared_is_kept(tmp_path, monkeypatch):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        plan = relay.app.dispatcher.plan

        async def pause_meanwhile(destinations):
            await relay.operator("POST", "/api/sources/adorn/pause")
            return await plan(destinations)

        monkeypatch.setattr(relay.app.dispatcher, "plan", pause_meanwhile)
        await reload(relay)
        assert (await relay.exchange(request("POST", ADORN, adorn()))).status == 503


# --- refused changes ----------------------------------------------------------------------------------


async def test_an_invalid_file_changes_nothing_and_every_problem_is_reported(tmp_path, crm):
    config = write_config(tmp_path, SOURCES, destination("crm", crm.url))
    good = config.read_text()
    async with running(config) as relay:
        before = relay.app.config
        config.write_text(
            good.replace("concurrency", "").replace('plugin = "moddy"', 'plugin = "muddy"') + "[x]"
        )
        answer = await ask(relay)
        assert say(answer) == (400, "bad_config")
        problems = answer.json["error"]["problems"]
        assert [problem["key"] for problem in problems] == ["sources.moddy.plugin", "x"]
        assert answer.json["error"]["message"].startswith(
            f"{config}:{problems[0]['line']}: sources.moddy.plugin"
        )
        assert relay.app.config is before
        await send(relay)
        await until(lambda: len(crm.ids) == 1)
        assert relay.counted("relay_config_last_reload_successful") == 0
        config.write_text(good)
        await reload(relay)
        assert relay.counted("relay_config_last_reload_successful") == 1


async def test_a_reload_that_needs_a_restart_changes_nothing(tmp_path, crm):
    config = write_config(tmp_path, SOURCES)
    async with running(config) as relay:
        write_config(tmp_path, SOURCES, destination("crm", crm.url), port=1)
        answer = await ask(relay)
        assert say(answer) == (409, "restart_needed")
        assert answer.json["error"]["message"] == "restart needed: server.listen"
        more = 'implementation = "aiohttp"'
        config.write_text(
            write_config(tmp_path, SOURCES).read_text().replace("[server]", f"[server]\n{more}")
        )
        answer = await ask(relay)
        assert answer.json["error"]["message"] == "restart needed: server.implementation"
        assert (await relay.operator("GET", "/api/status"))["destinations"] == []


async def test_a_reload_that_fails_to_prepare_changes_nothing(tmp_path, crm, monkeypatch):
    config = write_config(tmp_path, SOURCES)
    async with running(config) as relay:
        write_config(tmp_path, SOURCES, destination("crm", crm.url))

        async def fail(_destinations):
            raise OSError("too many open files")

        monkeypatch.setattr(relay.app.dispatcher, "plan", fail)
        assert (await ask(relay)).status == 500
        assert relay.counted("relay_config_last_reload_successful") == 0
        assert (await relay.operator("GET", "/api/status"))["destinations"] == []


async def test_the_time_of_the_last_success_is_in_the_metrics(tmp_path):
    clock = FakeClock()
    config = write_config(tmp_path, SOURCES)
    name = "relay_config_last_reload_success_timestamp_seconds"
    async with running(config, clock=clock) as relay:
        start = clock.now / SECOND
        assert relay.counted(name) == start
        clock.advance(60)
        await reload(relay)
        config.write_text(MISSPELT)
        clock.advance(60)
        assert (await ask(relay)).status == 400
        assert relay.counted(name) == start + 60


async def test_reloads_wait_for_each_other_and_a_stop_waits_for_them(tmp_path, crm):
    config = write_config(tmp_path, SOURCES, destination("crm", crm.url))
    async with running(config) as relay:
        answers = await asyncio.gather(*(ask(relay) for _ in range(5)))
        assert [answer.status for answer in answers] == [200] * 5
        relay.app.reloads.start()
    assert relay.app.reloads._tasks == set()


# --- the command and the signal -----------------------------------------------------------------------


async def command(*args):
    process = await asyncio.create_subprocess_exec(
        *RELAY, *map(str, args), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_the_command_prints_the_result_of_a_reload_and_a_signal_logs_it(tmp_path, crm):
    config = write_config(tmp_path, SOURCES, destination("crm", crm.url))
    good = config.read_text()
    async with Daemon(config) as daemon:
        config.write_text(good + destination("audit", crm.url))
        code, out, _ = await command("reload", "-c", config)
        assert (code, out) == (0, f"reloaded {config}: added destinations.audit\n")
        code, out, _ = await command("reload", "-c", config, "--json")
        assert (code, json.loads(out)["added"]) == (0, [])

        config.write_text(good.replace("shutdown_grace", "shutdown_grease"))
        code, _, err = await command("reload", "-c", config)
        _, _, checked = await command("check-config", config)
        problem = checked.splitlines()[0]
        assert "server.shutdown_grease: unknown key" in problem
        assert code == 1
        assert err.splitlines() == [problem, "  nothing was changed; correct the file and reload again"]

        daemon.process.send_signal(signal.SIGHUP)
        await until(lambda: daemon.output.count("shutdown_grease") == 2)
        config.write_text(good.replace('format = "json"', 'level = "warning"\nformat = "text"'))
        daemon.process.send_signal(signal.SIGHUP)
        await until(lambda: "warning relay.reload: " in daemon.output)
        assert await daemon.stop() == 0
    assert "draining" not in daemon.output


# --- under load ---------------------------------------------------------------------------------------

RELOADS = 50


class Sender:
    """Sends one event after the other, and accepts only successes."""

    def __init__(self, url):
        self.url = url
        self.acknowledged = []
        self.failures = []

    async def run(self, number, enough):
        async with await Wire.open(self.url) as wire:
            for count in itertools.count():
                if enough.is_set() or self.failures:
                    return
                await wire.send(request("POST", ADORN, adorn(f"{number}.{count}")))
                answer = await wire.answer()
                if answer.status == 200:
                    self.acknowledged.append(answer.json["event_id"])
                else:
                    self.failures.append(answer)


async def test_reloads_under_load_fail_no_request_and_lose_or_duplicate_no_delivery(tmp_path, crm, other):
    def steady(round_):
        return destination("crm", (crm, other)[round_ % 2].url, f"concurrency = {4 + round_ % 5}")

    async with Recorder() as audit_:
        audit = destination("audit", audit_.url, 'order_by = "subject"')
        config = write_config(tmp_path, SOURCES, steady(0), audit)
        async with Daemon(config) as daemon:
            socket = config.parent / "state" / "relay.sock"
            sender, enough = Sender(daemon.url), asyncio.Event()
            senders = [asyncio.create_task(sender.run(number, enough)) for number in range(4)]
            statuses = Counter()
            for round_ in range(RELOADS):
                goal = len(sender.acknowledged) + 10
                await until(lambda goal=goal: len(sender.acknowledged) >= goal or sender.failures)
                match round_ % 5:
                    case 3:
                        write_config(tmp_path, SOURCES, MISSPELT)
                    case 4:
                        write_config(tmp_path, SOURCES, port=1)
                    case _:
                        parts = (steady(round_), audit) if round_ % 3 else (steady(round_),)
                        write_config(tmp_path, SOURCES, *parts)
                statuses[(await exchange(socket, request("POST", "/api/reload"))).status] += 1
            enough.set()
            await asyncio.gather(*senders)
            write_config(tmp_path, SOURCES, steady(0), audit)
            await exchange(socket, request("POST", "/api/reload"))

            async def books():
                return {
                    each["name"]: each
                    for each in (await daemon.operator("GET", "/api/destinations"))["items"]
                }

            async with asyncio.timeout(60):
                while any(each["pending"] for each in (await books()).values()):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.02)
            ends = await books()
            assert await daemon.stop() == 0
        assert "attempts cut off" not in daemon.output
    assert sender.failures == []
    assert statuses == {200: 30, 400: 10, 409: 10}
    assert Counter(crm.ids + other.ids) == Counter(sender.acknowledged)
    assert crm.ids
    assert other.ids
    assert ends["crm"]["created"] == ends["crm"]["delivered"] == len(sender.acknowledged)
    assert max(Counter(audit_.ids).values()) == 1
    assert ends["audit"]["created"] == ends["audit"]["delivered"] == len(audit_.ids)
    assert set(audit_.ids) < set(sender.acknowledged)
