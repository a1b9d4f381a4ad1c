"""Server-sent events, as commands read them: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

import http.client
import json
from collections.abc import Iterator
from typing import Any, Self

STREAM = "text/event-stream"


class Stream:
    """What happens at the relay, one thing after the other, until it ends the stream or cannot be heard.

    The relay says something every 15 s: a connection that is silent for longer than any answer may take
    is a lost one.
    """

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()
        self._connection.close()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield each event's name and what it says."""
        name, data = "", ""
        while line := self._line():
            field, _, value = line.rstrip("\n").partition(": ")
            match field:
                case "event":
                    name = value
                case "data":
                    data = value
                case "" if name:
                    yield name, json.loads(data)
                    name, data = "", ""

    def _line(self) -> str:
        """Return the next line with its end; `""`: there is none."""
        try:
            line = self._response.readline()
        except (OSError, http.client.HTTPException):
            return ""
        return line.decode() if line.endswith(b"\n") else ""
