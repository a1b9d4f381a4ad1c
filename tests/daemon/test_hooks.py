"""docs/hooks.md against the code: every declared hook, and the running example."""

import ast
import inspect
import re
import threading
from pathlib import Path

import pytest
from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from support import until
from wire import request

from relay import hookspecs
from relay.config.problems import ConfigError
from relay.plugin_loading.loader import load

PAGE = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text()
[EXAMPLE] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
HOOKS = [name for name in vars(hookspecs) if name.startswith("relay_")]
STUCK = """
import threading
from relay.hookspecs import hookimpl

GATE = threading.Event()
TOLD = []

@hookimpl
def relay_{hook}({records}):
    TOLD.extend({records})
    GATE.wait(10)
    raise RuntimeError("after all")
"""


class Texts(Recorder):
    """A receiver of bodies that are not JSON."""

    def note(self, event_id, body):
        self.arrived.append((event_id, body.decode()))


@pytest.fixture
async def receiver():
    async with Texts() as receiver:
        yield receiver


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the example writes
    folder = tmp_path / "plugins.d"
    folder.mkdir()
    return folder


async def send(relay):
    """Send an event and return its id, once it is acknowledged."""
    answer = await relay.exchange(request("POST", "/v1/events", adorn()))
    assert answer.status == 200, answer
    return answer.json["event_id"]


# --- the page -----------------------------------------------------------------------------------------


def test_the_page_has_exactly_the_hooks_with_their_signatures():
    declared = [
        ast.unparse(node).partition(":\n")[0].rpartition("def ")[2]
        for node in ast.parse(inspect.getsource(hookspecs)).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert re.findall(r"^## `(relay_.*)`$", PAGE, re.MULTILINE) == declared
    assert [signature.partition("(")[0] for signature in declared] == HOOKS


@pytest.mark.parametrize("hook", HOOKS[2:])  # sources and presets have pages
def test_the_example_has_every_hook_without_a_separate_page(hook):
    assert f"@hookimpl\ndef {hook}(" in EXAMPLE


async def test_the_example_does_what_the_page_describes(tmp_path, plugins, receiver):
    (plugins / "audit.py").write_text(EXAMPLE)
    config = write_config(tmp_path, SOURCES, destination("crm", receiver.url, 'format = "line"'))
    log = tmp_path / "audit.log"
    async with running(config) as relay:
        event = await send(relay)
        await until(lambda: log.exists() and log.read_text().endswith(" is delivered\n"))
        assert receiver.arrived == [(event, "adorn.session.started about s\n")]
        [delivery] = await relay.rows("deliveries")
        lines = f"{event} adorn.session.started\n{delivery['id']} is delivered\n"
        assert log.read_text() == lines
        [job] = relay.app._setup.jobs
        await job.work()
    assert (log.exists(), (tmp_path / "audit.old").read_text()) == (False, lines)


# --- plugins that hang, raise or fail -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "records"), [("events_stored", "events"), ("attempts_recorded", "outcomes")]
)
async def test_a_hook_that_hangs_and_raises_delays_neither_replies_nor_deliveries(
    tmp_path, plugins, receiver, hook, records
):
    (plugins / "stuck.py").write_text(STUCK.format(hook=hook, records=records))
    config = write_config(tmp_path, SOURCES, destination("crm", receiver.url, 'format = "raw"'))
    async with running(config) as relay:
        [observer] = relay.app._setup.observers
        plugin = getattr(observer, hook).__globals__
        sent = [await send(relay)]
        await until(lambda: plugin["TOLD"])
        sent += [await send(relay) for _ in range(9)]
        await until(lambda: len(receiver.arrived) == 10)
        assert len(plugin["TOLD"]) == 1
        assert relay.counted("relay_plugin_errors_total", plugin="stuck") == 0
        plugin["GATE"].set()
        await until(lambda: len(plugin["TOLD"]) == 10)
        await until(lambda: relay.counted("relay_plugin_errors_total", plugin="stuck") >= 2)
    if hook == "events_stored":
        assert [event.public_id for event in plugin["TOLD"]] == sent
    else:
        assert {outcome.delivery.event.public_id for outcome in plugin["TOLD"]} == set(sent)
        assert {outcome.state for outcome in plugin["TOLD"]} == {"delivered"}


async def test_without_hooks_nothing_is_called(tmp_path, plugins):
    (plugins / "audit.py").write_text(EXAMPLE.partition("@hookimpl\ndef relay_events_stored")[0])
    async with running(write_config(tmp_path, SOURCES)) as relay:
        assert relay.app.observers._queues == []
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("plugin ")]


async def test_a_job_of_a_plugin_that_fails_is_logged_under_its_plugin_s_name(tmp_path, plugins, caplog):
    failing = "async def _rotate() -> None:\n    raise OSError('full')\n\n\nasync def _unused()"
    text = EXAMPLE.replace("async def _rotate()", failing).replace("every=86_400", "every=0.01")
    (plugins / "audit.py").write_text(text)
    async with running(write_config(tmp_path, SOURCES)) as relay:
        await until(lambda: caplog.messages.count("job audit.rotate failed") >= 2)
        assert await send(relay)


def test_a_misspelt_hook_stops_the_start(tmp_path, plugins):
    (plugins / "audit.py").write_text(EXAMPLE.replace("relay_attempts_recorded", "relay_attempt_recorded"))
    with pytest.raises(ConfigError, match='did you mean "relay_attempts_recorded"'):
        load(write_config(tmp_path, SOURCES))
