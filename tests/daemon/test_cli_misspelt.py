"""A misspelt name in `--source`, `--destination` or `--type` is an error with a suggestion."""

import asyncio

import pytest
import pytest_asyncio
from commands import LEAVES, Commands, run
from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from support import until
from wire import exchange, request

GONE = '[sources.old]\nplugin = "adorn"\nprefix = "/old"\n'
MORE = {
    ("deliveries", "retry"): ["--state", "dead", "--yes"],
    ("deliveries", "cancel"): ["--yes"],
    ("events", "replay"): ["--yes"],
    ("events", "delete"): ["--yes"],
    ("explain",): ["--data", "@{body}"],
    ("verify",): ["--request", "{body}"],
}
"""Further arguments of a command, so that the name is the only mistake."""

FILTERED = [
    (path, option)
    for path, command in LEAVES.items()
    for option in ("--source", "--destination", "--type")
    if any(option in each.opts for each in command.params)
    and path != ("init",)  # its sources are new
    and (path, option) != (("explain",), "--type")  # the name of a sample
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(tmp_path_factory):
    """A relay whose store has the events of a source and a destination that config.toml no longer has."""
    folder = tmp_path_factory.mktemp("misspelt")
    (folder / "body").write_text("{}")
    async with Recorder() as recorder:
        old = destination("former", recorder.url)
        async with running(write_config(folder, SOURCES, GONE, old)) as relay:
            answer = await relay.exchange(request("POST", "/old/v1/events", adorn("s-1")))
            assert answer.status == 200
            done = {"destination": "former", "outcome": "delivered"}
            await until(lambda: relay.counted("relay_deliveries_finished_total", **done))
        config = write_config(folder, SOURCES, destination("crm", recorder.url))
        async with running(config) as relay:
            yield relay


def words(relay, path, option, name):
    body = relay.app.config.path.parent / "body"
    return [*path, option, name, *(each.format(body=body) for each in MORE.get(path, ()))]


def test_the_table_covers_every_command_that_selects_by_name():
    assert {path for path, _ in FILTERED} >= {
        ("events", "list"), ("events", "replay"), ("events", "export"), ("events", "delete"),
        ("deliveries", "list"), ("deliveries", "retry"), ("deliveries", "cancel"),
        ("tail",), ("stats",), ("workers", "list"),
    }  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("path", "option"), FILTERED, ids=str)
async def test_a_misspelt_name_exits_with_4_and_a_suggestion(relay, path, option):
    noun = option.removeprefix("--")
    wrong, right = {
        "source": ("adron", "adorn"),
        "destination": ("cmr", "crm"),
        "type": ("adron.attire.*", "adorn"),
    }[noun]
    given = words(relay, path, option, wrong)
    if any("--socket" in each.opts for each in LEAVES[path].params) and path != ("explain",):
        result = await Commands(relay.addresses.socket)(*given, code=4)
    else:
        result = await asyncio.to_thread(run, *given, "-c", relay.app.config.path, code=4)
    first, second = result.err.splitlines()
    problem = "no source has the type" if noun == "type" else f"unknown {noun}"
    assert first == f'{problem} "{wrong}", did you mean "{right}"?'
    assert second.startswith(("  known: ", f"  {noun}s: ", "  sources: "))
    assert result.out == ""


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("path", "option"),
    [each for each in FILTERED if any("--offline" in one.opts for one in LEAVES[each[0]].params)],
)
async def test_a_misspelt_name_is_found_without_a_daemon_too(relay, path, option):
    noun = option.removeprefix("--")
    wrong = {"source": "adrn", "destination": "cm", "type": "adrn.*"}[noun]
    given = [*words(relay, path, option, wrong), "--offline"]
    result = await asyncio.to_thread(run, *given, "-c", relay.app.config.path, code=4)
    assert result.err.startswith("no source has the type" if noun == "type" else f'unknown {noun} "')
    assert "did you mean" in result.err


@pytest.mark.asyncio(loop_scope="module")
async def test_names_that_only_the_store_has_are_known(relay):
    commands = Commands(relay.addresses.socket)
    assert len((await commands("events", "list", "--source", "old")).rows) == 1
    assert len((await commands("events", "list", "--destination", "former")).rows) == 1
    assert len((await commands("stats", "--source", "old")).rows) == 1
    assert (await commands("workers", "list", "--source", "old")).out == ""
    assert (await commands("events", "list", "--source", "relay")).out == ""
    assert len((await commands("events", "list", "--type", "old.*")).rows) == 1
    config = relay.app.config.path
    offline = ("events", "list", "--source", "old", "--offline", "-c", config)
    assert len((await asyncio.to_thread(run, *offline)).rows) == 1


@pytest.mark.asyncio(loop_scope="module")
async def test_configured_names_without_events_are_known(relay):
    commands = Commands(relay.addresses.socket)
    for given in (
        ["--source", "moddy"],
        ["--destination", "crm"],
        ["--type", "moddy.member_joined"],
        ["--type", "relay.*"],
        ["--type", "*.gone"],
    ):
        assert (await commands("events", "list", *given)).out == ""
    named = (await commands("events", "list", "--type", "member_joined", code=4)).err
    assert "a full type begins with the name of its source\n  sources: " in named
    assert (await commands("stats", "--source", "moddy")).out == ""


@pytest.mark.asyncio(loop_scope="module")
async def test_the_api_answers_404(relay):
    answer = await exchange(relay.addresses.socket, request("GET", "/api/events?source=adron"))
    assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")
