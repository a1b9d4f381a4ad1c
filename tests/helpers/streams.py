"""A reader of server-sent events, over the unix socket or the admin listener."""

import asyncio
import json
from contextlib import asynccontextmanager

from aiohttp import ClientSession, ClientTimeout, UnixConnector


class Reader:
    """One stream that is being followed."""

    def __init__(self, response) -> None:
        self.response = response
        self.comments = []
        self.ids = []

    async def next(self, seconds=10.0):
        """Return the next event's name and data; None at the end."""
        name = data = None
        async with asyncio.timeout(seconds):
            async for raw in self.response.content:
                field, _, value = raw.decode().rstrip("\n").partition(": ")
                match field:
                    case "event":
                        name = value
                    case "data":
                        data = json.loads(value)
                    case "id":
                        self.ids.append(value)
                    case "" if value:
                        self.comments.append(value)
                    case "" if name:
                        return name, data
        return None

    async def rest(self, seconds=10.0):
        """Return all that comes until the end."""
        found = []
        while (item := await self.next(seconds)) is not None:
            found.append(item)
        return found


@asynccontextmanager
async def following(socket, path):
    """Follow a stream of the relay behind a unix socket; its head and first comment have come."""
    session = ClientSession(connector=UnixConnector(str(socket)), timeout=ClientTimeout(total=None))
    async with session, session.get(f"http://relay{path}") as response:
        assert response.status == 200, await response.text()
        reader = Reader(response)
        reader.comments.append((await response.content.readline()).decode().strip())
        yield reader
