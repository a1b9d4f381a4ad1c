"""Periodic backups: made when due, and no more than the configured number."""

import logging

import pytest
from machines import small_disk
from stores import change_rows, only_sqlite, opened, send

from relay.config.schema import BackupConfig, Config, Storage
from relay.errors import StorageError
from relay.jobs.backups import Backups, examine, made_in
from relay.jobs.scheduler import Jobs
from relay.metrics import Metrics
from relay.store.sqlite import backup

pytestmark = only_sqlite("backups of its file")
DAY = 86_400.0


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


def set_rules(backups, folder, floor=0, **rules):
    backups.config = Config(
        path=folder / "config.toml",
        state_dir=folder,
        backup=BackupConfig(**rules),
        storage=Storage(min_free_disk=floor),
    )


def made(folder):
    return sorted(path.name for path in (folder / "backups").iterdir())


async def test_the_first_backup_is_made_at_once_and_the_next_when_due(
    backups, store, clock, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "relay.backups")
    await send(store, clock)
    for seconds in (0, 60, DAY - 61, 1):
        clock.advance(seconds)
        await backups.run()
    assert made(tmp_path) == ["relay-20231114T221320Z.db", "relay-20231115T221320Z.db"]
    assert [message.partition(" in ")[0] for message in caplog.messages] == ["backed up 1 events"] * 2


async def test_a_restart_does_not_restart_the_backup_interval(backups, store, clock, tmp_path):
    await backups.run()
    clock.advance(DAY / 2)
    await Backups(store, clock, lambda: backups.config).run()
    assert len(made(tmp_path)) == 1


async def test_a_new_backup_deletes_the_oldest_and_no_other_file(backups, clock, tmp_path):
    for _ in range(4):
        await backups.run()
        (tmp_path / "backups" / "relay-of-mine.db").touch()
        clock.advance(DAY)
    names = ["relay-20231116T221320Z.db", "relay-20231117T221320Z.db", "relay-of-mine.db"]
    assert made(tmp_path) == names


async def test_a_failed_backup_deletes_no_older_one(backups, store, clock, tmp_path, caplog):
    await send(store, clock)
    for _ in range(2):
        await backups.run()
        clock.advance(DAY)
    before = made(tmp_path)
    assert backups.examine().ok
    await change_rows(store, "UPDATE ledger SET created = created + 1")
    metrics = Metrics()
    jobs = Jobs(clock, metrics)
    jobs.add("backup", 60.0, backups.run)
    done = await jobs.run("backup")
    await change_rows(store, "UPDATE ledger SET created = created - 1")
    assert made(tmp_path) == before
    assert (done.failures, done.succeeded_at) == (1, None)
    assert done.error.startswith("backup failed: the ledger of the copy does not balance: crm, erp")
    [record] = caplog.records
    assert record.getMessage() == f"job backup failed: {done.error}"
    assert (record.levelname, record.exc_info) == ("ERROR", None)
    labels = {"job_name": "backup", "outcome": "failed"}
    assert metrics.registry.get_sample_value("relay_job_runs_total", labels) == 1
    check = backups.examine()
    assert not check.ok
    assert "the ledger of the copy does not balance" in check.detail
    assert check.hint.endswith("relay jobs run backup")
    await backups.run()
    assert backups.examine().ok


async def test_a_backup_from_the_future_does_not_delay_the_next(backups, clock, tmp_path):
    clock.advance(1000 * DAY)
    await backups.run()
    clock.advance(-1000 * DAY)
    await backups.run()
    assert len(made(tmp_path)) == 2


async def test_no_backup_is_made_unless_configured_and_a_reload_can_configure_it(backups, tmp_path):
    set_rules(backups, tmp_path)
    await backups.run()
    assert not (tmp_path / "backups").exists()
    set_rules(backups, tmp_path, every=60.0)
    await backups.run()
    assert len(made(tmp_path)) == 1
    assert (tmp_path / "backups").stat().st_mode & 0o777 == 0o700


async def test_backups_from_the_future_are_deleted_first(backups, clock, tmp_path):
    for days in (1000, 1001):
        clock.advance(days * DAY)
        await backups.run()
        clock.advance(-days * DAY)
    future = made(tmp_path)
    await backups.run()
    first = "relay-20231114T221320Z.db"
    assert made(tmp_path) == [first, future[1]]
    clock.advance(DAY)
    await backups.run()
    assert made(tmp_path) == [first, "relay-20231115T221320Z.db"]


@pytest.mark.parametrize(
    ("ages", "ok"), [((), False), ((0.5,), True), ((1.05, 7), True), ((1.2,), False), ((-30,), False)]
)
def test_doctor_reports_an_overdue_backup(tmp_path, ages, ok):
    now = 1_700_000_000
    found = {tmp_path / f"{age}": now - age * DAY for age in ages}
    check = examine(found, DAY, now)
    assert check.ok is ok
    assert ok or check.hint
    assert examine(found, None, now).ok


@pytest.fixture
async def cramped(tmp_path, clock):
    """A database of some 1.2 MB, and its backups, on a disk of 8 MiB."""
    with small_disk(tmp_path / "small", 8 * 2**20) as disk:
        async with opened(disk.path / "relay.db", clock) as store:
            for number in range(12):
                await send(store, clock, body=b"%d" % number + b"x" * 100_000)
            await store.upkeep.compact()
            disk.backups = Backups(store, clock, lambda: disk.backups.config)
            set_rules(disk.backups, disk.path, every=DAY, keep=10)
            yield disk


async def test_the_oldest_backup_is_deleted_to_keep_the_floor_free(cramped, clock, caplog):
    set_rules(cramped.backups, cramped.path, floor=2**19, every=DAY, keep=10)
    for _ in range(8):
        await cramped.backups.run()
        assert cramped.free >= 2**20  # twice the floor: there is room for senders
        clock.advance(DAY)
    names = made(cramped.path)
    assert 2 <= len(names) < 8
    assert names[-1] == "relay-20231121T221320Z.db"
    assert "relay-20231114T221320Z.db was deleted to make room for a new backup" in caplog.messages


async def test_the_latest_backup_is_never_deleted_to_make_room(cramped, clock):
    for _ in range(2):
        await cramped.backups.run()
        clock.advance(DAY)
    before = made(cramped.path)
    set_rules(cramped.backups, cramped.path, floor=100 * 2**20, every=DAY, keep=10)
    with pytest.raises(
        StorageError, match=r"backup failed: .* free, a copy may need .* must stay free"
    ) as caught:
        await cramped.backups.run()
    assert "MiB more" in caught.value.hint
    assert made(cramped.path) == before


async def test_a_backup_stops_when_the_free_space_reaches_the_floor(cramped, monkeypatch):
    monkeypatch.setattr(backup, "CHECK_EVERY", 1)
    for module in ("backup", "upkeep"):  # there was room when it began
        monkeypatch.setattr(f"relay.store.sqlite.{module}.lacks", lambda *_, **__: 0)
    set_rules(cramped.backups, cramped.path, floor=(cramped.free - 2**19) // 2, every=DAY, keep=10)
    with pytest.raises(StorageError, match="must stay free"):
        await cramped.backups.run()
    assert made(cramped.path) == []


async def test_a_backup_on_another_disk_may_fill_it(cramped, tmp_path, clock):
    with small_disk(tmp_path / "other", 2 * 2**20) as other:
        made = await cramped.backups._store.upkeep.backup(other.path / "copy.db", keep_free=100 * 2**20)
        assert made.events == 12


async def test_the_estimated_size_of_a_copy_includes_the_log(cramped, clock):
    store = cramped.backups._store
    await send(store, clock, body=b"x" * 900_000)
    free = cramped.free
    assert await store.upkeep.missing_space(cramped.path, keep_free=free - 2_000_000) > 0
    assert made_in(cramped.path) == {}


async def test_the_summary_and_the_metrics_follow_each_backup_and_the_folder(store, clock, tmp_path):
    metrics = Metrics()

    def shown():
        value = metrics.registry.get_sample_value
        names = ("last_success_timestamp_seconds", "size_bytes", "interval_seconds")
        return tuple(value(f"relay_backup_{name}") for name in names)

    def restarted():
        job = Backups(store, clock, lambda: job.config, metrics)
        set_rules(job, tmp_path, every=DAY, keep=2)
        job.look()
        return job

    backups = restarted()
    assert (shown(), backups.summary.kept, backups.overdue) == ((0, 0, 0), 0, False)
    await backups.run()
    [first] = (tmp_path / "backups").iterdir()
    known = (clock.wall() / 1_000_000, first.stat().st_size, DAY)
    assert (shown(), backups.summary.kept, backups.overdue) == (known, 1, False)
    clock.advance(DAY + 8000)
    assert not backups.overdue
    clock.advance(1000)
    assert backups.overdue
    backups = restarted()
    assert (shown(), backups.overdue) == (known, False)  # the job will make a backup within a minute
    first.with_name("relay-20240101T000000Z.db").write_bytes(b"by `relay db backup FILE`")
    first.with_name("relay-29990101T000000Z.db").touch()  # while the clock was wrong
    clock.advance(100 * DAY)
    set_rules(backups, tmp_path)
    await backups.run()
    assert shown() == (1_704_067_200, 25, 0)
    assert not backups.overdue
    set_rules(backups, tmp_path, every=DAY)
    assert not backups.overdue
    check = backups.examine()
    assert (check.ok, check.detail) == (True, "the first check of the backups is due within a minute")
    set_rules(backups, tmp_path)
    await backups.make()  # by an operator, while the job is off
    assert shown()[0] == clock.wall() / 1_000_000
