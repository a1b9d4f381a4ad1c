"""No command ends in a traceback: every command, in every condition that keeps it from working.

A process that has imported everything is forked for each condition, and runs every command in turn with new
streams, environment and signal handlers, so that 2,000 commands take seconds. An operator's mistakes have
messages; `unexpected error` is for unforeseen errors.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import LEAVES, arguments_of
from machines import NOBODY, ROOT, needs_other_users

from relay.cli import main
from relay.cli.main import Group

CODES = {0, 1, 2, 3, 4, 5, 6, 78, 130}
GOOD = 'state_dir = "state"\n[sources.adorn]\nplugin = "adorn"\n[destinations.crm]\nurl = "http://127.0.0.1:9/"\n'
SECRET = '[sources.moddy]\nplugin = "moddy"\ntokens = [{ env = "NOT_SET_ANYWHERE" }]\n'

FORKS = """
import gc, json, logging, os, signal, sys, tempfile, traceback
import relay.app, relay.cli.config, relay.cli.send, relay.diagnosis.source_request
import relay.demo.run, relay.api.views
import relay.store.sqlite.doctor, relay.store.opening
from relay.cli import main
from relay.config import paths
"a".encode("idna")  # a user who may not read this Python could not import it
import click
from pathlib import Path
def load(group):
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            load(command)
load(main)
null = os.open(os.devnull, os.O_RDWR)
environ, handlers = dict(os.environ), {each: signal.getsignal(each) for each in (1, 2, 13, 15)}
def run(words, job, files):
    signal.alarm(60)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environ | job["environ"])
    logging.root.handlers.clear()
    for file in files:
        file.seek(0)
        file.truncate()
    for number, source in enumerate((null, *(file.fileno() for file in files))):
        os.dup2(source, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = out = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = err = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    ours = (sys.stdin, out, err, None)
    if job["before"]:
        os.chdir(job["folder"])
        exec(job["before"])
    sys.argv = ["relay", *words]
    code = 99
    try:
        main(words, prog_name="relay")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        print("Exception ignored at the end:", error, file=sys.stderr)
    for number, stream in enumerate((out, err), 1):
        os.dup2(null, number)
        stream.flush()  # else a later command's file would get what a full disk refused
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream not in ours:
            stream.close()  # else it would close a later command's file
    return code
def child(job, files, ended):
    tempfile.tempdir = job["folder"]
    if job["places"]:
        paths.PLACES = tuple(map(Path, job["places"]))
    os.chdir(job["folder"])
    if job["uid"]:
        os.setgroups([])
        os.setgid(job["uid"])
        os.setuid(job["uid"])
    for words in job["commands"]:
        code = run(words, job, files)
        ended.write(json.dumps([code, *map(text, files)]) + "\\n")
        ended.flush()
def text(file):
    file.seek(0)
    return file.read().decode("utf-8", "replace")
def outcomes(job):
    # One process runs command after command. Only if a command ends it, another runs those that are left.
    found = []
    while job["commands"]:
        ended, *files = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile(), tempfile.TemporaryFile()
        pid = os.fork()
        if pid == 0:
            try:
                child(job, files, ended)
                os._exit(0)
            except BaseException:
                os.write(files[1].fileno(), traceback.format_exc().encode())
            finally:
                os._exit(99)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ended.seek(0)
        here = [json.loads(line) for line in ended]
        if len(here) < len(job["commands"]):
            here.append([status, *map(text, files)])
        found += here
        job["commands"] = job["commands"][len(here):]
    return found
gc.freeze()  # else each child would copy what its collector touches
answers = os.dup(1)
for line in sys.stdin:
    os.write(answers, (json.dumps(outcomes(json.loads(line))) + "\\n").encode())
"""


WORDS = {
    ("listen",): ["listen", "0", "--secret", "no-secret-of-ours"],
    ("verify",): ["verify", "--source", "adorn", "--request", "request.http"],
    ("plugins", "new"): ["plugins", "new", "parcels"],
    ("config", "init"): ["config", "init", "new.toml"],
    ("send",): ["send", "adorn", "--to", "http://127.0.0.1:9"],
}
"""Words of commands that need more than their required arguments."""


def commands_of(config, *, offline=False):
    """Return every command with its required arguments; config None: not named, so `serve` would search."""
    for path, command in LEAVES.items():
        options = {option for each in command.params for option in each.opts}
        demanded = (
            each.format(file="events.jsonl", new="new.toml", folder="made") for each in arguments_of(path)
        )
        words = WORDS.get(path) or [*path, *demanded]
        if (offline and "--offline" not in options) or (path == ("serve",) and config is None):
            continue
        named = ["-c", config] if config is not None and "--config" in options else []
        yield [*words, *(["--offline"] if offline else []), *named]


def path_of(words):
    """Return the command that words call."""
    return next(path for path in LEAVES if tuple(words[: len(path)]) == path)


@pytest.fixture(scope="module")
def forks():
    """The process that every command is forked from."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "COV_"))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": kept}
    with subprocess.Popen([sys.executable, "-c", FORKS], **pipes) as process:
        yield process


@pytest.fixture
def outcomes(forks, folder):
    """Run commands, by default in the test's folder; return each with its exit code and its output."""

    def run(commands, folder=folder, *, uid=0, before="", places=(), **environ):
        job = {
            "commands": commands, "folder": str(folder), "uid": uid if ROOT else 0, "before": before,
            "places": list(map(str, places)), "environ": environ,
        }  # fmt: skip
        forks.stdin.write(json.dumps(job) + "\n")
        forks.stdin.flush()
        return list(zip(commands, json.loads(forks.stdout.readline()), strict=True))

    return run


def judge(ended, *, caught=False, silent=False):
    """Check the outcome of a command; `caught`: an unexpected error is permitted."""
    for words, (code, out, err) in ended:
        shown = (words, code, out, err)
        assert code in CODES, shown
        assert "Traceback" not in out + err, shown
        assert "Exception ignored" not in err, shown
        assert code == 0 or err.strip() or out.strip() or silent, shown
        if "unexpected error" in err:
            assert caught, shown
            assert len(err.strip().splitlines()) == 1, shown


@pytest.fixture
def folder():
    """A folder that everybody may enter and write to; pytest's folders are private to its user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "events.jsonl").write_text("")
        (folder / "request.http").write_text("POST /v1/events HTTP/1.1\r\nHost: a\r\n\r\n{}")
        yield folder


def test_every_command_reports_a_missing_configuration_and_daemon_in_one_line(outcomes, folder):
    judge(outcomes(list(commands_of(None))))


CONFIGS = {
    "absent": None,
    "not TOML": b"[server\n",
    "wrong keys": b"[server]\nlisten_on = 1\n[sources.a]\nplugin = 3\n[destinations]\ncrm = 1\n",
    "binary": bytes(range(256)),
    "deep": b"a = " + b"[" * 5000,
    "secret missing": (GOOD + SECRET).encode(),
    "plugins that raise": GOOD.encode() + b'[plugins]\ndirs = ["bad"]\n',
    "state is a file": GOOD.encode().replace(b'"state"', b'"events.jsonl"'),
    "state has a long name": GOOD.encode().replace(b'"state"', b'"' + b"s" * 300 + b'"'),
    "socket has a long name": GOOD.encode() + b'[admin]\nsocket = "' + b"s" * 300 + b'"\n',
    "port that is not ours": GOOD.encode() + b'[server]\nlisten = "203.0.113.1:80"\n',
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_command_reports_an_invalid_configuration_in_one_line(outcomes, folder, kind):
    config = folder / "config.toml"
    if CONFIGS[kind] is not None:
        config.write_bytes(CONFIGS[kind])
    (folder / "bad").mkdir()
    (folder / "bad" / "thrower.py").write_text("raise SystemExit(7)\n")
    judge(outcomes(list(commands_of(str(config)))))
    judge(outcomes(list(commands_of(str(config), offline=True))))


def test_every_command_reports_a_folder_as_configuration_in_one_line(outcomes, folder):
    judge(outcomes(list(commands_of(str(folder)))))


def test_every_command_reports_a_missing_daemon_in_one_line(outcomes, folder):
    (folder / "config.toml").write_text(GOOD)
    ended = [one for one in commands_of("config.toml") if one[0] != "serve"]
    judge(outcomes(ended))


@pytest.mark.parametrize("content", [b"", b"no database" * 1000, b"SQLite format 3\0" + b"\0" * 5000])
def test_every_command_reports_an_invalid_database_in_one_line(outcomes, folder, content):
    (folder / "config.toml").write_text(GOOD)
    (folder / "state").mkdir(mode=0o777)
    (folder / "state" / "relay.db").write_bytes(content)
    commands = list(commands_of("config.toml", offline=True))
    commands += [["db", "check", "-c", "config.toml"], ["db", "backup", "copy.db", "-c", "config.toml"]]
    judge(outcomes(commands))


@needs_other_users
@pytest.mark.parametrize("shut", ["the file", "its folder", "what is around it"])
def test_missing_permissions_exit_with_5(outcomes, folder, shut):
    """As a user outside the group of /etc/relay, /run/relay and /var/lib/relay; named or found."""
    etc = folder / "etc" / "relay"
    (etc / "state").mkdir(parents=True)
    (etc / "config.toml").write_text(GOOD)
    (etc / "state" / "relay.db").write_text("")
    {"the file": etc / "config.toml", "its folder": etc, "what is around it": etc.parent}[shut].chmod(0o700)
    named = [each for each in commands_of(str(etc / "config.toml")) if "-c" in each]
    found = [each[:-2] for each in named]
    for commands, places in ((named, ()), (found, ["config.toml", etc / "config.toml"])):
        ended = outcomes(commands, uid=NOBODY, places=places)
        judge(ended)
        for words, (code, _, err) in ended:
            assert code == (78 if words[0] == "serve" else 5), (words, code, err)


@needs_other_users
@pytest.mark.parametrize("named", [True, False])
def test_commands_work_in_an_unreadable_current_folder(outcomes, folder, named):
    """As after `su` or `sudo -u relay` in /root."""
    (folder / "shut").mkdir(mode=0o700)
    config = folder / "config.toml"
    config.write_text(GOOD.replace('"state"', f'"{folder}/state"'))
    commands = [each for each in commands_of(str(config) if named else None) if each[0] != "serve"]
    ended = outcomes(commands, folder / "shut", uid=NOBODY, places=["config.toml", config])
    judge(ended)
    for words, (code, _, err) in ended:
        if "--socket" in {option for each in LEAVES[path_of(words)].params for option in each.opts}:
            is_away = code in (2, 5) and "events.jsonl" in err  # the file is in that folder
            assert (code, f"{folder}/state/relay.sock" in err) == (3, True) or is_away, (words, code, err)


@needs_other_users
def test_an_unreadable_plugin_folder_is_a_problem(outcomes, folder):
    (folder / "config.toml").write_text(f'{GOOD}[plugins]\ndirs = ["shut"]\n')
    (folder / "shut").mkdir(mode=0o700)
    commands = [[*command, "-c", "config.toml"] for command in (["check-config"], ["plugins", "list"])]
    for words, (code, _, err) in outcomes(commands, uid=NOBODY):
        assert (code, "/shut: cannot be read: Permission denied" in err) == (1, True), (words, code, err)


@pytest.mark.parametrize(
    ("where", "before"),
    [
        ("a full stdout", "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"),
        ("a closed stdout", "os.close(1); sys.stdout = None"),
        ("a closed stderr", "os.close(2); sys.stderr = None"),
        ("a closed stdin", "os.close(0); sys.stdin = None"),
        (
            "an ASCII terminal",
            "sys.stdout.reconfigure(encoding='ascii'); sys.stderr.reconfigure(encoding='ascii')",
        ),
        ("a folder that is gone", "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')"),
        (
            "no home, no terminal size",
            "os.environ.pop('HOME', 0); os.environ.update(COLUMNS='x', LINES='-1')",
        ),
        ("a closed pipe", "r, w = os.pipe(); os.close(r); os.dup2(w, 1)"),
    ],
    ids=lambda value: value if " " in value and "(" not in value else "",
)
def test_no_unusual_stream_or_environment_causes_a_traceback(outcomes, folder, where, before):
    (folder / "config.toml").write_text(GOOD)
    commands = [one for one in commands_of(str(folder / "config.toml")) if one[0] != "serve"]
    commands += [[*path, "--help"] for path in list(LEAVES)[::4]] + [
        ["--help"],
        ["--version"],
        ["no-such-command"],
    ]
    ended = outcomes(commands, before=before)
    judge(ended, caught="full" in where or "ASCII" in where, silent="closed" in where)


ANSWERS = {
    "nothing": b"",
    "no HTTP": b"hello\r\n\r\n",
    "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
    "no JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    "other JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}",
    "a list": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n[]",
    "an error": b'HTTP/1.1 500 No\r\nContent-Length: 11\r\n\r\n{"error":1}',
    "binary": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Type: text/event-stream\r\n\r\n\xff\xfe\r\n",
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_no_response_at_the_socket_causes_a_traceback(outcomes, folder, kind):
    door = folder / "relay.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(door))
        listener.listen(16)

        def answer():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(5)
                    try:
                        connection.recv(65536)
                        connection.sendall(ANSWERS[kind])
                    except OSError:
                        pass

        serving = threading.Thread(target=answer, daemon=True)
        serving.start()
        commands = [
            [*words, "--socket", str(door)]
            for words, path in (
                (words, path)
                for words in commands_of(None)
                for path in LEAVES
                if tuple(words[: len(path)]) == path
            )
            if any("--socket" in each.opts for each in LEAVES[path].params) and path[0] not in ("top", "tail")
        ]
        ended = outcomes(commands)
        listener.shutdown(socket.SHUT_RDWR)
    serving.join(5)
    judge(ended, caught=True)


# --- the net itself -------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch):
    """Let every command raise the exception that the test sets."""

    def breaking(error):
        def raises(*_):
            raise error

        monkeypatch.setattr(Group, "invoke", raises)

    return breaking


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyError("items"), 1),
        (PermissionError(13, "Permission denied", "/etc/relay/config.toml"), 5),
        (OSError(5, "Input/output error"), 1),
        (RecursionError(), 1),
        (UnicodeEncodeError("ascii", "é\ud83d", 0, 1, "no"), 1),
        (ValueError("two\nlines \x1b[2J"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_unexpected_error_is_one_line_with_the_file_of_its_details(
    broken, error, code, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    broken(error)
    result = CliRunner().invoke(main, ["status"])
    assert isinstance(result.exception, SystemExit)
    assert (result.exit_code, result.stdout) == (code, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"unexpected error: {type(error).__name__}")
    assert line.endswith(f"exit code {code}")
    [file] = re.findall(r"details: (\S+);", line)
    details = Path(file)
    assert details.stat().st_mode & 0o777 == 0o600
    text = details.read_text()
    assert "Traceback (most recent call last)" in text
    assert type(error).__name__ in text
    assert "hookferry" in text


def test_an_unexpected_error_is_one_line_even_without_a_file(broken, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    broken(KeyError("x"))
    result = CliRunner().invoke(main, ["status"])
    assert result.exit_code == 1
    assert result.stderr == (
        "unexpected error: KeyError: 'x'; details: not written, No such file or directory; exit code 1\n"
    )


def test_the_details_do_not_contain_the_arguments(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    broken(KeyError("x"))
    CliRunner().invoke(main, ["listen", "--secret", "whsec_typed"])
    [file] = tmp_path.iterdir()
    assert "whsec_typed" not in file.read_text()
