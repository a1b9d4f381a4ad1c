"""The recorded samples: requests of each sender, byte for byte, with the expected response and effect.

`samples/<kind>/<case>/request.http` is one HTTP/1.1 request. Lines of its head may end with LF, the
file's last newline is not part of the body, `{fill:N}` stands for N letters and `Content-Length:
{auto}` for the length of the body. `expect.json` beside it has the expected response and event; in it
`<event_id>` and `<uuid>` stand for an id with and without `evt_`, `<version>` for the relay's own. `worker`
has the change, the worker's id, and its row after the change to an empty registry.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from daemons import SOURCES, write_config

from relay import __version__
from relay.plugin_loading.loader import load
from relay.source import Source

ROOT = Path(__file__).parents[1] / "samples"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
_PLACEHOLDERS = {
    "<event_id>": re.compile(f"evt_{UUID}"),
    "<uuid>": re.compile(UUID),
    "<version>": re.compile(re.escape(__version__)),
}
_FILL = re.compile(rb"\{fill:([0-9]+)\}")


class ExpectedEvent(msgspec.Struct, forbid_unknown_fields=True):
    type: str  # full: the source's name is its kind
    subject: str | None
    data: Any
    context: Any


class Expect(msgspec.Struct, forbid_unknown_fields=True):
    why: str  # the section of docs/contracts that the case tests, and the tested statement
    status: int
    body: Any
    event: ExpectedEvent | None
    worker: dict[str, Any] | None
    headers: dict[str, str] = {}


class Sample(msgspec.Struct):
    kind: str
    case: str
    request: bytes  # as on the wire
    expect: Expect

    def __str__(self) -> str:
        return f"{self.kind}/{self.case}"


def sources() -> dict[str, Source]:
    """Configure one source of each kind, named after it, with the tokens that the samples use."""
    with TemporaryDirectory() as folder:
        file = write_config(Path(folder), SOURCES)
        return {name: source.settings for name, source in load(file).config.sources.items()}


def read_samples() -> list[Sample]:
    """Read all cases, sorted by path."""
    return [read_sample(folder) for folder in sorted(ROOT.glob("*/*"))]


def read_sample(folder: Path) -> Sample:
    """Read one case."""
    expect = msgspec.json.decode(_filled((folder / "expect.json").read_bytes()), type=Expect)
    head, _, body = _filled((folder / "request.http").read_bytes()).partition(b"\n\n")
    body = body.removesuffix(b"\n")
    head = head.replace(b"\n", b"\r\n").replace(b"{auto}", str(len(body)).encode())
    return Sample(folder.parent.name, folder.name, head + b"\r\n\r\n" + body, expect)


def like(actual: Any, expected: Any) -> bool:
    """Compare JSON values; a placeholder matches any id of its kind."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        return actual.keys() == expected.keys() and all(like(actual[k], expected[k]) for k in expected)
    if expected in _PLACEHOLDERS if isinstance(expected, str) else False:
        return isinstance(actual, str) and _PLACEHOLDERS[expected].fullmatch(actual) is not None
    return bool(actual == expected) and type(actual) is type(expected)


def _filled(text: bytes) -> bytes:
    return _FILL.sub(lambda match: b"x" * int(match[1]), text)
