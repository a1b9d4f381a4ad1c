"""Relays that ignore lost files, for the harness to notice: `relay`, broken on purpose.

The first argument selects the fault: `blind` never checks its files, `trusting` trusts its log.
"""

import sys

from relay.cli import main
from relay.store.sqlite import store as sqlite
from relay.store.sqlite.files import Files

HOW = sys.argv.pop(1)

if HOW == "blind":
    Files.moved = Files.overwritten = lambda _self: None  # type: ignore[method-assign]
else:
    sqlite.check_before_open = lambda _database, _wall: []
    sqlite.check_after_open = lambda *_found: None

if __name__ == "__main__":
    main()
