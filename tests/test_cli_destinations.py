"""`relay destinations` and `relay sources` against a relay that runs."""

import pytest
from commands import Commands
from daemon import SOURCES, Recorder, adorn, destination, running, write_config
from support import until
from wire import request


@pytest.fixture
async def relay(tmp_path):
    async with Recorder() as recorder:
        config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
        async with running(config) as relay:
            await relay.exchange(request("POST", "/v1/events", adorn("s-1")))
            await until(lambda: recorder.ids)
            yield relay


@pytest.fixture
def commands(relay):
    return Commands(relay.addresses.socket)


async def test_destinations_are_listed_with_their_books(commands):
    [[name, held, pending, *_]] = (await commands("destinations", "list")).rows
    assert (name, held, pending.isdigit()) == ("crm", "", True)
    assert (await commands("destinations", "list", "-q")).out == "crm\n"
    [item] = (await commands("destinations", "list", "--json")).json["items"]
    assert item["created"] == 1


@pytest.mark.parametrize(
    ("stop", "go_on", "held"),
    [("pause", "resume", "paused"), ("disable", "enable", "disabled: operator")],
)
async def test_a_destination_is_stopped_and_goes_on(commands, stop, go_on, held):
    assert (await commands("destinations", stop, "crm")).out == f"crm: {held}\n"
    said = await commands("destinations", "show", "crm")
    assert ["held", held] in said.rows
    assert ["latest_type", "adorn.session.started"] in said.rows
    assert f"`relay destinations {go_on} crm`" in said.err
    assert (await commands("destinations", go_on, "crm", "--json")).json["held"] is None
    assert (await commands("destinations", "show", "crm")).err == ""


async def test_what_something_is_called_comes_before_what_is_told_of_it(commands):
    for words in (["destinations", "show", "crm"], ["sources", "show", "adorn"]):
        assert (await commands(*words)).rows[0] == ["name", words[-1]]
    assert list((await commands("destinations", "list", "--json")).json["items"][0])[:2] == ["name", "held"]


async def test_a_source_is_paused_and_resumed(commands, relay):
    assert (await commands("sources", "pause", "adorn")).out == "adorn: paused\n"
    assert (await relay.exchange(request("POST", "/v1/events", adorn()))).status == 503
    assert ["adorn", "adorn", "", "yes"] in (await commands("sources", "list")).rows
    assert (await commands("sources", "resume", "adorn", "--json")).json == {"name": "adorn", "paused": False}
    assert (await relay.exchange(request("POST", "/v1/events", adorn()))).status == 200


async def test_a_source_is_shown_with_its_latest_event(commands):
    rows = (await commands("sources", "show", "adorn")).rows
    assert ["plugin", "adorn"] in rows
    assert ["latest_type", "adorn.session.started"] in rows
    assert (await commands("sources", "show", "moddy", "--json")).json["latest"] is None


@pytest.mark.parametrize("noun", ["destinations", "sources"])
@pytest.mark.parametrize("verb", ["show", "pause"])
async def test_an_unknown_name_is_4_and_says_which_there_are(commands, noun, verb):
    said = await commands(noun, verb, "crn", code=4)
    assert "there are " in said.err
