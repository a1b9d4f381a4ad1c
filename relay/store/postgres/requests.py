"""Requests of operators to the node that owns a lane, through a table: any node's API answers for all lanes.

Only the owner knows what is in flight, so only it ends a lane's deliveries and changes a destination's state.
"""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import msgspec

from relay.errors import RelayError, StorageUnavailableError, UnknownError
from relay.process.logs import in_one_line

log = logging.getLogger("relay.store")

PATIENCE = 10.0
"""Seconds within which the owner must answer; a lane without an owner gets one when its lease has ended."""

POLL_EVERY = 0.05  # seconds between polls for the answer
KEPT = 60.0  # seconds after which any request is deleted

ASK_SQL = "INSERT INTO requests (id, destination, verb, argument) VALUES ($1::uuid, $2, $3, $4)"

TAKE_SQL = """
    WITH due AS MATERIALIZED (
        SELECT id FROM requests WHERE destination = ANY($1::text[]) AND taken IS NULL
         ORDER BY asked FOR UPDATE SKIP LOCKED
    )
    UPDATE requests AS r SET taken = clock_timestamp() FROM due WHERE r.id = due.id
    RETURNING r.id::text, r.destination, r.verb, r.argument
"""

ANSWER_SQL = """
    UPDATE requests SET answered = clock_timestamp(), answer = $2, error = $3 WHERE id = $1::uuid
"""

LOOK_SQL = "SELECT answer, error FROM requests WHERE id = $1::uuid AND answered IS NOT NULL"

WITHDRAW_SQL = "DELETE FROM requests WHERE id = $1::uuid RETURNING taken IS NOT NULL AS is_taken"

CLEAN_SQL = "DELETE FROM requests WHERE asked < clock_timestamp() - $1::float8 * interval '1 second'"

Fetch = Callable[..., Awaitable[Sequence[Any]]]
Handle = Callable[[str, Any], Awaitable[Any]]
Answer = Callable[[str, str, Any], Awaitable[Any]]
"""Executes a verb; called with the destination, the verb and the argument."""


async def _refuse(_destination: str, verb: str, _argument: Any) -> None:
    raise UnknownError(f'this node does not support "{verb}"', hint="upgrade hookferry on this node")


class Requests:
    """Asks the owners of other lanes, and answers requests for the lanes of this node."""

    def __init__(self, fetch: Fetch, announce: Callable[[], None]) -> None:
        """Take `fetch`, which runs a statement, and `announce`, which wakes the other nodes."""
        self.handlers: dict[str, Handle] = {}  # by verb: called with the destination and the argument
        self._fetch = fetch
        self._announce = announce
        self._answering: set[asyncio.Task[None]] = set()

    async def ask(self, destination: str, verb: str, argument: Any) -> Any:
        """Let the owner of a lane execute an operator's request, and return its answer.

        Raises:
            StorageUnavailableError: no node has answered in time.
            RelayError: the owner refused.
        """
        id_ = str(uuid.uuid4())
        await self._fetch(ASK_SQL, id_, destination, verb, msgspec.json.encode(argument))
        self._announce()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE
        while loop.time() < deadline:
            if rows := await self._fetch(LOOK_SQL, id_):
                await self._fetch(WITHDRAW_SQL, id_)
                [row] = rows
                if row["error"] is not None:
                    raise RelayError(row["error"])
                return msgspec.json.decode(row["answer"])
            await asyncio.sleep(POLL_EVERY)
        rows = await self._fetch(WITHDRAW_SQL, id_)
        what = "may still be executed" if rows and rows[0]["is_taken"] else "was not executed"
        raise StorageUnavailableError(
            f'{destination}: the node that delivers to it did not answer; "{verb}" {what}',
            hint=f"list the nodes: relay nodes; check the destination: relay destinations show {destination}",
        )

    async def answer(self, lanes: Collection[str], other: Answer = _refuse) -> None:
        """Start to answer the requests for lanes that this node owns; call it after a wake-up.

        `other` answers those whose verb has no handler.
        """
        if not lanes:
            return
        for row in await self._fetch(TAKE_SQL, sorted(lanes)):
            task = asyncio.create_task(
                self._answer(row["id"], row["destination"], row["verb"], row["argument"], other)
            )
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def clean(self) -> None:
        """Delete requests of nodes that no longer exist."""
        await self._fetch(CLEAN_SQL, KEPT)

    async def stop(self) -> None:
        """Wait for the answers that this node has begun."""
        if self._answering:
            await asyncio.wait(self._answering, timeout=PATIENCE)

    async def _answer(self, id_: str, destination: str, verb: str, argument: bytes, other: Answer) -> None:
        answer, error = b"null", None
        try:
            given = msgspec.json.decode(argument)
            if (handle := self.handlers.get(verb)) is not None:
                result = await handle(destination, given)
            else:
                result = await other(destination, verb, given)
            answer = msgspec.json.encode(result)
        except RelayError as refusal:
            error = in_one_line(refusal)
        except Exception as failure:
            log.exception('%s: cannot execute the request "%s" of another node', destination, verb)
            error = f"{type(failure).__name__}: {failure}"
        try:
            await self._fetch(ANSWER_SQL, id_, answer, error)
        except Exception as failure:  # noqa: BLE001 - the node that asks gives up
            log.warning("%s: cannot answer the request of another node: %s", destination, failure)
