"""The common tasks of docs/operating.md: their commands run against a daemon and have their effect."""

import asyncio
import json
import logging
import re
import shlex
from pathlib import Path

import pytest
import pytest_asyncio
from click.testing import CliRunner
from commands import LEAVES, Output, parse, run
from daemons import DEV_TOKEN, HEAD, Recorder, destination, running, write_config
from stores import KINDS
from support import until
from wire import request

from relay.cli.main import BATCH, FAILED, NOTHING, main
from relay.plugin_loading.loader import load

PAGE = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
[TASKS] = re.findall(r"^## Common tasks\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)
SECTIONS = {part.partition("\n")[0]: part for part in TASKS.split("\n### ")[1:]}
OTHERS = ("journalctl ",)

SOURCES = f"""
[sources.moddy]
plugin = "moddy"
tokens = {DEV_TOKEN}
[sources.whatsapp]
plugin = "whatsapp"
tokens = {DEV_TOKEN}
"""
TOKEN = {"Authorization": "Bearer dev-token"}


def blocks(title, language="sh"):
    return "".join(re.findall(rf"```{language}\n(.*?)```", SECTIONS[title], re.DOTALL))


def lines(title):
    """Return the relay commands of a task, each as its words."""
    found = [shlex.split(line, comments=True) for line in blocks(title).splitlines()]
    return [words[1:] for words in found if words and words[0] == "relay"]


OF_THE_SERVER = {"durability", "vacuum", "partitions"}
"""Checks that fail with the tests' PostgreSQL server, which is configured for speed."""


class Desk:
    """An operator's desk: a relay with a receiver that the test can break."""

    def __init__(self, relay, recorder):
        self.relay = relay
        self.recorder = recorder
        self.names = {}  # ids of this test, by the ids on the page

    async def send(self, member, guild="42"):
        body = {"event_type": "member_joined", "discord_id": member, "metadata": {"guild_id": int(guild)}}
        sent = request("POST", "/internal/event/notify", json.dumps(body).encode(), **TOKEN)
        assert (await self.relay.exchange(sent)).status == 200

    async def beat(self):
        sent = request("PUT", "/api/v1/workers/worker-001/heartbeat", b"{}", **TOKEN)
        assert (await self.relay.exchange(sent)).status == 200

    async def settled(self):
        """Wait until no delivery is pending."""
        outcomes = ("delivered", "dead", "expired", "cancelled")

        def left():
            finished = (
                self.relay.counted("relay_deliveries_finished_total", destination="crm", outcome=each)
                for each in outcomes
            )
            return self.relay.counted("relay_deliveries_created_total", destination="crm") - sum(finished)

        await until(lambda: left() == 0, 60)

    async def follow(self, title):
        """Type all commands of a task; return the output of each."""
        result = {}
        for typed in lines(title):
            words = [self.names.get(word, word) for word in typed]
            options = {name for each in LEAVES[path_of(words)].params for name in each.opts}
            place = ["-c", self.relay.app.config.path] if "--config" in options else []
            if path_of(words) == ("send",):
                place += ["--to", self.relay.addresses.public]
            key = " ".join(words)
            result[key] = await asyncio.to_thread(_typed, *words, *place)
        return result

    def configure(self, *parts):
        write_config(self.relay.app.config.path.parent, SOURCES, *parts)


def _typed(*words):
    """Run a command. By the time of a retry, the lane may have sent the pending deliveries: codes 4 and 6."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    codes = (0, NOTHING, BATCH) if words[:2] == ("deliveries", "retry") and "pending" in words else (0,)
    if KINDS[0] == "postgres" and words[:2] == ("db", "compact"):
        codes = (FAILED,)  # as the page says
    elif KINDS[0] == "postgres" and words[0] == "doctor":
        codes = (0, FAILED)
    assert result.exit_code in codes, (words, result.output, result.exception)
    return Output(result.stdout, result.stderr)


def path_of(words):
    return next(path for path in LEAVES if tuple(words[: len(path)]) == path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    async with Recorder() as recorder, running(write_config(folder, SOURCES, crm(recorder))) as relay:
        yield Desk(relay, recorder)


def crm(recorder, more=""):
    return destination("crm", recorder.url, f"final_statuses = [418]\n{more}")


async def ended(desk, outcome, number=1):
    """Wait until deliveries to crm have ended in this way."""
    labels = {"destination": "crm", "outcome": outcome}
    await until(lambda: desk.relay.counted("relay_deliveries_finished_total", **labels) >= number)


in_module = pytest.mark.asyncio(loop_scope="module")


def test_there_are_ten_tasks_and_each_has_commands():
    assert len(SECTIONS) == 10
    assert all(len(lines(title)) >= 2 for title in SECTIONS)


@pytest.mark.parametrize("title", SECTIONS)
def test_every_line_is_a_command_of_the_relay_or_a_known_one(title):
    for line in blocks(title).splitlines():
        assert line.startswith(("relay ", *OTHERS)), line
        if line.startswith("relay "):
            parse(shlex.split(line, comments=True)[1:])
    for text in re.findall(r"```toml\n(.*?)```", SECTIONS[title], re.DOTALL):
        assert text.strip()


@in_module
async def test_an_event_that_never_arrived_is_found_and_sent_again(desk):
    await desk.send("lost")
    wrong = request("POST", "/internal/event/notify", b"{}", **TOKEN)
    assert (await desk.relay.exchange(wrong)).status == 422
    await desk.relay.app.ingest.refused.flush()
    await ended(desk, "delivered")
    [event] = await desk.relay.rows(subject="lost")
    desk.names["019aa9b2"] = event["id"]
    result = await desk.follow("An event never arrived")
    found = result["events list --source moddy --since 2h --where data.guild_id=42"].rows
    assert [row[0] for row in found] == [event["id"]]
    assert "invalid" in result["refused list --source moddy --since 2h"].out
    await until(lambda: desk.recorder.ids.count(event["id"]) == 2)
    assert len(result[f"attempts list --event {event['id']}"].rows) == 1
    assert "crm" in result[f"explain {event['id']}"].out


@in_module
async def test_a_repaired_receiver_gets_its_backlog_and_its_dead_deliveries(desk):
    desk.recorder.answers.append((418, {}))
    await desk.send("down-0")
    await ended(desk, "dead")
    desk.recorder.answers.extend([(500, {})] * 1000)
    for number in range(1, 6):
        await desk.send(f"down-{number}")
    await until(lambda: desk.relay.counted("relay_destination_circuit_open", destination="crm") == 1)
    desk.recorder.answers.clear()
    result = await desk.follow("A receiver was down for six hours")
    assert result["destinations test crm --close-circuit"].out
    assert len(result["deliveries list --destination crm --state dead --since 8h"].rows) == 1
    subjects = {f"down-{number}" for number in range(6)}
    events = {row["id"] for row in await desk.relay.rows() if row["subject"] in subjects}
    await until(lambda: events <= set(desk.recorder.ids), 60)
    await desk.settled()


@in_module
async def test_a_rotation_shows_which_tokens_are_in_use(desk):
    config = desk.relay.app.config.path
    two = config.read_text().replace(f'"moddy"\ntokens = {DEV_TOKEN}', '"moddy"\ntokens = ["dev-token", "b"]')
    config.write_text(two)
    result = await desk.follow("Rotation of a secret")
    await desk.send("rotated")
    again = await desk.follow("Rotation of a secret")
    assert "tokens[0]" in again["sources show moddy"].out
    assert "tokens[1]" in again["sources show moddy"].out
    assert result["destinations test crm"].out


@in_module
async def test_a_flapping_worker_is_examined_and_put_into_maintenance(desk):
    await desk.beat()
    result = await desk.follow("A worker flaps")
    assert result["workers maintenance whatsapp worker-001 --for 2h"].out.startswith(
        "worker-001: MAINTENANCE"
    )
    assert result["events list --source whatsapp --subject worker-001 --since 1d"].rows
    text = blocks("A worker flaps", "toml")
    file = desk.relay.app.config.path.with_name("worker.toml")
    file.write_text(f"{HEAD.format(port=0)}{SOURCES}{text}")
    assert load(file).config.sources["whatsapp"].workers.ids


@in_module
async def test_the_data_of_a_person_is_deleted(desk):
    await desk.send("member-42")
    [event] = await desk.relay.rows(subject="member-42")
    await until(lambda: event["id"] in desk.recorder.ids)
    await desk.settled()
    before = len(await desk.relay.rows(subject="member-42"))
    result = await desk.follow("Deletion of a person's data")
    assert before == 1
    assert result["events delete --subject member-42 --dry-run"].out == "1 event\n"
    assert result["events list --subject member-42"].out == ""
    state = desk.relay.app.config.state_dir
    assert not any(b"member-42" in file.read_bytes() for file in state.glob("relay.db*"))


@in_module
async def test_the_disk_is_examined_and_space_returned(desk):
    result = await desk.follow("The disk fills")
    assert "moddy.member_joined" in result["stats --since 1d"].out
    if KINDS[0] == "sqlite":
        assert re.search(r"before, .* after", result["db compact"].out)


@in_module
async def test_a_move_begins_with_a_healthy_relay(desk):
    result = await desk.follow("A move to another machine")
    failed = {row[0] for row in result["doctor"].rows if row[1] == "FAILED"}
    assert failed <= (OF_THE_SERVER if KINDS[0] == "postgres" else set())


@in_module
async def test_changes_of_operators_are_in_the_log(desk, caplog):
    caplog.set_level(logging.INFO)
    config = desk.relay.app.config.path
    await asyncio.to_thread(run, "destinations", "pause", "crm", "-c", config)
    await asyncio.to_thread(run, "reload", "-c", config)
    result = await desk.follow("Audit log")
    assert "paused" in result["destinations list"].out
    await asyncio.to_thread(run, "destinations", "resume", "crm", "-c", config)
    [line] = [record for record in caplog.records if "/pause" in record.getMessage()]
    assert line.name == "relay.audit"
    example = blocks("Audit log", "").strip()
    shape = r"\S+ \(uid \d+\), pid \d+: POST /api/destinations/crm/pause: 200"
    assert re.fullmatch(shape, line.getMessage())
    assert re.search(shape, SECTIONS["Audit log"]), example
    assert any(record.name == "relay.reload" for record in caplog.records)
    named = set(re.findall(r"LOGGER=(\S+)", SECTIONS["Audit log"]))
    assert named == {"relay.audit", "relay.reload"}


@in_module
async def test_a_destination_is_tested_before_go_live(desk):
    desk.configure(crm(desk.recorder, "paused = true"))
    arrived = len(desk.recorder.ids)
    result = await desk.follow("A test before go-live")
    assert len(result["deliveries list --destination crm --state pending"].rows) == 1
    assert "1 delivery" in result["deliveries cancel --destination crm --yes"].out
    assert len(desk.recorder.ids) == arrived + 1  # the ping
    config = desk.relay.app.config.path
    await asyncio.to_thread(run, "destinations", "resume", "crm", "-c", config, code=1)
    desk.configure(crm(desk.recorder))
    await asyncio.to_thread(run, "reload", "-c", config)
    await desk.send("live")
    [event] = await desk.relay.rows(subject="live")
    await until(lambda: event["id"] in desk.recorder.ids)


@in_module
async def test_alerts_are_silenced_by_a_pause_that_ends_by_itself(desk):
    await desk.beat()
    result = await desk.follow("Silencing alerts")
    assert result["destinations pause crm --for 2h"].out
    rules = (Path(__file__).parents[2] / "systemd" / "prometheus" / "alerts.yml").read_text()
    alerts = re.findall(r"alertname=(\w+)", SECTIONS["Silencing alerts"])
    assert alerts
    assert all(f"alert: {name}" in rules for name in alerts)
