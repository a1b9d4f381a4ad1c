"""Grouped messages in a real daemon: after kill -9, in commands and in the API."""

import asyncio

from commands import Commands, run
from daemons import SOURCES, Daemon, adorn, destination, running, write_config
from support import until
from wire import exchange, request

GROUPED = """
format = "slack"
group_by = []
group_wait = "{wait}"
"""


async def send(url, count):
    for number in range(count):
        answer = await exchange(url, request("POST", "/v1/events", adorn(f"s{number}")))
        assert answer.status == 200


def titles(recorder):
    return [body["text"].splitlines()[0] for _, body in recorder.arrived]


async def test_a_waiting_group_survives_kill_9(tmp_path, recorder):
    config = write_config(tmp_path, SOURCES, destination("chat", recorder.url, GROUPED.format(wait="3s")))
    async with Daemon(config) as daemon:
        await send(daemon.url, 5)
        await daemon.end()
    assert recorder.arrived == []
    async with Daemon(config):
        await until(lambda: recorder.arrived)
        await asyncio.sleep(0.5)  # a second message would come at once
    assert titles(recorder) == ["5 \u00d7 adorn.session.started"]


async def test_commands_and_api_show_which_deliveries_went_together(tmp_path, recorder):
    config = write_config(tmp_path, SOURCES, destination("chat", recorder.url, GROUPED.format(wait="1h")))
    recorder.answers.append((503, {}))
    async with running(config) as relay:
        await send(relay.addresses.public, 3)
        pending = await relay.rows("deliveries", state="pending")
        await relay.app.store.deliveries.make_due([row["row"] for row in pending])
        await until(lambda: len(recorder.arrived) == 2)
        await until(
            lambda: (
                relay.counted("relay_deliveries_finished_total", destination="chat", outcome="delivered") == 3
            )
        )
        deliveries = (await relay.operator("GET", "/api/deliveries"))["items"]
        attempts = (await relay.operator("GET", "/api/attempts"))["items"]
        commands = Commands(relay.addresses.socket)
        shown = await commands("deliveries", "show", deliveries[0]["id"])
        event = await commands("events", "show", deliveries[0]["event_id"], "--json")
        tested = await commands("destinations", "test", "chat")
        metric = relay.counted("relay_delivery_attempts_total", destination="chat", result="ok")
    assert {(each["state"], each["attempts"], each["group_key"]) for each in deliveries} == {
        ("delivered", 2, "")
    }
    [group_id] = {each["group_id"] for each in attempts}
    assert group_id == recorder.arrived[0][0] == recorder.arrived[1][0]
    assert [each["group_size"] for each in attempts] == [3] * 6
    assert metric == 1
    table = [line.split("\t") for line in shown.out.splitlines()]
    assert [row[-1] for row in table if row[-1] == "3"] == ["3", "3"]
    assert event.json["owed"][0]["group_key"] == ""
    assert "would be delivered" in tested.out
    offline = await asyncio.to_thread(
        run, "deliveries", "show", deliveries[0]["id"], "--offline", "-c", config, "--json"
    )
    assert [each["group_id"] for each in offline.json["tries"]] == [group_id] * 2
