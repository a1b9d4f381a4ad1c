"""One daemon at a time uses a database: a lease in the table `leases`, renewed every few seconds.

The lease is a row, not a lock of a session: a pooler gives each transaction another session, and a silent
network would keep a dead session's lock. A daemon that starts again with the same state folder takes its own
lease over at once, because it has locked the folder, so the former process has ended.
"""

import os
import socket
import uuid
from pathlib import Path

import msgspec

from relay.errors import StorageError
from relay.store.postgres.connection import Connection

LEASE = 30.0
"""Seconds after which another daemon may take the database over."""

RENEW_EVERY = 5.0
"""Seconds between two renewals."""

NAME = "daemon"

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of Linux

TAKE_SQL = """
    UPDATE leases
       SET epoch = CASE WHEN incarnation = $2 THEN epoch ELSE epoch + 1 END, incarnation = $2,
           until = clock_timestamp() + $3 * interval '1 second', standing = $4
     WHERE name = $1
       AND (until <= clock_timestamp() OR incarnation = $2 OR standing ->> 'owner' = nullif($5, ''))
    RETURNING epoch
"""
RENEW_SQL = """
    UPDATE leases SET until = clock_timestamp() + $3 * interval '1 second'
     WHERE name = $1 AND incarnation = $2 RETURNING epoch
"""
SHARED_SQL = """
    SELECT name FROM nodes
     WHERE seen > clock_timestamp() - interval '30 seconds' AND place IS DISTINCT FROM nullif($1, '') LIMIT 1
"""
GIVE_SQL = "UPDATE leases SET until = clock_timestamp() WHERE name = $1 AND incarnation = $2"
ALONE_SQL = """
    SELECT 1 FROM leases
     WHERE name = $1 AND until > clock_timestamp() AND standing ->> 'owner' IS DISTINCT FROM nullif($2, '')
"""
HOLDER_SQL = """
    SELECT standing ->> 'host', standing ->> 'folder',
           ceil(extract(epoch FROM until - clock_timestamp()))::int
      FROM leases WHERE name = $1
"""


class Owner:
    """The lease by which only this process uses the database."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._incarnation = uuid.uuid4()

    async def take(self, connection: Connection) -> None:
        """Take the lease, or keep it.

        Raises:
            StorageError: another daemon has it.
        """
        owner, host = place_of(self._folder), socket.gethostname()
        if name := await connection.value(SHARED_SQL, owner):
            raise StorageError(
                f"the nodes of a cluster use this database, among them {name}",
                hint="remove enabled = false from [cluster] to join them, or use another database",
            )
        await connection.execute("INSERT INTO leases (name) VALUES ($1) ON CONFLICT DO NOTHING", NAME)
        standing = {"owner": owner, "host": host, "folder": str(self._folder), "pid": os.getpid()}
        shown = msgspec.json.encode(standing).decode()
        if await connection.fetch(TAKE_SQL, NAME, self._incarnation, LEASE, shown, owner):
            return
        raise await _taken(connection)

    async def renew(self, connection: Connection) -> bool:
        """Extend the lease; False: another daemon has taken it."""
        return bool(await connection.fetch(RENEW_SQL, NAME, self._incarnation, LEASE))

    async def give(self, connection: Connection) -> None:
        """Let another daemon take the lease at once."""
        await connection.execute(GIVE_SQL, NAME, self._incarnation)


async def refuse_single(connection: Connection, folder: Path) -> None:
    """Check that no other daemon uses the database alone, before this one shares it.

    Raises:
        StorageError: a daemon uses it alone.
    """
    if await connection.fetch(ALONE_SQL, NAME, place_of(folder)):
        raise await _taken(connection)


async def _taken(connection: Connection) -> StorageError:
    [(host, folder, seconds)] = await connection.fetch(HOLDER_SQL, NAME)
    return StorageError(
        f"another daemon uses this database: on {host}, with the state folder {folder}",
        hint="stop it, or remove enabled = false from [cluster] of both, so that they work together, or use "
        f"another database; after a crash, start again in {seconds} s",
    )


def place_of(folder: Path) -> str:
    """Return an id of the state folder that this process has locked; "" if the system has no boot id.

    While a process has the folder open, no other folder gets the same numbers. So if an
    earlier process had the same id, that process has ended. A copy of the folder or of the machine has
    another id.
    """
    try:
        boot, status = BOOT_ID.read_text().strip(), folder.stat()
    except OSError:
        return ""
    return f"{boot} {status.st_dev} {status.st_ino}"
