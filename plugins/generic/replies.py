"""Replies of a generic source, and the requests that are answered without an event."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from relay.source import Forbidden, Incoming, Invalid, Malformed, Reply, Secrets, parse_template

from .reading import Reader, Reading
from .rendering import compile_json, compile_text, templates_in
from .settings import JSON, TEXT, Handshake, ReplySettings

Filters = Mapping[str, Callable[[Any], Any]]
_encode = msgspec.json.Encoder().encode


class Answer:
    """A compiled reply."""

    def __init__(self, reader: Reader, settings: ReplySettings, filters: Filters) -> None:
        self._status = settings.status
        self._body: Callable[[Reading], bytes]
        content_type = settings.content_type
        if settings.text is not None:
            render = compile_text(reader, parse_template(settings.text, filters))
            self._body = lambda reading: render(reading).encode("utf-8", "replace")
            content_type = content_type or TEXT
        elif settings.json is not None:
            fill = compile_json(reader, settings.json, filters)
            self._body = lambda reading: _encode(fill(reading))
            content_type = content_type or JSON
        else:
            self._body = lambda _: b""
        self._headers = {
            name: compile_text(reader, parse_template(value, filters))
            for name, value in settings.headers.items()
        }
        self._content_type = None if content_type == JSON and not settings.empty else content_type
        self._always = {"X-Content-Type-Options": "nosniff"} if settings.text is not None else {}
        self.kinds = kinds = {
            each.kind
            for source in (settings.text or "", *templates_in(settings.json), *settings.headers.values())
            for each in parse_template(source, filters).placeholders
        }
        self.names_event = "event_id" in kinds
        self.names_request = bool(kinds - {"event_id"})
        self._constant = None if kinds else self._reply(Reading(reader, Incoming.of("", "")))

    def of(self, reading: Reading) -> Reply:
        """Return the reply to a request.

        Raises:
            Invalid: a placeholder has a value that its place cannot contain.
        """
        return self._constant or self._reply(reading)

    def _reply(self, reading: Reading) -> Reply:
        headers = dict(self._always)
        for name, render in self._headers.items():
            value = headers[name] = render(reading)
            if not value.isprintable():
                raise Invalid(field=f"reply header {name}", issue="would have control characters")
        return Reply(
            status=self._status,
            body=self._body(reading),
            headers=headers,
            content_type=self._content_type,
        )


class Greeting:
    """A compiled handshake."""

    def __init__(self, reader: Reader, settings: Handshake, filters: Filters) -> None:
        self.verified = settings.verified
        self.method = settings.method
        self._conditions = [
            (compile_text(reader, parse_template(template)), expected)
            for template, expected in settings.when.items()
        ]
        self._token = None if settings.token is None else compile_text(reader, parse_template(settings.token))
        self._answer = Answer(reader, settings.reply, filters)
        texts = (*settings.when, settings.token or "")
        kinds = {each.kind for text in texts for each in parse_template(text).placeholders}
        self.names_body = bool((kinds | self._answer.kinds) & {"body", "form"})

    def fits(self, reading: Reading) -> bool:
        """Return whether a request with this method is the handshake."""
        try:
            return all(
                bool(value) if expected == "*" else value == expected
                for render, expected in self._conditions
                for value in (render(reading),)
            )
        except (Invalid, Malformed):
            return False

    def reply(self, reading: Reading, tokens: Secrets) -> Reply:
        """Return the reply.

        Raises:
            Forbidden: the request's token is not in `tokens`.
        """
        if self._token is not None:
            token = self._token(reading)
            credential = tokens.find(token.encode("utf-8", "surrogateescape")) if token else None
            if credential is None:
                raise Forbidden("Unknown verify token")
            credential.usage.count += 1
        return self._answer.of(reading)
