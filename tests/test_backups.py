"""Backups in their time: one when it is due, and no more than are to be kept."""

import logging

import pytest
from stores import opened, send
from support import FakeClock

from relay.backups import Backups
from relay.config.model import BackupConfig, Config

DAY = 86_400.0


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
async def store(tmp_path, clock):
    async with opened(tmp_path / "relay.db", clock) as store:
        yield store


@pytest.fixture
def backups(store, clock, tmp_path):
    """A job whose rules the test may change."""
    backups = Backups(store, clock, lambda: backups.config)
    set_rules(backups, tmp_path, every=DAY, keep=2)
    return backups


def set_rules(backups, folder, **rules):
    backups.config = Config(path=folder / "config.toml", state_dir=folder, backup=BackupConfig(**rules))


def made(folder):
    return sorted(path.name for path in (folder / "backups").iterdir())


async def test_one_is_made_when_none_is_there_and_the_next_in_its_time(
    backups, store, clock, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "relay.backups")
    await send(store, clock)
    for seconds in (0, 60, DAY - 61, 1):
        clock.advance(seconds)
        await backups.run()
    assert made(tmp_path) == ["relay-20231114T221320Z.db", "relay-20231115T221320Z.db"]
    assert [message.partition(" in ")[0] for message in caplog.messages] == ["backed up 1 events"] * 2


async def test_a_restart_begins_no_new_count(backups, store, clock, tmp_path):
    await backups.run()
    clock.advance(DAY / 2)
    await Backups(store, clock, lambda: backups.config).run()
    assert len(made(tmp_path)) == 1


async def test_the_oldest_goes_when_a_new_one_is_there_and_nothing_else_does(backups, clock, tmp_path):
    for _ in range(4):
        await backups.run()
        (tmp_path / "backups" / "relay-of-mine.db").touch()
        clock.advance(DAY)
    names = ["relay-20231116T221320Z.db", "relay-20231117T221320Z.db", "relay-of-mine.db"]
    assert made(tmp_path) == names


async def test_none_goes_for_one_that_could_not_be_made(backups, store, clock, tmp_path, caplog):
    await send(store, clock)
    for _ in range(2):
        await backups.run()
        clock.advance(DAY)
    before = made(tmp_path)
    await store._connection.execute("UPDATE ledger SET created = created + 1")
    await backups.run()
    await store._connection.execute("UPDATE ledger SET created = created - 1")
    assert made(tmp_path) == before
    [said] = caplog.messages
    assert said.startswith("no backup: the copy does not balance: crm, erp")


async def test_a_backup_from_the_future_puts_none_off(backups, clock, tmp_path):
    clock.advance(1000 * DAY)
    await backups.run()
    clock.advance(-1000 * DAY)
    await backups.run()
    assert len(made(tmp_path)) == 2


async def test_none_is_made_unless_asked_for_and_a_reload_may_ask(backups, tmp_path):
    set_rules(backups, tmp_path)
    await backups.run()
    assert not (tmp_path / "backups").exists()
    set_rules(backups, tmp_path, every=60.0)
    await backups.run()
    assert len(made(tmp_path)) == 1
    assert (tmp_path / "backups").stat().st_mode & 0o777 == 0o700
