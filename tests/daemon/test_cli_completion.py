"""Completion of names and ids in the shell, from a daemon that runs."""

import asyncio
import socket
import subprocess
import sys
import time

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner
from daemons import SOURCES, adorn, destination, running, write_config
from test_workers import register
from wire import request

from relay.cli import completion, main


@pytest.fixture
async def relay(tmp_path):
    crm = destination("crm", "http://127.0.0.1:1", "paused = true")
    config = write_config(tmp_path, SOURCES, crm, destination("crm2", "http://127.0.0.1:1"))
    async with running(config) as relay:
        for session in ("s-1", "s-2", "s-3"):
            await relay.exchange(request("POST", "/v1/events", adorn(session)))
        yield relay


def complete(words, typed, *options):
    """Return the completions of a word after other words, with the texts beside them."""
    shell = BashComplete(main, {}, "relay", "_RELAY_COMPLETE")
    return {each.value: each.help for each in shell.get_completions([*words.split(), *options], typed)}


async def test_names_and_ids_are_completed(relay, monkeypatch):
    monkeypatch.setenv("RELAY_SOCKET", str(relay.addresses.socket))
    event = (await relay.operator("GET", "/api/events"))["items"][0]["id"]
    delivery = (await relay.operator("GET", "/api/deliveries"))["items"][0]["id"]
    first = next(row["id"] for row in await relay.rows())
    bare, plain = event.removeprefix("evt_"), event.removeprefix("evt_").replace("-", "")
    cases = (
        ("destinations show", "", {"crm", "crm2"}),
        ("destinations pause --for 1h", "crm2", {"crm2"}),
        ("events replay --to", "c", {"crm", "crm2"}),
        ("deliveries list --destination", "x", set()),
        ("sources pause", "ad", {"adorn"}),
        ("tail --source", "ado", {"adorn"}),
        ("events list --type", "adorn.s", {"adorn.session.started"}),
        ("deliveries list --type", "moddy", set()),
        ("send", "lazy", {"lazychat"}),
        ("explain --source", "mod", {"moddy"}),
        ("verify --destination", "crm", {"crm", "crm2"}),
        ("jobs run", "ret", {"retention"}),
        ("events show", event[:-1], {event}),
        ("events show", bare[:-1], {bare}),
        ("events body", plain[:-1], {plain}),
        ("events delete", "ev", {row["id"] for row in await relay.rows()}),
        (f"events delete {event}", first, {first}),
        ("events show", "evt_x", set()),
        ("explain", event, {event}),
        ("deliveries show", delivery[:-1], {delivery}),
        ("deliveries retry", delivery, {delivery}),
        ("deliveries list --event", event, {event}),
    )
    for words, typed, expected in cases:
        found = await asyncio.to_thread(complete, words, typed)
        assert found.keys() == expected, (words, typed)
    assert (await asyncio.to_thread(complete, "destinations show", "crm"))["crm"] == "paused in config.toml"
    [about] = (await asyncio.to_thread(complete, "deliveries show", delivery)).values()
    assert about.startswith("adorn.session.started to crm")
    # An old id is completed if its beginning is unique.
    monkeypatch.setattr("relay.api.names.RECENT", 1)
    oldest = next(row["id"] for row in await relay.rows())
    assert (await asyncio.to_thread(complete, "events show", oldest[:-1])).keys() == {oldest}
    assert await asyncio.to_thread(complete, "events show", oldest[:6]) != {}  # the latest one
    delivery = (await relay.rows("deliveries"))[0]["id"]
    assert (await asyncio.to_thread(complete, "deliveries cancel", delivery)).keys() == {delivery}


async def test_workers_are_completed_by_their_source_and_the_line_names_the_relay(relay, tmp_path):
    for worker in ("worker-1", "worker-2", "other"):
        await relay.exchange(register(worker))
    socket_ = ("--socket", str(relay.addresses.socket))
    for words in ("workers show whatsapp", "workers forget whatsapp", "workers maintenance whatsapp"):
        assert (await asyncio.to_thread(complete, words, "w", *socket_)).keys() == {"worker-1", "worker-2"}
    assert await asyncio.to_thread(complete, "workers show adorn", "w", *socket_) == {}
    assert (await asyncio.to_thread(complete, "workers show", "wh", *socket_)).keys() == {"whatsapp"}
    # The script of bash, with the real command.
    text = CliRunner().invoke(main, ["completion", "bash"], prog_name="relay").stdout
    command = tmp_path / "relay"
    command.write_text(f"#!{sys.executable}\nfrom relay.cli import main\nmain(prog_name='relay')\n")
    command.chmod(0o755)
    line = f"relay destinations show --socket {relay.addresses.socket} cr"
    ask = f"COMP_WORDS=({line}); COMP_CWORD=5; _relay_completion {command}; echo ${{COMPREPLY[@]}}"
    done = await asyncio.to_thread(
        subprocess.run, ["bash", "-c", f"{text}\n{ask}"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("crm crm2\n", "")


@pytest.mark.parametrize("listens", [False, True], ids=["no relay", "a relay that hangs"])
def test_without_an_answer_nothing_is_completed_and_nothing_is_printed(
    tmp_path, monkeypatch, capsys, listens
):
    monkeypatch.setattr(completion, "TIMEOUT", 0.1)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        if listens:
            listener.bind(str(path))
            listener.listen()
        monkeypatch.setenv("RELAY_SOCKET", str(path))
        began = time.monotonic()
        assert complete("destinations show", "") == {}
    assert time.monotonic() - began < 5
    assert capsys.readouterr() == ("", "")
