"""A state directory has one daemon, whatever happens to its lock file."""

import os

import pytest
from click.testing import CliRunner
from daemons import SERVE, SOURCES, Daemon, write_config
from machines import small_disk
from stores import KINDS

from relay.cli import main
from relay.errors import RelayError
from relay.process.sockets import UNIX_PATH_LIMIT
from relay.process.state_dir import StateDir


@pytest.fixture
def held(tmp_path):
    """The state directory of a daemon that runs."""
    state = StateDir(tmp_path / "state")
    state.take()
    yield state
    state.release()


def _removed(lock):
    lock.unlink()


def _replaced(lock):
    lock.unlink()
    lock.write_text("1\n")


def _moved(lock):
    lock.rename(lock.with_name("elsewhere"))


def _untouched(_lock):
    return


@pytest.mark.parametrize("happens", [_untouched, _removed, _replaced, _moved])
def test_a_second_daemon_is_refused_even_without_the_lock_file(held, happens):
    happens(held.path / "relay.lock")
    with pytest.raises(RelayError, match="is in use by another relay"):
        StateDir(held.path).take()
    held.release()
    again = StateDir(held.path)
    again.take()
    again.release()


def test_the_refusal_names_the_process_that_holds_the_lock(held):
    with pytest.raises(RelayError, match=rf"\(pid {os.getpid()}\)"):
        StateDir(held.path).take()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_lock_file_that_is_a_link_is_refused_and_its_target_unchanged(tmp_path, link):
    target = tmp_path / "precious"
    target.write_text("do not empty me")
    mode = target.stat().st_mode
    (tmp_path / "state").mkdir()
    link(target, tmp_path / "state" / "relay.lock")
    with pytest.raises(RelayError, match="is not a regular file") as caught:
        StateDir(tmp_path / "state").take()
    assert "ls -l" in caught.value.hint
    assert target.read_text() == "do not empty me"
    assert target.stat().st_mode == mode


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_lock_file_that_is_not_a_file_is_refused_with_a_message(tmp_path, make):
    (tmp_path / "state").mkdir()
    make(tmp_path / "state" / "relay.lock")
    with pytest.raises(RelayError, match="is not a regular file"):
        StateDir(tmp_path / "state").take()


def test_a_dangling_link_as_lock_file_creates_no_file(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "relay.lock").symlink_to(tmp_path / "new")
    with pytest.raises(RelayError, match="is not a regular file"):
        StateDir(tmp_path / "state").take()
    assert not (tmp_path / "new").exists()


def test_a_state_directory_may_be_a_link_and_stays_one(tmp_path, held):
    (tmp_path / "alias").symlink_to(held.path)
    with pytest.raises(RelayError, match="is in use by another relay"):
        StateDir(tmp_path / "alias").take()


async def test_a_second_process_is_refused_after_the_lock_file_was_deleted(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with Daemon(config) as daemon:
        (tmp_path / "state" / "relay.lock").unlink()
        second = Daemon(config, SERVE)
        await second.start()
        assert await second.exit() == 1
        assert "is in use by another relay" in second.output
        assert await daemon.stop() == 0


def _file(folder):
    (folder / "there").write_text("")
    return folder / "there", f"{folder / 'there'} is not a directory", f"move {folder / 'there'} away, or set"


def _below_a_file(folder):
    path, what, hint = _file(folder)
    return path / "state" / "deep", what, hint


def _dangling_link(folder):
    (folder / "link").symlink_to("nowhere")
    what = f"{folder / 'link'} is a link to nowhere, which does not exist"
    return folder / "link", what, f"create {folder / 'nowhere'}, or set"


def _long_name(folder):
    return folder / ("a" * 256), "File name too long", "set state_dir in config.toml to a shorter path"


def _long_path(folder):
    return (
        folder.joinpath(*["a" * 200] * 25),
        "File name too long",
        "set state_dir in config.toml to a shorter",
    )


@pytest.mark.parametrize("make", [_file, _below_a_file, _dangling_link, _long_name, _long_path])
def test_a_path_that_cannot_be_a_state_directory_is_explained_by_every_command(tmp_path, make):
    path, what, hint = make(tmp_path)
    with pytest.raises(RelayError) as caught:
        StateDir(path).take()
    assert caught.value.message == f"the state directory {path} cannot be used: {what}"
    assert caught.value.hint.startswith(hint)
    config = write_config(tmp_path, SOURCES)
    config.write_text(config.read_text().replace('state_dir = "state"', f'state_dir = "{path}"'))
    commands = ["check-config", "doctor --offline -c"]
    if KINDS[0] == "sqlite":  # otherwise, the data is on a server
        commands.append("events list --offline -c")
    for words in commands:
        result = CliRunner().invoke(main, [*words.split(), str(config)])
        assert (result.exit_code, what in result.output, hint in result.stderr) == (1, True, True), words


@pytest.mark.parametrize("below", ["", "state"])
def test_a_read_only_file_system_is_named(tmp_path, below):
    with small_disk(tmp_path / "disk", 2**20, options="ro"), pytest.raises(RelayError) as caught:
        StateDir(tmp_path / "disk" / below).take()
    path = tmp_path / "disk" / below
    assert caught.value.message == f"cannot write to the state directory {path}: Read-only file system"


async def test_a_daemon_reports_a_state_directory_that_it_cannot_use(tmp_path):
    config = write_config(tmp_path, SOURCES)
    (tmp_path / "state").write_text("")
    daemon = Daemon(config, SERVE)
    await daemon.start()
    assert await daemon.exit() == 1
    assert "state is not a directory" in daemon.output
    assert "unexpected" not in daemon.output


def test_check_config_reports_a_socket_whose_path_is_too_long(tmp_path):
    config = write_config(tmp_path, SOURCES)
    before = config.read_text()
    longest = UNIX_PATH_LIMIT - len(os.fsencode(tmp_path / "relay.sock")) - 1
    for length, code in ((longest, 0), (longest + 1, 1)):
        state = tmp_path / ("s" * length)
        config.write_text(before.replace('state_dir = "state"', f'state_dir = "{state}"'))
        result = CliRunner().invoke(main, ["check-config", str(config)])
        assert result.exit_code == code, result.output
    what = f"admin.socket: {state / 'relay.sock'} is too long for a unix socket: 108 bytes, at most 107"
    assert what in result.stderr
