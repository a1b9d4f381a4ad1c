"""Reading a request's body: with a limit, a deadline and a budget over all requests in flight."""

from relay.errors import BodyTimeout, Malformed, Overloaded, TooLarge, UnsupportedEncoding
from relay.ingest.deadline import in_time
from relay.ingest.request import Request


class Budget:
    """Bytes of bodies being read or waiting for their commit, over all connections."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, size: int) -> None:
        """Reserve bytes.

        Raises:
            Overloaded: there are not that many left.
        """
        if self.used + size > self.limit:
            raise Overloaded
        self.used += size

    def give(self, size: int) -> None:
        """Return reserved bytes."""
        self.used -= size


async def read_body(request: Request, limit: int, seconds: float, budget: Budget) -> bytes:
    """Read the body; the caller gives `len(body)` back to the budget once it is done with it.

    Raises:
        UnsupportedEncoding: it is compressed; inflating hostile bodies froze peers for seconds.
        TooLarge: by its Content-Length, or while it arrives.
        BodyTimeout: it did not arrive within `seconds`.
        Malformed: it was cut short or badly framed.
        Overloaded: the budget is used up.
    """
    encoding = request.headers.get("Content-Encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedEncoding
    content = request.content
    if content.is_eof() and content.exception() is None:
        body = content.read_nowait()
        if len(body) > limit or (not body and request.content_length > limit):  # the parser skips 2**64 - 1
            raise TooLarge
        budget.take(len(body))
        return body
    if request.content_length > limit:
        raise TooLarge
    if request.is_1_1 and request.headers.get("Expect", "").lower() == "100-continue":
        request.ask_for_body()
    return await _read_slowly(request, limit, seconds, budget)


async def _read_slowly(request: Request, limit: int, seconds: float, budget: Budget) -> bytes:
    content = request.content
    chunks: list[bytes] = []
    size = 0

    async def read() -> None:
        nonlocal size
        while chunk := await content.readany():
            if size + len(chunk) > limit:
                raise TooLarge
            budget.take(len(chunk))
            size += len(chunk)
            chunks.append(chunk)

    try:
        await in_time(seconds, read, lambda: request.has_unread)
    except TimeoutError:
        budget.give(size)
        raise BodyTimeout from None
    except (TooLarge, Overloaded):
        budget.give(size)
        raise
    except Exception as error:
        budget.give(size)
        error.__traceback__ = None  # the content keeps the error: a cycle by way of this frame and its chunks
        raise Malformed("The body was cut short") from error
    return b"".join(chunks)
