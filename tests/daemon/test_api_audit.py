"""The log of changes over the admin API, which no log level turns off."""

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
    logging.getLogger("relay").setLevel(logging.WARNING)  # as `[log] level` does
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "relay.audit"]
    logging.getLogger("relay").setLevel(logging.NOTSET)


def asked(method, path, body=None, **headers):
    return request(method, path, b"" if body is None else json.dumps(body).encode(), **headers)


async def test_a_change_over_the_socket_logs_process_and_user(relay, lines):
    await relay.operator("POST", "/api/destinations/crm/pause")
    assert lines() == [f"{ME}: POST /api/destinations/crm/pause: 200"]


async def test_a_change_over_the_listener_logs_token_number_and_address(relay, lines):
    headers = {"authorization": f"Bearer {TOKENS[1]}", "host": "127.0.0.1"}
    answer = await exchange(
        relay.addresses.admin, asked("POST", "/api/sources/moddy/pause?token=secret", {}, **headers)
    )
    assert answer.status == 200
    assert lines() == ["token 2, 127.0.0.1: POST /api/sources/moddy/pause: 200"]


async def test_the_body_and_the_status_of_a_change_are_logged(relay, lines):
    fields = {"filter": {"destination": "crm", "state": "dead"}}
    answer = await exchange(
        relay.addresses.socket, asked("POST", "/api/replays", {**fields, "to": "nowhere"})
    )
    assert answer.status == 404
    body = json.dumps({**fields, "to": "nowhere"}, separators=(",", ":"))
    assert lines() == [f"{ME}: POST /api/replays {body}: 404"]


async def test_the_stored_body_of_a_change_names_no_person(relay):
    fields = {"subject": "member-42", "where": {"data.email": "zoe@example.com"}, "destination": "crm"}
    answer = await exchange(
        relay.addresses.socket, asked("POST", "/api/deliveries/cancel", {"filter": fields})
    )
    assert answer.status == 200
    page = await exchange(relay.addresses.socket, asked("GET", "/api/audit?limit=1"))
    [entry] = json.loads(page.body)["items"]
    masked = {"subject": "<masked>", "where": "<masked>", "destination": "crm"}
    assert json.loads(entry["body"]) == {"filter": masked}


async def test_a_command_for_a_worker_is_not_logged_because_it_may_contain_a_secret(relay, lines):
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
async def test_requests_that_change_nothing_are_not_logged(relay, lines, method, path, body):
    assert (await exchange(relay.addresses.socket, asked(method, path, body))).status == 200
    assert lines() == []


async def test_a_refused_caller_changes_nothing_and_is_not_logged(relay, lines):
    headers = {"authorization": "Bearer guessed", "host": "localhost"}
    answer = await exchange(
        relay.addresses.admin, asked("POST", "/api/destinations/crm/pause", {}, **headers)
    )
    assert answer.status == 401
    assert lines() == []
