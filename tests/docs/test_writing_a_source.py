"""docs/writing-a-source.md: the example, its test and the tables match the code."""

import asyncio
import inspect
import re
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest

from relay import errors, source
from relay.app import App
from relay.config.schema import SourceConfig
from relay.config.secrets import Secret
from relay.demo.story import DemoReceiver
from relay.errors import Refusal, Unavailable
from relay.plugin_loading.loader import load
from relay.source import Incoming

PAGE = (Path(__file__).parents[2] / "docs" / "writing-a-source.md").read_text()
EXAMPLE, TEST, SIGNED = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SETTINGS, DECLARED, _ = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
SECRET = Secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
SCAN = {"scan_id": "s1", "parcel": "p7", "status": "delivered", "details": {"kg": 1.5}}
CONFIG = """
development = true
[server]
listen = "127.0.0.1:0"
[admin]
listen = ""
[destinations.receiver]
url = "{receiver}"
events = ["parcels.*"]
secrets = ["{secret}"]
allow_private = true
"""


@asynccontextmanager
async def running(folder, receiver):
    """Run the app with the page's example as the only file in plugins.d; yields its public URL."""
    (folder / "plugins.d").mkdir()
    (folder / "plugins.d" / "parcels.py").write_text(EXAMPLE)
    config = folder / "config.toml"
    config.write_text(CONFIG.format(receiver=receiver, secret=SECRET.reveal()) + SETTINGS)
    app = App(load(config, {}))
    ready = asyncio.get_running_loop().create_future()
    life = asyncio.create_task(app.run(ready.set_result))
    await asyncio.wait((life, ready), return_when=asyncio.FIRST_COMPLETED)
    try:
        if ready.done():
            yield ready.result().public
    finally:
        app.stopping.set()
        await life


async def test_the_example_in_plugins_d_accepts_events_and_refuses_in_its_own_form(tmp_path):
    async with (
        DemoReceiver(SECRET) as receiver,
        running(tmp_path, receiver.url) as url,
        aiohttp.ClientSession(headers={"Authorization": "Bearer dev-token"}) as session,
    ):

        async def post(path="/parcels/B2/scans", **request):
            async with session.post(url + path, **request) as response:
                return response.status, await response.json()

        status, first = await post(json=SCAN)
        assert (status, first) == (200, {"ok": True, "id": first["id"]})
        arrival = await asyncio.wait_for(receiver.arrivals.get(), 10)
        assert (arrival.type, arrival.subject, arrival.problem) == ("parcels.delivered", "p7", None)

        assert await post(json=SCAN) == (200, first)  # its scan_id is the key
        assert await post(data=b"{") == (400, {"ok": False, "why": "The body is not valid JSON"})
        assert await post(json={**SCAN, "details": 1}) == (
            400,
            {"ok": False, "why": "details: expected an object"},
        )
        assert await post(json=SCAN, headers={"Authorization": "Bearer guess"}) == (
            401,
            {"ok": False, "why": "Missing or invalid token"},
        )
        assert await post("/parcels/nowhere") == (404, {"ok": False, "why": "No such path"})
        assert receiver.arrivals.empty()


def test_the_tests_of_the_example_pass(tmp_path, monkeypatch):
    (tmp_path / "parcels.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        namespace: dict[str, object] = {}
        exec(compile(TEST, "test_parcels.py", "exec"), namespace)
        tests = [value for name, value in namespace.items() if name.startswith("test_")]
        for test in tests:
            test()
    finally:
        sys.modules.pop("parcels", None)
    assert len(tests) == 3


def test_the_page_states_the_length_of_the_example():
    lines = EXAMPLE.splitlines()
    full = [line for line in lines if line]
    assert f"in {len(lines)} lines, {len(full)} of them not blank:" in PAGE
    assert len(full) <= 40


def test_every_refusal_is_in_the_table_with_its_status_and_reason():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| `(\w+)` \|", PAGE, re.MULTILINE)
    others = (Refusal, Unavailable, errors.AlreadyRetried)  # the last one is for operators
    refusals = [
        (name, str(value.status), value.reason)
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Refusal) and value not in others
    ]
    assert sorted(rows) == sorted(refusals)


@pytest.mark.parametrize("name", source.__all__)
def test_everything_that_a_source_may_import_is_on_the_page(name):
    assert re.search(rf"\b{name}\b", PAGE)


def test_the_keys_that_belong_to_every_source_are_on_the_page():
    [sentence] = re.findall(r"The keys ([^.]*) belong to", " ".join(PAGE.split()))
    common = {field.name for field in msgspec.structs.fields(SourceConfig)} - {"name", "settings", "compiled"}
    assert set(re.findall(r"`(\w+)`", sentence)) == common


def test_a_source_of_github_takes_fewer_than_40_lines():
    assert len(SIGNED.splitlines()) < 40


PYTHON = "[sources.github]\nplugin = 'my-github'\nsecrets = [\"It's a Secret to Everybody\"]\n"
PRESET = PYTHON.replace("my-github", "github")


@pytest.mark.parametrize("settings", [PYTHON, DECLARED, PRESET], ids=["Python", "generic", "preset"])
def test_a_source_of_github_accepts_what_github_signs(tmp_path, settings):
    """The secret, the body and the signature are those of GitHub's page "Validating webhook deliveries"."""
    (tmp_path / "plugins.d").mkdir()
    (tmp_path / "plugins.d" / "github.py").write_text(SIGNED)
    config = tmp_path / "config.toml"
    config.write_text(f"development = true\n{settings}")
    github = load(config, {}).config.sources["github"].settings
    signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    headers = {"X-Hub-Signature-256": signature, "X-GitHub-Event": "ping"}
    github.verify(Incoming.of("POST", "/hooks/github", headers, b"Hello, World!"))
    with pytest.raises(errors.Unauthenticated):
        github.verify(Incoming.of("POST", "/hooks/github", headers, b"Hello, World"))
    body = b'{"action":"opened","repository":{"full_name":"o/r"},"number":45000.00}'
    headers = {"X-GitHub-Event": "issues", "X-GitHub-Delivery": "72d3162e"}
    signed = github.sign(Incoming.of("POST", "/hooks/github", headers, body))
    github.verify(signed)
    event = github.receive(signed).event
    assert (event.type, event.subject) == ("issues.opened", "o/r")
    assert event.key == signed.header("X-GitHub-Delivery")
    assert bytes(event.data) == body
