"""`relay send` and `relay listen`: a sender and a receiver for an operator."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from commands import run
from daemons import SOURCES, destination, running, write_config

from relay.cli import send
from relay.config.secrets import Secret
from relay.config.signatures import SCHEMES
from relay.signing import Signer, signer_of

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, SOURCES)


@pytest.mark.parametrize(
    ("source", "types"),
    [
        ("adorn", ["image.shared"]),
        ("compozy", ["user.created"]),
        ("lazychat", ["plugin.updated"]),
        ("moddy", ["member_joined"]),
        ("whatsapp", ["qr_ready", "register", "heartbeat", "unregister"]),
    ],
)
async def test_every_sample_of_a_bundled_source_is_accepted(config, source, types):
    assert [row[0] for row in run("send", source, "--list", "-c", config).rows] == types
    page = run("send", source, "--list", "--json", "-c", config).json
    assert ([each["type"] for each in page["items"]], page["next_cursor"]) == (types, None)
    async with running(config) as relay:
        for number, type_ in enumerate(types):
            to = ["--to", relay.addresses.public] if number else []  # the daemon knows its own address
            result = await asyncio.to_thread(run, "send", source, type_, "-c", config, *to)
            assert result.out.startswith("20"), result
        assert await relay.rows(source=source)


def test_without_a_source_the_samples_of_all_are_listed(config):
    found = run("send", "--list", "-c", config).rows
    assert [row[0] for row in found if row[1] == "image.shared"] == ["adorn"]
    assert {len(row) for row in found} == {4}
    assert "Missing argument 'SOURCE'" in run("send", "-c", config, code=2).err


async def test_a_sample_that_registers_a_worker_prints_how_to_remove_it(config):
    async with running(config) as relay:
        for type_, is_reported in (
            ("register", True),
            ("heartbeat", True),
            ("qr_ready", False),
            ("unregister", False),
        ):
            wish = ("send", "whatsapp", type_, "-c", config, "--to", relay.addresses.public)
            result = await asyncio.to_thread(run, *wish)
            assert ("offline after 1m30s without a heartbeat" in result.err) is is_reported
            assert ("`relay send whatsapp unregister`" in result.err) is is_reported
        assert [w for w in relay.app.store.workers.all() if w.unregistered_at is None] == []


async def test_another_body_can_be_sent(config, tmp_path):
    (tmp_path / "body.json").write_text('{"event_type": "x.y", "session_id": "mine"}')
    async with running(config) as relay:
        wish = ("send", "adorn", "-c", config, "--to", relay.addresses.public, "--json")
        result = await asyncio.to_thread(run, *wish, "--data", f"@{tmp_path / 'body.json'}")
        assert result.json["status"] == 200
        result = await asyncio.to_thread(run, *wish, "--data", "-", stdin='{"event_type": "z"', code=1)
        assert result.json["status"] == 400
        assert "returned 400" in result.err
        assert [row["subject"] for row in await relay.rows()] == ["mine"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["adron"], 4, 'unknown source "adron", did you mean "adorn"?'),
        (["adorn", "image.share"], 4, 'unknown sample "image.share", did you mean "image.shared"?'),
        (["adorn", "--data", "body.json"], 2, "expected @FILE or -, as in --data @body.json"),
        (["adorn", "--data", '{"event_type": "x"}'], 2, "expected @FILE or -, as in --data @body.json"),
        (["adorn", "--data", "@absent"], 2, "cannot read absent: No such file"),
        (["adorn"], 3, "start the daemon with `relay serve`, or name its listener with --to URL"),
    ],
)
def test_wrong_usage_of_send_has_a_hint(config, args, code, message):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        config.write_text(config.read_text().replace(":0", f":{taken.getsockname()[1]}", 1))
        assert message in run("send", *args, "-c", config, code=code).err


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ("127.0.0.1:9001", "http://127.0.0.1:9001"),
        ("0.0.0.0:9001", "http://127.0.0.1:9001"),
        ("[::]:9001", "http://[::1]:9001"),
        ("9001", "http://127.0.0.1:9001"),
        ("/run/relay/public.sock", "http://127.0.0.1:8080"),
        (None, "http://127.0.0.1:8080"),
    ],
)
def test_without_a_daemon_the_socket_unit_of_the_service_has_the_address(
    config, monkeypatch, stream, expected
):
    monkeypatch.setattr(send, "service_of", lambda path: path == config)
    monkeypatch.setattr(send, "listen_streams", lambda: {} if stream is None else {"public": stream})
    assert send._listener(config, "127.0.0.1:8080") == expected
    monkeypatch.setattr(send, "service_of", lambda path: None)  # another configuration than the service's
    assert send._listener(config, "127.0.0.1:8080") == "http://127.0.0.1:8080"


@contextlib.contextmanager
def listening(*args):
    """Run `relay listen` as a process, and interrupt it at the end."""
    command = [sys.executable, "-c", "from relay.cli import main; main()", "listen", "0", *args]
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as process:
        try:
            line = process.stderr.readline()
            assert line.startswith("listening on http://127.0.0.1:"), line + process.stderr.read()
            yield line.split()[-1], process.stdout
        finally:
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(10) == 130
            finally:
                process.kill()


def post(url, body, headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_requests_are_verified_and_printed():
    signed = Signer((Secret(SECRET),)).headers("evt_1", int(time.time()), b'{"a": 1}')
    with listening("--secret", SECRET, "--status", "503") as (url, out):
        assert post(url, b'{"a": 1}', signed) == 503
        assert out.readline() == 'evt_1\tsignature ok\t{"a": 1}\n'
        assert post(url, b'{"a": 2}', signed) == 401
        assert out.readline().startswith("evt_1\tsignature wrong: no signature matches")
        assert post(url, b"{}", {}) == 401
        assert "missing webhook-id" in out.readline()


@pytest.mark.parametrize("scheme", ["github", "stripe", "svix"])
def test_other_schemes_are_verified(scheme):
    signer = signer_of((SCHEMES[scheme],), (Secret(SECRET),), method="POST", url="")
    signed = signer.headers("evt_1", int(time.time()), b"{}")
    with listening("--secret", SECRET, "--scheme", scheme) as (url, out):
        assert post(url, b"{}", signed) == 204
        assert out.readline() == "evt_1\tsignature ok\t{}\n"
        assert post(url, b"{ }", signed) == 401
        assert "signature wrong: no signature matches" in out.readline()


def test_in_a_pipe_a_request_is_one_line_without_control_characters():
    with listening() as (url, out):
        assert post(url, b"one\x1b[2J\n\ttwo", {"webhook-id": "evt\x9b2"}) == 204
        assert out.readline() == "evt\\x9b2\tnot verified\tone\\x1b[2J two\n"


def test_without_a_secret_nothing_is_verified():
    with listening("--json") as (url, out):
        assert post(url + "/hook", b"plain", {"webhook-id": "evt_2"}) == 204
        result = json.loads(out.readline())
        assert {**result, "headers": None} == {
            "id": "evt_2", "signature": "not verified", "method": "POST", "path": "/hook", "headers": None,
            "body": "plain",
        }  # fmt: skip
        assert "evt_2" in result["headers"].values()


@pytest.mark.parametrize("body", [b'{"a": 1}\r\n', b"\xff\x00"])
def test_json_output_of_listen_can_be_verified(tmp_path, body):
    config = write_config(tmp_path, destination("crm", "http://127.0.0.1:9/"))
    signed = Signer((Secret(SECRET),)).headers("evt_1", int(time.time()), body)
    with listening("--json") as (url, out):
        assert post(url, b'{"other": 1}\n', signed) == 204
        assert post(url, body, signed) == 204
        other, line = out.readline(), out.readline()
    file = tmp_path / "captured.json"
    args = ("--destination", "crm", "--request", file, "-c", config)
    file.write_text(line)
    assert run("verify", *args).out == "valid: destinations.crm.secrets[0]\n"
    file.write_text(json.dumps(json.loads(line), indent=2))
    assert run("verify", *args).out == "valid: destinations.crm.secrets[0]\n"
    file.write_text(other + line)
    result = run("verify", *args)
    assert result.out == "valid: destinations.crm.secrets[0]\n"
    assert "the last of 2 requests in the file" in result.err
    file.write_text(line + other)
    run("verify", *args, code=1)


def test_an_invalid_secret_and_a_port_in_use_are_errors():
    assert "--secret" in run("listen", "0", "--secret", "s", code=2).err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("listen", taken.getsockname()[1], code=1)
    assert result.err.endswith(
        "Address already in use\n  choose another port: relay listen 0 selects a free one\n"
    )
