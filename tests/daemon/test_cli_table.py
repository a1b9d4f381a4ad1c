"""Every command in every condition: its message, the stream, the next step, and the exit code.

The commands come from the click tree, so a new command is tested without a change here. A command with an
argument of a new kind fails until tests/helpers/commands.py knows a value for it.
"""

import asyncio
import json
import re
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
import pytest
import pytest_asyncio
from click.testing import CliRunner
from commands import LEAVES, Commands, arguments, kind_of, value_of
from daemons import SERVE, SOURCES, Daemon, Recorder, adorn, destination, running, write_config
from lanes import CLOCK
from machines import NOBODY, ROOT, SHARED
from stores import KINDS, make_store
from support import until
from wire import exchange, request

from relay.cli import main
from relay.cli.main import EXIT_CODES

TOKEN = "an-admin-token"
NOBODY_THERE = "http://127.0.0.1:9"
WORKER = {"Authorization": "Bearer worker-secret-token-12345"}

MORE = {
    ("deliveries", "cancel"): ["--yes"],
    ("deliveries", "retry"): ["--yes"],
    ("events", "delete"): ["--yes"],
    ("events", "replay"): ["--yes", "--to", "crm"],
    ("workers", "forget"): ["--yes"],
    ("config", "schema"): ["--bundled"],
    ("init",): ["--yes"],
    ("plugins", "new"): ["--dir", "{folder}"],
    ("send",): ["--to", "{public}"],
    ("sources", "add"): ["--print"],
    ("tail",): ["--limit", "1"],
    ("top",): ["--once"],
    ("verify",): ["--source", "adorn", "--request", "{request}"],
}
"""Options without which a command waits, asks, or has too little to do."""

OTHER = {
    ("events", "delete", "event"): "{doomed}",
    ("deliveries", "cancel", "delivery"): "{held}",
    ("workers", "forget", "worker"): "{leaving}",
}
"""Values that a command consumes, which later ones would miss."""

NEEDS_NAMES = {"--to": "destination", "--event": "event"}
"""Options with a name in them, beside `--source` and `--destination`, which test_cli_misspelt.py is about."""

WRONG = {"--type": "!adorn.*", "--where": "a=1=2!", "--rate": "often", "--since": "soon", "--until": "soon"}
"""Values that no callback of these options accepts; for others, see `wrong_value`."""

WRITTEN = {
    ("config", "init"): "file",
    ("init",): "folder",
    ("db", "backup"): "file",
    ("events", "export"): "output",
    ("plugins", "new"): "folder",
}
"""The parameter of each command that names a file or a folder to write."""


def options(path):
    """Return the options of a command by their names."""
    return {name: each for each in LEAVES[path].params for name in each.opts if name.startswith("--")}


def valid(path, skip=None):
    """Return the words of a command with everything valid; without one of its parameters."""
    words = list(path)
    for each in arguments(path):
        if each is not skip:
            name = (*path, _word(each))
            words.append(OTHER.get(name) or value_of(path, each))
    return words + MORE.get(path, [])


def _word(argument):
    return (argument.metavar or argument.name).strip("[].").lower()


def filled(words, values):
    """Replace the placeholders."""
    return [values[word[1:-1]] if re.fullmatch(r"\{\w+\}", word) else word for word in words]


TALKING = [path for path in LEAVES if "--socket" in options(path)]
WITH_CONFIG = [path for path in LEAVES if "--config" in options(path)]


@dataclass(frozen=True)
class Cell:
    """A command in a condition."""

    path: tuple[str, ...]
    words: tuple[str, ...]
    code: int
    message: tuple[str, ...]

    def __str__(self):
        return " ".join((*self.words, "")).replace("{", "").replace("}", "")[:60].strip() or "-"


def cell(path, words, code, *message):
    assert code in EXIT_CODES
    return Cell(path, tuple(words), code, message)


def table(cells):
    """Return parameters of a test: each command, with an id that is the same in every process."""
    found = list(cells)
    return pytest.mark.parametrize(
        "case", found, ids=[f"{number}-{each}" for number, each in enumerate(found)]
    )


def invoke(words):
    """Run a command in this process; return its exit code, stdout and stderr."""
    result = CliRunner().invoke(main, words, prog_name="relay")
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    return result.exit_code, result.stdout, result.stderr


def judge(case, code, out, err):
    """Compare the outcome of a command with its cell."""
    shown = f"relay {' '.join(case.words)}\nexit code {code}, expected {case.code}\n{out}\n{err}"
    assert "Traceback" not in out + err, shown
    assert "unexpected error" not in err, shown
    assert code == case.code, shown
    for text in case.message:
        assert text.casefold() in err.casefold(), shown
    if code == 0:
        return
    if code == 2:  # a usage error
        assert re.search(r"^Try 'relay .*--help' for help\.$", err, re.MULTILINE), shown
        assert re.search(r"^Error: \S", err, re.MULTILINE), shown
        return
    lines = err.splitlines()
    assert len(lines) >= 2, shown
    assert lines[-1].startswith("  ") or "`relay" in lines[-1], shown  # the next step


@pytest.fixture(scope="module")
def folder():
    """A folder that everybody may enter, with a short name for the socket."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(folder):
    """A relay with an event, deliveries in each state that commands need, and two workers."""
    async with Recorder() as recorder:
        slow = destination("slow", recorder.url)
        config = write_config(folder, SOURCES, destination("crm", recorder.url), slow)
        config.write_text(config.read_text().replace("[admin]", f'[admin]\ntokens = ["{TOKEN}"]'))
        async with running(config) as relay:
            await Commands(relay.addresses.socket)("destinations", "pause", "slow")
            for name in ("first", "doomed"):
                answer = await relay.exchange(request("POST", "/v1/events", adorn(name)))
                assert answer.status == 200
            for worker in ("worker-1", "worker-2"):
                path = f"/api/v1/workers/{worker}/heartbeat"
                answer = await relay.exchange(request("PUT", path, b"{}", **WORKER))
                assert answer.status == 200
            wrong = request("POST", "/api/v1/events", b"{}", authorization="Bearer test-token")
            assert (await relay.exchange(wrong)).status == 400
            await keep_valid(relay)
            nobody = json.dumps({"filter": {"subject": "nobody"}}).encode()
            answer = await exchange(relay.addresses.socket, request("POST", "/api/replays", nobody))
            assert answer.status == 201
            done = {"destination": "crm", "outcome": "delivered"}
            await until(lambda: relay.counted("relay_deliveries_finished_total", **done) >= 2)
            yield relay


async def keep_valid(relay):
    """Make the refused request valid, as if a plugin had been corrected."""
    refused = relay.app.store.refused
    await relay.app.ingest.refused.flush()
    [[kept], _] = await refused.page(limit=1)
    await refused.prune(kept.at + 1, 0)
    await refused.add([msgspec.structs.replace(kept, body=b'{"name": "a", "payload": {}}')])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def values(relay, folder):
    """Return the value of each placeholder."""
    first, doomed, *_ = [row["id"] for row in await relay.rows(source="adorn")]
    deliveries = await relay.rows("deliveries")
    of = {(row["event_id"], row["destination"]): row["id"] for row in deliveries}
    (folder / "events.jsonl").write_text("")
    (folder / "request.http").write_text("POST /v1/events HTTP/1.1\r\nHost: a\r\n\r\n" + adorn().decode())
    return {
        "event": first,
        "doomed": doomed,
        "delivery": of[first, "crm"],
        "held": of[first, "slow"],
        "refused": (await relay.app.store.refused.page(limit=1))[0][0].id,
        "replay": (await relay.operator("GET", "/api/replays"))["items"][0]["id"],
        "worker": "worker-1",
        "leaving": "worker-2",
        "config": str(folder / "config.toml"),
        "database": str(folder / "state" / "relay.db"),
        "file": str(folder / "events.jsonl"),
        "request": str(folder / "request.http"),
        "folder": str(folder / "made"),
        "new": str(folder / "new"),
        "public": relay.addresses.public,
        "port": relay.addresses.public.rpartition(":")[2],
    }


# --- the daemon is up -----------------------------------------------------------------------------------

FINDING = {
    ("serve",): "another relay",  # uses the state directory
    ("listen",): "cannot listen on port",
    ("doctor",): "slow",  # is paused
    ("db", "move"): "of the same kind",
}
"""Commands that exit with 1 beside the running daemon, and what they find."""

if KINDS[0] == "postgres":
    FINDING |= dict.fromkeys([("db", "backup"), ("db", "compact")], "PostgreSQL")


def up():
    for path in LEAVES:
        words = valid(path)
        if path in WITH_CONFIG and "{config}" not in words:
            words += ["-c", "{config}"]
        if path == ("listen",):
            words.append("{port}")
        code, *message = (1, FINDING[path]) if path in FINDING else (0,)
        yield cell(path, words, code, *message)
        if "--offline" in options(path):
            yield cell(path, [*words, "--offline"], code, *message)


@pytest.mark.asyncio(loop_scope="module")
@table(up())
async def test_with_a_running_daemon_and_valid_words_a_command_succeeds(case, relay, values):
    words = filled(case.words, values)
    if case.path == ("serve",):
        daemon = Daemon(Path(values["config"]), SERVE)
        await daemon.start()
        code = await daemon.exit()
        daemon._listening.exception()
        judge(case, code, "", f"{daemon.output}\n  ")
        return
    running_command = asyncio.create_task(asyncio.to_thread(invoke, words))
    while case.path == ("tail",) and not running_command.done():
        await relay.exchange(request("POST", "/v1/events", adorn("followed")))
        await asyncio.sleep(0.05)
    code, out, err = await running_command
    judge(case, code, out, err)
    assert code or out


# --- the daemon is down ---------------------------------------------------------------------------------


def down():
    for path in LEAVES:
        if path in TALKING:
            message = (
                "cannot connect to the daemon at ",
                "absent.sock: No such file",
                "start it with `relay serve`",
            )
            yield cell(path, [*valid(path), "--socket", "{absent}"], 3, *message)
            message = (
                "cannot connect to the daemon at http://127.0.0.1:9: Connection refused",
                "[admin] listen",
            )
            yield cell(
                path, [*valid(path), "--url", "http://127.0.0.1:9", "--token-file", "{token}"], 3, *message
            )
    yield cell(
        ("send",), ["send", "adorn", "--to", "http://127.0.0.1:9", "-c", "{config}"], 3, "start the daemon"
    )


def alone():
    """Yield a cell for each command that needs no daemon."""
    for path in LEAVES:
        if path in TALKING or path in (("db", "move"), ("listen",), ("send",), ("serve",)):
            continue  # `db move` never asks a daemon: its cell is the one of a running daemon
        words = valid(path)
        if path in WITH_CONFIG and "{config}" not in words:
            words += ["-c", "{config}"]
        yield cell(path, words, 0)


@pytest.fixture
def dead(folder, tmp_path):
    """Values for a machine without a daemon."""
    (tmp_path / "events.jsonl").write_text("")
    (tmp_path / "token").write_text("token")
    config = tmp_path / "config.toml"
    config.write_text('state_dir = "state"\n[sources.adorn]\nplugin = "adorn"\n')
    names = ("event", "delivery", "doomed", "held", "refused", "replay", "worker", "leaving")
    return dict.fromkeys(names, "01a201eb") | {
        "absent": str(tmp_path / "absent.sock"),
        "token": str(tmp_path / "token"),
        "file": str(tmp_path / "events.jsonl"),
        "config": str(config),
    }


@table(down())
def test_without_a_daemon_a_command_exits_with_3(case, dead, monkeypatch):
    monkeypatch.delenv("RELAY_SOCKET", raising=False)
    judge(case, *invoke(filled(case.words, dead)))


@table(alone())
def test_without_a_daemon_other_commands_succeed(case, dead, tmp_path):
    (tmp_path / "request.http").write_text("POST /v1/events HTTP/1.1\r\nHost: a\r\n\r\n" + adorn().decode())
    more = {"request": "request.http", "folder": "made", "new": "new.toml"}
    values = dead | {name: str(tmp_path / file) for name, file in more.items()}
    if case.path == ("db", "check"):
        asyncio.run(_empty(tmp_path / "state" / "relay.db"))
    judge(case, *invoke(filled(case.words, values)))


async def _empty(database):
    """Create an empty database file."""
    database.parent.mkdir(exist_ok=True)
    store = make_store(database, CLOCK, kind="sqlite")
    await store.open()
    await store.close()


# --- the configuration cannot be read -------------------------------------------------------------------

BROKEN = '[server]\nlisten = "127.0.0.1:8080\n'


def unreadable():
    for path in WITH_CONFIG:
        code = 78 if path == ("serve",) else 1
        words = [word for word in valid(path) if word != "--bundled"]
        yield cell(path, [*words, "-c", "{broken}"], code, "broken.toml:2:")
        yield cell(path, [*words, "-c", "{missing}"], code, "missing.toml: cannot be read: No such file")
        yield cell(path, [*words, "-c", "{aside}"], code, "aside: cannot be read: Is a directory")


@table(unreadable())
def test_a_broken_configuration_names_file_line_and_cure(case, dead, tmp_path, monkeypatch):
    monkeypatch.delenv("RELAY_SOCKET", raising=False)
    (tmp_path / "broken.toml").write_text(BROKEN)
    (tmp_path / "aside").mkdir()
    (tmp_path / "request.http").write_text("POST / HTTP/1.1\r\n\r\n")
    more = {name: str(tmp_path / f"{name}.toml") for name in ("broken", "missing")}
    more |= {"aside": str(tmp_path / "aside"), "request": str(tmp_path / "request.http")}
    more |= {"folder": str(tmp_path / "made"), "public": NOBODY_THERE}
    judge(case, *invoke(filled(case.words, dead | more)))


# --- unknown names --------------------------------------------------------------------------------------


def unknown():
    for path, command in LEAVES.items():
        end = ["-c", "{config}"] if path in WITH_CONFIG else []
        for each in command.params:
            if isinstance(each, click.Argument) and not isinstance(each.type, click.Choice):
                name = kind_of(path, each).unknown
                words = list(path)
                for other in command.params:
                    if other is each:
                        words.append(name)
                    elif isinstance(other, click.Argument) and other in set(arguments(path)):
                        words.append(value_of(path, other))
                if name:
                    yield cell(path, [*words, *MORE.get(path, ()), *end], 4, f'"{name}"')
            for option, kind in NEEDS_NAMES.items():
                if option in each.opts and path not in (("init",), ("send",)):  # there it is a URL
                    name = {"destination": "crn", "event": "01a201eb"}[kind]
                    yield cell(path, [*valid(path), option, name, *end], 4, f'"{name}"')


@pytest.mark.asyncio(loop_scope="module")
@table(unknown())
async def test_an_unknown_name_is_repeated_and_exits_with_4(case, relay, values):
    judge(case, *await asyncio.to_thread(invoke, filled(case.words, values)))


def test_the_table_of_unknown_names_is_long_enough():
    assert len(list(unknown())) >= 30


@pytest.mark.asyncio(loop_scope="module")
async def test_an_id_of_another_kind_names_the_command_for_it(relay, values):
    for noun, kind, other in (("deliveries", "delivery", "events"), ("events", "event", "deliveries")):
        code, _, err = await asyncio.to_thread(invoke, [other, "show", values[kind], "-c", values["config"]])
        assert (code, f"`relay {noun} show {values[kind]}`" in err) == (1, True), err


# --- values of a wrong type -----------------------------------------------------------------------------


def wrong_value(path, parameter):
    """Return a value that a parameter refuses; None if it takes every text."""
    option = next((name for name in parameter.opts if name in WRONG), None)
    if isinstance(parameter, click.Argument) and not isinstance(parameter.type, click.Choice):
        return kind_of(path, parameter).wrong or None
    if getattr(parameter, "is_flag", False):
        return None
    if isinstance(parameter.type, click.Choice):
        return "nonsense"
    if isinstance(parameter.type, (click.types.IntParamType, click.types.FloatParamType)):
        return "many"
    if parameter.callback is not None:
        return WRONG[option] if option else "?"
    return None


def wrong():
    for path, command in LEAVES.items():
        for each in command.params:
            if (value := wrong_value(path, each)) is None:
                continue
            name = max(each.opts, key=len) if isinstance(each, click.Option) else ""
            words = list(path)
            for other in command.params:
                if other is each and isinstance(each, click.Argument):
                    words.append(value)
                elif isinstance(other, click.Argument) and other in set(arguments(path)):
                    words.append(value_of(path, other))
            more = [name, value] if name else []
            yield cell(path, [*words, *MORE.get(path, ()), *more], 2, name)


@table(wrong())
def test_a_value_of_a_wrong_type_exits_with_2(case, dead, tmp_path):
    more = {
        "request": str(tmp_path / "request.http"),
        "public": "http://127.0.0.1:9",
        "folder": str(tmp_path),
    }
    Path(more["request"]).write_text("POST / HTTP/1.1\r\n\r\n")
    judge(case, *invoke(filled(case.words, dead | more)))


# --- no permission --------------------------------------------------------------------------------------


def is_path(parameter):
    return isinstance(parameter.type, (click.Path, click.File))


def forbidden():
    for path in LEAVES:
        yield from shut_daemon(path)
        yield from shut_files(path)
        yield from shut_texts(path)
        yield from shut_database(path)


def shut_daemon(path):
    words = valid(path)
    if path in TALKING:
        message = "relay.sock: permission denied", "run the command as root"
        yield cell(path, [*words, "--socket", "{door}"], 5, *message)
        more = ["--url", NOBODY_THERE, "--token-file", "{shut}"]
        yield cell(path, [*words, *more], 5, "shut: Permission denied")
    if path in WITH_CONFIG:
        code = 78 if path == ("serve",) else 5
        words = [word for word in words if word != "--bundled"]
        yield cell(path, [*words, "-c", "{shut}"], code, "shut: cannot be read: Permission denied")


def shut_files(path):
    """Yield a cell for each argument and option that is a path."""
    for each in LEAVES[path].params:
        option = max(each.opts, key=len) if isinstance(each, click.Option) else ""
        if not is_path(each) or option in ("--config", "--socket", "--token-file"):
            continue
        target = "{inside}" if WRITTEN.get(path) == each.name else "{shut}"
        words = [word for word in valid(path, skip=each) if word != "--print"]
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
        words += [option, target] if option else [target]
        words += ["--offline"] if "--offline" in options(path) else []
        is_config = path == ("check-config",) and not option
        words += ["-c", "{readable}"] if path in WITH_CONFIG and not is_config else []
        yield cell(path, words, 5, "Permission denied")


def shut_texts(path):
    """Yield a cell for each option that names a file by `@FILE`, and for `--request`."""
    for option in sorted({"--data", "--request"} & options(path).keys()):
        words = [*path, "--source", "adorn"] if "--source" in options(path) else valid(path)
        shut = "{shut}" if option == "--request" else "{at_shut}"
        more = ["--request", "{request}"] if (path, option) == (("verify",), "--data") else []
        yield cell(path, [*words, *more, option, shut, "-c", "{readable}"], 5, "Permission denied")


def shut_database(path):
    more = ["--offline"] if "--offline" in options(path) else []
    if path == ("db", "backup"):
        more = ["{folder}"]
    if more or path == ("db", "check"):
        message = "relay.db: permission denied", "run the command as root"
        yield cell(path, [*valid(path), *more, "-c", "{locked}"], 5, *message)
    if path == ("db", "move"):
        yield cell(path, [*path, "{shut_database}", "{new_database}"], 5, "permission denied")
        yield cell(path, [*path, "{old_database}", "{inside_database}"], 5, "permission denied")


FORBIDDEN = list(forbidden())

SCRIPT = """
import json, os, sys
import click
from click.testing import CliRunner
import relay.store.opening, relay.store.sqlite.doctor, relay.api.views, relay.app
import relay.diagnosis.source_request
from relay.cli import main
def load(group):
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            load(command)
load(main)
commands = json.load(sys.stdin)
if sys.argv[1]:
    os.setgroups([])
    os.setgid(int(sys.argv[1]))
    os.setuid(int(sys.argv[1]))
results = [CliRunner().invoke(main, words, prog_name="relay") for words in commands]
print(json.dumps([(each.exit_code, each.stdout, each.stderr, repr(each.exception)) for each in results]))
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def denied(relay, values, folder):
    """The outcome of each command for a user without permission to read or write the files."""
    place = folder / "denied"
    place.mkdir()
    shut, inside = place / "shut", place / "aside"
    shut.write_text("")
    inside.mkdir()
    for each in (shut, inside):
        each.chmod(0o700 if ROOT else 0)
    await _empty(place / "relay.db")
    (place / "relay.db").chmod(0o644)
    (place / "readable.toml").write_text(f'state_dir = "{place}"\n[sources.adorn]\nplugin = "adorn"\n')
    door = place / "relay.sock"
    own = {"door": str(door), "shut": str(shut), "inside": str(inside / "new")}
    databases = {"shut": "shut", "new": "new", "old": "relay.db", "inside": "aside/new"}
    own |= {f"{name}_database": f"sqlite:{place / file}" for name, file in databases.items()}
    own |= {"readable": str(place / "readable.toml"), "at_shut": f"@{shut}"}
    (place / "locked.toml").write_text(f'state_dir = "{place}/locked"\n[sources.adorn]\nplugin = "adorn"\n')
    (place / "locked").mkdir()
    (place / "locked" / "relay.db").write_text("")
    (place / "locked" / "relay.db").chmod(0o600 if ROOT else 0)
    own["locked"] = str(place / "locked.toml")
    commands = [filled(each.words, values | own) for each in FORBIDDEN]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(own["door"])
        listener.listen()
        door.chmod(0o600 if ROOT else 0)
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", SCRIPT, str(NOBODY) if ROOT else ""],
            input=json.dumps(commands), capture_output=True, text=True, check=False, timeout=120, cwd=place,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(FORBIDDEN, json.loads(done.stdout), strict=True))


@pytest.mark.skipif(ROOT and not SHARED, reason="needs a checkout that other users may enter")
@pytest.mark.asyncio(loop_scope="module")
@table(FORBIDDEN)
async def test_without_permission_a_command_exits_with_5(case, denied):
    code, out, err, exception = denied[case]
    assert exception == "None" or "SystemExit" in exception, (case.words, exception)
    judge(case, code, out, err)
