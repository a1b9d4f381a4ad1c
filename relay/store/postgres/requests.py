"""Requests to other nodes, through a table: any node's API answers for the whole cluster.

A request is for the owner of a lane, the leader of a job (`job:NAME`) or a certain node (`node:INCARNATION`).
Only the owner of a lane knows what is in flight, so only it ends deliveries and changes the state of a
destination.
"""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import msgspec

from relay.base.json_text import encode
from relay.base.shards import destination_of
from relay.errors import RelayError, StorageUnavailableError, UnknownError
from relay.process.logs import in_one_line

log = logging.getLogger("relay.store")

PATIENCE = 10.0
"""Seconds within which the owner must answer; a lane without an owner gets one when its lease has ended."""

POLL_EVERY = 0.05  # seconds between polls for the answer
KEPT = 60.0  # seconds after which any request is deleted

NODE = "node:"
"""Before the incarnation of a node, if a request is for that node."""

ASK_SQL = """
    INSERT INTO requests (id, destination, verb, argument)
    SELECT id, destination, $3, $4 FROM unnest($1::uuid[], $2::text[]) AS r (id, destination)
"""

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

LOOK_SQL = """
    SELECT id::text, answer, error FROM requests WHERE id = ANY($1::uuid[]) AND answered IS NOT NULL
"""

WITHDRAW_SQL = """
    DELETE FROM requests WHERE id = ANY($1::uuid[]) RETURNING id::text, taken IS NOT NULL AS is_taken
"""

CLEAN_SQL = "DELETE FROM requests WHERE asked < clock_timestamp() - $1::float8 * interval '1 second'"

Fetch = Callable[..., Awaitable[Sequence[Any]]]
Handle = Callable[[str, Any], Awaitable[Any]]
"""Executes one verb; called with the name that the request is for, and the argument."""
Answer = Callable[[str, str, Any], Awaitable[Any]]
"""Executes any verb; called with the name that the request is for, the verb and the argument."""


UNSUPPORTED = "this node does not support"
"""The beginning of a node's error about a verb that its version does not know."""


async def _refuse(_destination: str, verb: str, _argument: Any) -> Any:
    raise UnknownError(f'{UNSUPPORTED} "{verb}"', hint="upgrade hookferry on this node")


class Outcome(msgspec.Struct, frozen=True):
    """What became of one request."""

    answer: Any = None
    error: str | None = None  # of the node that executed it
    is_answered: bool = True
    is_taken: bool = True  # a node may have executed it

    @property
    def is_unsupported(self) -> bool:
        """Whether the node's version does not know the verb."""
        return self.error is not None and self.error.startswith(UNSUPPORTED)


class Requests:
    """Asks other nodes, and answers requests for the lanes and jobs of this node, and for itself."""

    def __init__(self, fetch: Fetch, announce: Callable[[], None]) -> None:
        """Take `fetch`, which runs a statement, and `announce`, which wakes the other nodes."""
        self.handlers: dict[str, Handle] = {}  # by verb: called with the destination and the argument
        self._fetch = fetch
        self._announce = announce
        self._answering: set[asyncio.Task[None]] = set()

    async def ask(self, to: str, verb: str, argument: Any, patience: float = PATIENCE) -> Any:
        """Let another node execute a request, and return its answer.

        Raises:
            StorageUnavailableError: no node has answered in time.
            RelayError: the node refused.
        """
        [outcome] = await self.ask_all([to], verb, argument, patience)
        if outcome.is_answered:
            if outcome.error is not None:
                raise RelayError(outcome.error)
            return outcome.answer
        what = "may still be executed" if outcome.is_taken else "was not executed"
        who, hint = (
            f"{to}: the node that delivers to it",
            f"; check the destination: relay destinations show {destination_of(to)}",
        )
        if ":" in to:
            kind, _, name = to.partition(":")
            who, hint = (f"job {name}: its node" if kind == "job" else "another node"), ""
        raise StorageUnavailableError(
            f'{who} did not answer; "{verb}" {what}', hint=f"list the nodes: relay nodes{hint}"
        )

    async def ask_all(self, to: Sequence[str], verb: str, argument: Any, patience: float) -> list[Outcome]:
        """Let several nodes execute a request; returns the outcomes in the same order."""
        ids = [str(uuid.uuid4()) for _ in to]
        await self._fetch(ASK_SQL, ids, list(to), verb, msgspec.json.encode(argument))
        self._announce()
        found: dict[str, Outcome] = {}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        try:
            while len(found) < len(ids) and loop.time() < deadline:
                await asyncio.sleep(POLL_EVERY)
                for row in await self._fetch(LOOK_SQL, [id_ for id_ in ids if id_ not in found]):
                    answer = None if row["error"] is not None else msgspec.json.decode(row["answer"])
                    found[row["id"]] = Outcome(answer, row["error"])
        finally:
            taken = {row["id"] for row in await self._fetch(WITHDRAW_SQL, ids) if row["is_taken"]}
        return [found.get(id_) or Outcome(is_answered=False, is_taken=id_ in taken) for id_ in ids]

    async def answer(self, names: Collection[str], other: Answer = _refuse) -> None:
        """Start to answer the requests for these names, which are this node's; call it after a wake-up.

        `other` answers those for lanes whose verb has no handler.
        """
        if not names:
            return
        for row in await self._fetch(TAKE_SQL, sorted(names)):
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
            _, left = await asyncio.wait(self._answering, timeout=PATIENCE)
            for task in left:
                task.cancel()

    async def _answer(self, id_: str, destination: str, verb: str, argument: bytes, other: Answer) -> None:
        answer, error = b"null", None
        try:
            given = msgspec.json.decode(argument)
            if (handle := self.handlers.get(verb)) is not None:
                result = await handle(destination, given)
            else:
                execute = _refuse if ":" in destination else other  # a job or a node, or else a lane
                result = await execute(destination, verb, given)
            answer = encode(result)
        except RelayError as refusal:
            error = in_one_line(refusal)
        except Exception as failure:
            log.exception('%s: cannot execute the request "%s" of another node', destination, verb)
            error = f"{type(failure).__name__}: {failure}"
        try:
            await self._fetch(ANSWER_SQL, id_, answer, error)
        except Exception as failure:  # noqa: BLE001 - the node that asks gives up
            log.warning("%s: cannot answer the request of another node: %s", destination, failure)
