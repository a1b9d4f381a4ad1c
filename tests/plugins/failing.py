"""Sources that fail on request: a header of the request names where and how."""

import asyncio
from typing import Any

import msgspec

from relay.hookspecs import hookimpl
from relay.source import (
    Accepted,
    Event,
    Forbidden,
    Incoming,
    Invalid,
    Receipt,
    Refusal,
    Reply,
    Source,
    Unauthenticated,
    route,
)
from relay.sources.adorn import Adorn
from relay.sources.compozy import Compozy
from relay.sources.lazychat import LazyChat
from relay.sources.moddy import Moddy
from relay.sources.whatsapp import WhatsApp

FAILURES = {"auth": Unauthenticated, "forbidden": Forbidden, "crash": ZeroDivisionError}


def failing(base: type[Source]) -> type[Source]:
    """Return a bundled source whose `verify` raises what the header `X-Fail` names."""

    def verify(self: Source, incoming: Incoming) -> None:
        base.verify(self, incoming)
        failure = FAILURES.get(incoming.header("X-Fail"))
        if failure is not None:
            raise failure

    members = {"verify": verify, "__module__": __name__}
    return type(base)(base.__name__, (base,), members, kind=f"failing_{base.kind}", owns=base.owns)


class Flawed(Source, kind="flawed", owns=("/flawed",)):
    """A plugin with every fault that a plugin can have."""

    def verify(self, incoming: Incoming) -> None:
        """Fail here for `X-Fail: verify`."""
        if incoming.header("X-Fail") == "verify":
            raise KeyError("secret")

    @route("POST", "/flawed/events")
    def event(self, incoming: Incoming) -> Any:
        """Take an event, or fail in the way that the header names."""
        flaw = incoming.header("X-Fail")
        if flaw == "handler":
            raise KeyError("secret")
        if flaw == "refuse":
            raise Invalid(field="everything", issue="is wrong")
        if flaw in ENDINGS:
            raise ENDINGS[flaw]
        if flaw == "refusal":
            raise Odd
        fine = Accepted(event=Event(type="a"), reply={"fine": True})
        return ANSWERS.get(flaw, fine)

    def refuse(self, refusal: Refusal, incoming: Incoming) -> Reply:
        """Fail here for `X-Fail: refuse`."""
        if incoming.header("X-Fail") == "refuse":
            raise KeyError("secret")
        if incoming.header("X-Fail") == "refuse exit":
            raise SystemExit(5)
        if incoming.header("X-Fail") == "refuse status":
            return Reply(status=100, body={})
        return Reply(status=refusal.status, body={"flawed": refusal.code})


class Ending(BaseException):
    """Not an Exception."""


class Odd(Refusal):
    """A refusal with values that no answer and no metric can have."""

    status, reason, code = 9999, "a reason of its own", "odd"


def _exits(receipt: Receipt) -> Reply:
    raise SystemExit(receipt.event_id)


ENDINGS = {
    "exit": SystemExit(0),
    "interrupt": KeyboardInterrupt(),
    "generator": GeneratorExit(),
    "cancelled": asyncio.CancelledError(),
    "base": Ending(),
}


def _impossible(receipt: Receipt) -> Reply:
    raise KeyError(receipt)


ANSWERS: dict[str, Any] = {
    "no answer": None,
    "bare reply": Reply(body=object()),
    "type": Accepted(event=Event(type=5), reply={}),
    "data": Accepted(event=Event(type="a", data=object()), reply={}),
    "reply": Accepted(event=Event(type="a"), reply=_impossible),
    "reply value": Accepted(event=Event(type="a"), reply=object()),
    "reply status": Accepted(event=Event(type="a"), reply=Reply(status="fine", body={})),
    "reply exit": Accepted(event=Event(type="a"), reply=_exits),
    **{
        f"status {status}": Accepted(event=Event(type="a"), reply=Reply(status=status, body={}))
        for status in (100, 101, 199, 0, -1, 600, 999, 9999, True)
    },
    **{
        f"raw {text!r}": Accepted(event=Event(type="a", data=msgspec.Raw(text)), reply={})
        for text in (
            b"",
            b"{} {}",
            b'{},"type":"b"',
            b"NaN",
            b"{",
            b"'a'",
            b'"\xff"',
            b"\xef\xbb\xbf{}",
            b"1,2",
        )
    },
    "raw context": Accepted(event=Event(type="a", context=msgspec.Raw(b'{},"type":"b"')), reply={}),
    "raw in a dict": Accepted(event=Event(type="a", data={"a": msgspec.Raw(b'1,"b":2')}), reply={}),
    "raw in a list": Accepted(event=Event(type="a", data={"a": [1, (msgspec.Raw(b"1,2"),)]}), reply={}),
    "reply header": Accepted(
        event=Event(type="a"), reply=Reply(headers={"X-Injected": "a\r\nb: c"}, body={})
    ),
}
"""The handler's answers for the values of `X-Fail` that fail only after the handler has returned."""


@hookimpl
def relay_sources() -> list[type[Source]]:
    """Offer all of them."""
    return [Flawed, *map(failing, (Adorn, Compozy, LazyChat, Moddy, WhatsApp))]
