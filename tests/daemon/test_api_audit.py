"""Who changed what: a line in the log for every change that operators make, whatever the level."""

import json
import logging
import os
import pwd

import pytest
from daemons import SOURCES, destination, running, write_config
from wire import exchange, request

TOKENS = ("an-admin-token", "another-token")
ME = f"{pwd.getpwuid(os.getuid()).pw_name} (uid {os.getuid()}), pid {os.getpid()}"


@pytest.fixture
async def relay(tmp_path):
    config = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/hook"))
    text = config.read_text().replace("[admin]", f"[admin]\ntokens = {json.dumps(TOKENS)}")
    config.write_text(text)
    async with running(config) as relay:
        yield relay


@pytest.fixture
def lines(caplog):
    logging.getLogger("relay").setLevel(logging.WARNING)  # as [log] level has it
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "relay.audit"]
    logging.getLogger("relay").setLevel(logging.NOTSET)


def asked(method, path, body=None, **headers):
    return request(method, path, b"" if body is None else json.dumps(body).encode(), **headers)


async def test_a_change_by_the_socket_names_its_process_and_user(relay, lines):
    await relay.operator("POST", "/api/destinations/crm/pause")
    assert lines() == [f"{ME}: POST /api/destinations/crm/pause: 200"]


async def test_a_change_by_the_listener_names_the_token_by_its_place_and_the_address(relay, lines):
    headers = {"authorization": f"Bearer {TOKENS[1]}", "host": "127.0.0.1"}
    answer = await exchange(
        relay.addresses.admin, asked("POST", "/api/sources/moddy/pause?token=secret", {}, **headers)
    )
    assert answer.status == 200
    assert lines() == ["token 2, 127.0.0.1: POST /api/sources/moddy/pause: 200"]


async def test_what_is_asked_for_in_the_body_is_told_and_what_came_of_it(relay, lines):
    wish = {"filter": {"destination": "crm", "state": "dead"}}
    answer = await exchange(relay.addresses.socket, asked("POST", "/api/replays", {**wish, "to": "nowhere"}))
    assert answer.status == 404
    told = json.dumps({**wish, "to": "nowhere"}, separators=(",", ":"))
    assert lines() == [f"{ME}: POST /api/replays {told}: 404"]


async def test_a_worker_s_command_may_hold_a_secret_and_is_not_told(relay, lines):
    path = "/api/v1/workers/register"
    body = json.dumps({"workerId": "w1", "endpoint": "http://w1"}).encode()
    headers = {"authorization": "Bearer worker-secret-token-12345"}
    assert (await relay.exchange(request("POST", path, body, **headers))).status == 200
    command = {"command": {"type": "login", "password": "hush"}}
    path = "/api/workers/whatsapp/w1/commands"
    assert (await exchange(relay.addresses.socket, asked("POST", path, command))).status == 201
    assert lines() == [f"{ME}: POST {path}: 201"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api/destinations", None),
        ("POST", "/api/deliveries/retry", {"filter": {"state": "dead"}, "dry_run": True}),
    ],
)
async def test_what_changes_nothing_is_not_told(relay, lines, method, path, body):
    assert (await exchange(relay.addresses.socket, asked(method, path, body))).status == 200
    assert lines() == []


async def test_who_may_not_change_anything_did_not(relay, lines):
    headers = {"authorization": "Bearer guessed", "host": "localhost"}
    answer = await exchange(
        relay.addresses.admin, asked("POST", "/api/destinations/crm/pause", {}, **headers)
    )
    assert answer.status == 401
    assert lines() == []
