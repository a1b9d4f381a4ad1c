"""A format whose body is the list of the events in a message, so that the receiver knows them."""

import json
from collections.abc import Sequence

from relay.formats.envelope import Format
from relay.hookspecs import hookimpl
from relay.model import StoredEvent


def _members(events: Sequence[StoredEvent]) -> bytes:
    return json.dumps([event.public_id for event in events]).encode()


def _member(event: StoredEvent) -> bytes:
    return _members([event])


@hookimpl
def relay_formats() -> list[Format]:
    """Offer the format."""
    return [Format(name="members", content_type="application/json", render=_member, group=_members)]
