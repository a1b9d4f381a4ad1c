"""The primary server of a cluster is lost under load, and its standby is promoted.

Run `python -m tests.torture.failover --cycles 10`. With synchronous replication, no acknowledged event may be
lost. Without, exactly those may be lost that the standby did not have yet.
"""

import asyncio
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import click
from postgres import Server, start

from relay.base.clock import SystemClock
from relay.store.postgres import doctor
from relay.store.postgres.connection import connect, read_url
from relay.store.postgres.observing import observe
from torture.audit import COMMIT_TIMES, MARGIN, Toll, audit, pause
from torture.nodes import LEASE, Cluster, Setup

LOAD = 0.5  # seconds of load before and after the failover
LAG = 0.5  # seconds for which the standby gets nothing before the primary is lost

STANDBYS_SQL = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
CANCEL_SQL = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


async def failover(folder: Path, *, is_synchronous: bool) -> Toll:
    """Lose the primary, promote the standby, and count what that cost."""
    settings = ("synchronous_standby_names=*",) if is_synchronous else ()
    primary = start(folder / "primary", settings=(*settings, COMMIT_TIMES), keep=True)
    standby = await asyncio.to_thread(primary.make_standby, folder / "standby", (COMMIT_TIMES,))
    try:
        return await _fail_over(primary, standby, folder, is_synchronous=is_synchronous)
    finally:
        standby.crash()


async def _fail_over(primary: Server, standby: Server, folder: Path, *, is_synchronous: bool) -> Toll:
    toll, url = Toll(), f"postgresql://postgres@127.0.0.1:{primary.port},127.0.0.1:{standby.port}/postgres"
    async with asyncio.timeout(30):
        while primary.run(STANDBYS_SQL).strip() != "1":  # noqa: ASYNC110 - the server knows
            await asyncio.sleep(0.05)
    async with Cluster(url, folder, [Setup(), Setup()]) as cluster:
        await cluster.until_owned(range(2))
        await cluster.load(on=True)
        await asyncio.sleep(LOAD)  # load before; nothing is waited for
        toll.warned = await _warns(primary)
        sender = int(primary.run("SELECT pid FROM pg_stat_replication"))
        fault = cluster.begin("failover", 0, 1, out=False)
        os.kill(sender, signal.SIGSTOP)  # the standby gets nothing from now on
        await asyncio.sleep(LAG)
        if is_synchronous:  # commits wait for the standby; an administrator ends their waits
            primary.run(CANCEL_SQL)
            await asyncio.sleep(LAG)
        await asyncio.to_thread(primary.crash, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(sender, signal.SIGKILL)
        await asyncio.to_thread(standby.run, "SELECT pg_promote()")
        promoted = time.time()
        await cluster.until_owned(range(2))
        await asyncio.sleep(LOAD + MARGIN)
        cluster.end(fault)
        pause(cluster, toll, fault, LEASE + MARGIN, since=promoted, until=time.time())
        await cluster.load(on=False)
        await cluster.drained()
        await audit(cluster, toll, failover=None if is_synchronous else fault.began)
    return toll


async def _warns(primary: Server) -> bool:
    """Return whether `/ready` and `relay doctor` warn that a failover may lose events."""
    connection, now = await connect(read_url(primary.url("postgres")), writes=False), SystemClock().wall()
    try:
        observed = await observe(connection, now)
        check = await doctor.replication(doctor.Examined(location="", now=now), connection)
    finally:
        await connection.close()
    is_shown = any("asynchronous" in caution.what for caution in observed.cautions)
    return is_shown and not check.ok


def run(*, is_synchronous: bool) -> Toll:
    """Run one failover with servers in a new folder."""
    with tempfile.TemporaryDirectory(prefix="relay-failover-") as folder:
        Path(folder).chmod(0o711)  # the servers run as another user
        return asyncio.run(failover(Path(folder), is_synchronous=is_synchronous))


@click.command()
@click.option("--cycles", default=10, show_default=True)
def main(cycles: int) -> None:
    """Promote standbys, with and without synchronous replication in turn, and count what that cost."""
    broken = False
    for number in range(cycles):
        toll = run(is_synchronous=number % 2 == 0)
        faults = toll.faults()
        broken = broken or bool(faults)
        click.echo("\n".join(["synchronous" if number % 2 == 0 else "asynchronous", str(toll), *faults]))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
