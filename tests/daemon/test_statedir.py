"""A state directory has one daemon, whatever happens to its lock file."""

import os

import pytest
from daemons import SERVE, SOURCES, Daemon, write_config

from relay.errors import RelayError
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
