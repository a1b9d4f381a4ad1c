"""A relay whose machine or version differs from others: `python odd_relay.py SECONDS VERSION serve …`.

SECONDS is how far the machine's clock is ahead. If VERSION is not "-", the program has that version, and a
schema that is one migration newer.
"""

import sys

import relay
from relay.base.clock import SECOND, SystemClock
from relay.cli import main
from relay.store.postgres import nodes, schema, store

NEWER = """
ALTER TABLE events ADD COLUMN newer text;
ALTER TABLE owed ADD COLUMN newer integer NOT NULL DEFAULT 0;
CREATE INDEX owed_newer ON owed (newer, id) WHERE newer > 0;
"""

if __name__ == "__main__":
    ahead, version = int(float(sys.argv.pop(1)) * SECOND), sys.argv.pop(1)
    wall, steady = SystemClock.wall, SystemClock.steady
    SystemClock.wall = lambda self: wall(self) + ahead  # type: ignore[method-assign]
    SystemClock.steady = lambda self: steady(self) + ahead  # type: ignore[method-assign]
    if version != "-":
        relay.__version__ = nodes.__version__ = version
        schema.MIGRATIONS = store.MIGRATIONS = (*schema.MIGRATIONS, NEWER)
    main()
