"""A relay that answers before it commits: `relay`, broken on purpose, for the harness to notice."""

import asyncio

from relay.cli import main
from relay.model import Receipt
from relay.store import Acceptance
from relay.store.events import StoredEvents

LATE = 0.1  # seconds between the answer and the commit

_append = StoredEvents.append
_tasks: set[asyncio.Task[Receipt]] = set()


async def append(self: StoredEvents, acceptance: Acceptance) -> Receipt:
    """Acknowledge an event before its commit."""

    async def later() -> Receipt:
        await asyncio.sleep(LATE)
        return await _append(self, acceptance)

    task = asyncio.create_task(later())
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return Receipt(event_id=acceptance.event.public_id if acceptance.event else "")


StoredEvents.append = append  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
