"""A plugin to start from: a source that works, its test, and the table that configures it."""

PLUGIN = '''\
"""@Class@: posts what happens to /@name@/events."""

from typing import ClassVar

import msgspec

from relay.hookspecs import hookimpl
from relay.source import EMPTY, Accepted, Event, Incoming, Receipt, Refusal, Reply, Secrets, Source
from relay.source import as_map, check_type, route

PATH = "/@name@/events"


class Message(msgspec.Struct):
    """The body of a request: what it must have, and what it may have."""

    type: str
    subject: str | None = None
    data: msgspec.Raw = EMPTY


class @Class@(Source, kind="@name@", owns=("/@name@",)):
    """@Class@: its fields are the keys of its table in config.toml."""

    tokens: Secrets
    verify_reads_body: ClassVar[bool] = False  # the token is in the head

    def verify(self, incoming: Incoming) -> None:
        incoming.bearer(self.tokens)

    @route("POST", PATH)
    def take(self, incoming: Incoming) -> Accepted:
        body = incoming.decode(Message)
        check_type(body.type, "type")
        event = Event(type=body.type, subject=body.subject, data=as_map(body.data, "data"))
        return Accepted(event=event, reply=_reply)

    def refuse(self, refusal: Refusal, incoming: Incoming) -> Reply:
        return Reply(status=refusal.status, body={"ok": False, "why": refusal.detail})

    def samples(self) -> tuple[Incoming, ...]:
        return (Incoming.of("POST", PATH, {"Content-Type": "application/json"}, SAMPLE),)


def _reply(receipt: Receipt) -> dict[str, object]:
    return {"ok": True, "id": receipt.event_id}


SAMPLE = b'{"type": "thing.happened", "subject": "42", "data": {"amount": 1.50}}'


@hookimpl
def relay_sources() -> list[type[Source]]:
    return [@Class@]
'''

TEST = '''\
"""What @name@.py promises. Nothing has to run: a source is pure functions of bytes and a few headers."""

import pytest
from @name@ import PATH, SAMPLE, @Class@

from relay.source import Incoming, Invalid, Receipt, Secrets, Unauthenticated

source = @Class@(tokens=Secrets.of("secret"))


def test_a_message_becomes_an_event():
    accepted = source.take(Incoming.of("POST", PATH, {}, SAMPLE))
    assert (accepted.event.type, accepted.event.subject) == ("thing.happened", "42")
    assert bytes(accepted.event.data) == b'{"amount": 1.50}'
    assert accepted.reply(Receipt(event_id="evt_1")) == {"ok": True, "id": "evt_1"}


def test_a_message_without_a_type_is_refused_by_name():
    incoming = Incoming.of("POST", PATH, {}, b"{}")
    with pytest.raises(Invalid) as refused:
        source.take(incoming)
    reply = source.refuse(refused.value, incoming)
    assert (reply.status, reply.body) == (400, {"ok": False, "why": "type: field is required"})


def test_a_wrong_token_is_refused_and_the_right_one_is_not():
    source.verify(Incoming.of("POST", PATH, {"Authorization": "Bearer secret"}))
    with pytest.raises(Unauthenticated):
        source.verify(Incoming.of("POST", PATH, {"Authorization": "Bearer guess"}))
'''

TABLE = """\
[sources.@name@]
plugin = "@name@"
tokens = [{ env = "@NAME@_TOKEN", development = "dev-token" }]
"""


def filled(template: str, name: str) -> str:
    """Write a template for a kind of that name, such as `parcels`."""
    class_ = "".join(word.capitalize() for word in name.split("_"))
    return template.replace("@name@", name).replace("@NAME@", name.upper()).replace("@Class@", class_)
