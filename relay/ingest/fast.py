"""The fast listener: aiohttp's HTTP parser without its server.

Most connections carry one heartbeat: Node's agents close a connection after 5 s, and send the next heartbeat
after 30 s. For each connection, aiohttp's server makes two timers, two tasks and a dozen objects. They cost
the same CPU time as the relay's own work on the heartbeat. Here each connection has a parser and each request
has a record; a request gets a task only if it waits.

aiohttp exports its parser without documenting it: see `relay.ingest.implementation.TESTED`.
"""

from aiohttp.http import HttpRequestParser

from relay.ingest.connection import READ_AHEAD, Connection, Owner


class FastConnection(Connection):
    """A connection that drives the parser itself; the parser stops after each request."""

    __slots__ = ()

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self._parser = HttpRequestParser(
            self,  # type: ignore[arg-type] # the parser and its bodies use `connected` and the flow control
            self._loop,
            READ_AHEAD,
            auto_decompress=False,
            max_msg_queue_size=1,
        )
