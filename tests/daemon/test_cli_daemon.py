"""How commands connect to the running relay, and their errors if they cannot."""

import asyncio
import json
import os
import socket
import threading

import click
import pytest
from click.testing import CliRunner
from daemons import SOURCES, adorn, destination, write_config
from support import until
from wire import request

from relay.cli import api_client as client
from relay.cli.endpoint import daemon_options
from relay.cli.main import Group

TOKEN = "an-admin-token"


@click.group(cls=Group)
def main():
    pass


@main.command()
@click.argument("method")
@click.argument("path", nargs=-1)
@click.option("--limit")
@daemon_options
def ask(daemon, method, path, limit):
    verb = getattr(daemon, method)
    answer = verb(*path, limit=limit) if method == "get" else verb(*path)
    click.echo(json.dumps(answer))


@main.command()
@click.argument("path")
@click.argument("query", required=False)
@daemon_options
def follow(daemon, path, query):
    with daemon.follow(path, source=query) as stream:
        for name, item in stream:
            click.echo(json.dumps([name, item]))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Hide the configuration and the relay of this machine."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(client, "RUNTIME", tmp_path / "run")
    relays_own = [name for name in os.environ if name.startswith("RELAY_")]
    for name in ("RUNTIME_DIRECTORY", "STATE_DIRECTORY", *relays_own):
        monkeypatch.delenv(name, raising=False)


def run(*args, command="ask", **environ):
    return CliRunner().invoke(main, [command, *map(str, args)], env=environ)


@pytest.fixture
def config(tmp_path):
    file = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/hook"))
    file.write_text(file.read_text().replace("[admin]", f'[admin]\ntokens = ["{TOKEN}"]'))
    return file


@pytest.fixture
async def ran(relay, config, tmp_path):
    """Run commands against the relay, in a thread, because they block."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "wrong").write_text("guessed")
    known = {
        "config": config,
        "socket": relay.addresses.socket,
        "url": relay.addresses.admin,
        "folder": tmp_path,
    }

    async def run_(*args, command="ask", **environ):
        args = [str(arg).format(**known) for arg in args]
        environ = {name: value.format(**known) for name, value in environ.items()}
        return await asyncio.to_thread(run, *args, command=command, **environ)

    return run_


@pytest.mark.parametrize(
    ("args", "environ"),
    [
        (["-c", "{config}"], {}),
        ([], {"RELAY_CONFIG": "{config}"}),
        (["--socket", "{socket}"], {}),
        ([], {"RELAY_SOCKET": "{socket}"}),
        (["--url", "{url}", "--token-file", "{folder}/token"], {}),
        (["--url", "{url}/", "--token-file", "{folder}/token"], {}),
        (["--token-file", "{folder}/token"], {"RELAY_URL": "{url}"}),
        ([], {"RELAY_URL": "{url}", "RELAY_TOKEN_FILE": "{folder}/token"}),
        ([], {"RELAY_URL": "{url}", "RELAY_TOKEN": TOKEN}),
        (["--url", "{url}"], {"RELAY_TOKEN": f"{TOKEN}\n", "RELAY_SOCKET": "nowhere"}),
        # Options have priority over variables.
        (["--socket", "{socket}"], {"RELAY_URL": "http://127.0.0.1:1", "RELAY_TOKEN": "t"}),
        (["-c", "{config}"], {"RELAY_URL": "http://127.0.0.1:1", "RELAY_TOKEN": "t"}),
        (["-c", "{config}"], {"RELAY_SOCKET": "nowhere"}),
        (["--url", "{url}"], {"RELAY_URL": "http://127.0.0.1:1", "RELAY_TOKEN": TOKEN}),
        (["--url", "{url}", "--token-file", "{folder}/token"], {"RELAY_TOKEN": "guessed"}),
    ],
)
async def test_a_relay_is_found_by_its_config_its_socket_or_its_url(ran, args, environ):
    result = await ran("get", "status", *args, **environ)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["destinations"] == ["crm"]


async def test_the_socket_is_found_where_the_unit_puts_it(ran, relay, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "relay.sock").symlink_to(relay.addresses.socket)
    assert (await ran("get", "status")).exit_code == 0  # without any configuration
    other = tmp_path / "other.toml"
    other.write_text('state_dir = "nowhere"\n')
    assert (await ran("get", "status", "-c", other)).exit_code == 0


async def test_a_path_is_quoted_and_an_absent_query_left_out(ran):
    socket_ = ("--socket", "{socket}")
    result = await ran("get", "deliveries", "--limit", "1", *socket_)
    assert json.loads(result.stdout)["items"] == []
    result = await ran("get", "deliveries", "--limit", "many", *socket_)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == '"limit": expected a whole number of 1 or more, got "many"'
    result = await ran("post", "destinations", "a/b c", "pause", *socket_)
    assert result.exit_code == 4
    assert result.stderr == 'unknown destination "a/b c"\n  known: crm\n'


@pytest.mark.parametrize(
    "where", [["--socket", "{socket}"], ["--url", "{url}", "--token-file", "{folder}/token"]]
)
async def test_a_stream_is_followed_until_its_end(ran, relay, where):
    following = asyncio.create_task(ran("tail", "adorn", *where, command="follow"))
    await until(lambda: relay.app.api._tail._followers)
    answer = await relay.exchange(request("POST", "/v1/events", adorn("s-é")))
    relay.app.api.end_streams()
    result = await following
    assert result.exit_code == 0, result.output
    name, item = json.loads(result.stdout.splitlines()[0])
    assert (name, item["id"], item["subject"]) == ("event", answer.json["event_id"], "s-é")


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["tail", "adron", "--socket", "{socket}"], 4, 'unknown source "adron"'),
        (["nothing", "--socket", "{socket}"], 4, "Not Found"),
        (["status", "--socket", "{socket}"], 3, "is not a hookferry admin API (HTTP 200)"),
        (["tail", "--url", "{url}", "--token-file", "{folder}/wrong"], 5, "missing or unknown token"),
        (["tail", "--socket", "{folder}/absent"], 3, "cannot connect to the daemon at"),
    ],
)
async def test_a_refused_stream_has_the_usual_error(ran, args, code, text):
    result = await ran(*args, command="follow")
    assert result.exit_code == code
    assert text in result.stderr.splitlines()[0]


async def test_post_and_delete_return_the_response(ran):
    result = await ran("post", "destinations", "crm", "pause", "--socket", "{socket}")
    assert json.loads(result.stdout)["held"] == "paused"


async def test_a_404_exits_with_4_and_the_daemon_s_hint(ran):
    result = await ran("delete", "replays", "rpl_none", "--socket", "{socket}")
    assert result.exit_code == 4
    assert result.stderr.startswith('unknown replay "rpl_none"\n  a restart ends all replays')


async def test_an_unknown_token_exits_with_5_and_the_place_of_the_token(ran, relay, tmp_path):
    for args, environ, place in (
        (["--url", "{url}", "--token-file", "{folder}/wrong"], {}, f"{tmp_path}/wrong"),
        (
            [],
            {"RELAY_URL": "{url}", "RELAY_TOKEN_FILE": "{folder}/wrong"},
            f"{tmp_path}/wrong (from RELAY_TOKEN_FILE)",
        ),
        ([], {"RELAY_URL": "{url}", "RELAY_TOKEN": "guessed"}, "RELAY_TOKEN"),
    ):
        result = await ran("get", "status", *args, **environ)
        message, hint = result.stderr.splitlines()
        assert (result.exit_code, message) == (5, "missing or unknown token")
        url = relay.addresses.admin + (" (from RELAY_URL)" if environ else "")
        assert hint.startswith(f"  {url} does not accept the token from {place}; use one of `[admin] tokens`")
        assert "guessed" not in result.output


def test_a_connection_without_permission_exits_with_5(tmp_path, monkeypatch):
    def forbid(_self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(client._SocketConnection, "connect", forbid)
    result = run("get", "status", "--socket", tmp_path / "s")
    assert result.exit_code == 5
    assert result.stderr.startswith(
        f"cannot connect to {tmp_path}/s: permission denied\n  run the command as root, or as a member"
    )


@pytest.mark.parametrize(
    ("file", "text"),
    [("absent", "No such file or directory"), ("stale", "Connection refused"), ("x" * 200, "too long")],
)
def test_a_missing_socket_exits_with_3_and_a_hint(tmp_path, file, text):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "stale"))
    result = run("get", "status", "--socket", tmp_path / file)
    assert result.exit_code == 3
    message, hint = result.stderr.splitlines()
    assert message.startswith(f"cannot connect to the daemon at {tmp_path / file}: ")
    assert text in message
    assert hint == "  start it with `relay serve`, or name its socket with --socket or RELAY_SOCKET"


def test_a_refused_connection_exits_with_3(tmp_path):
    (tmp_path / "token").write_text("t")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        result = run("get", "status", "--url", url, "--token-file", tmp_path / "token")
    assert result.exit_code == 3
    assert result.stderr.startswith(
        f"cannot connect to the daemon at {url}: Connection refused\n  check `[admin] listen`"
    )


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<ht>", "{} is not a hookferry admin API"),
        (b"HTTP/1.1 599 No\r\nContent-Length: 2\r\n\r\n[]", "{} is not a hookferry admin API (HTTP 599)"),
        (b"SSH-2.0-OpenSSH\r\n", "cannot connect to the daemon at {}: SSH-2.0-OpenSSH"),
        (b"", "cannot connect to the daemon at {}: Remote end closed connection without response"),
        (None, "no answer from {} within 0.05 s"),
    ],
)
def test_another_server_at_the_address_exits_with_3(tmp_path, monkeypatch, answer, text):
    monkeypatch.setattr(client, "TIMEOUT", 0.05 if answer is None else 5.0)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve():
            peer, _ = listener.accept()
            with peer:
                peer.recv(65_536)
                if answer is not None:
                    peer.sendall(answer)
                else:
                    peer.recv(1)  # until it gives up

        thread = threading.Thread(target=serve)
        thread.start()
        result = run("get", "status", "--socket", path)
        thread.join(5)
    assert result.exit_code == 3
    assert result.stderr.splitlines()[0] == text.format(path)


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--url", "http://127.0.0.1:1"], 2, "--url needs --token-file, RELAY_TOKEN_FILE or RELAY_TOKEN"),
        (["--url", "http://h:1", "--socket", "s"], 2, "--url and --socket name two daemons"),
        (["--token-file", "x"], 2, "--token-file needs --url"),
        (["--url", "127.0.0.1:8081", "--token-file", "{token}"], 2, 'expected "http://host:port"'),
        (["--url", "http://h:nine", "--token-file", "{token}"], 2, 'expected "http://host:port"'),
        (["--url", "http://h/api", "--token-file", "{token}"], 2, 'expected "http://host:port"'),
        (["--url", "http://h:1", "--token-file", "absent"], 1, "cannot read absent: No such file"),
        ([], 1, "there is no configuration"),
        (["-c", "absent.toml"], 1, "absent.toml: cannot be read"),
    ],
)
def test_wrong_usage_has_an_error_message(tmp_path, args, code, text):
    (tmp_path / "token").write_text("t")
    result = run("get", "status", *[arg.format(token=tmp_path / "token") for arg in args])
    assert result.exit_code == code
    assert text in result.stderr


@pytest.mark.parametrize(
    ("environ", "code", "text"),
    [
        (
            {"RELAY_URL": "http://127.0.0.1:1"},
            2,
            "RELAY_URL needs --token-file, RELAY_TOKEN_FILE or RELAY_TOKEN",
        ),
        ({"RELAY_URL": "http://h:1", "RELAY_SOCKET": "s"}, 2, "RELAY_URL and RELAY_SOCKET are both set"),
        ({"RELAY_URL": "h:1", "RELAY_TOKEN": "t"}, 2, "Invalid value for RELAY_URL: expected"),
        ({"RELAY_URL": "http://h:1", "RELAY_TOKEN_FILE": "absent"}, 1, "cannot read absent: No such file"),
        ({"RELAY_URL": "http://h:1", "RELAY_TOKEN": ""}, 1, "the token from RELAY_TOKEN is empty"),
        ({"RELAY_URL": "http://h:1", "RELAY_TOKEN": "a\nb"}, 1, "the token from RELAY_TOKEN contains spaces"),
        ({"RELAY_URL": "http://h:1", "RELAY_TOKEN": "schlüssel"}, 1, "characters other than ASCII"),
        (
            {"RELAY_URL": "http://127.0.0.1:1", "RELAY_TOKEN": "t"},
            3,
            "cannot connect to the daemon at http://127.0.0.1:1 (from RELAY_URL): Connection refused",
        ),
        ({"RELAY_SOCKET": "absent"}, 3, "the daemon at absent (from RELAY_SOCKET): No such file"),
    ],
)
def test_messages_name_the_variable_that_is_at_fault(environ, code, text):
    result = run("get", "status", **environ)
    assert (result.exit_code, text in result.stderr) == (code, True), result.stderr
