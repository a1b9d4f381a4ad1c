"""How the demo speaks: calm lines, with colour on a terminal only."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from relay import __version__
from relay.demo.receiver import Arrival
from relay.demo.setting import TOKEN

_BOLD, _DIM, _GREEN, _RED = "1", "2", "32", "31"
_WIDTH = 96  # characters of a detail; an answer may be longer


class Narrator:
    """Writes lines to a stream, each at once."""

    def __init__(self, stream: TextIO, environ: Mapping[str, str]) -> None:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # event types may hold what a terminal cannot
        self._stream = stream
        plain = "NO_COLOR" in environ or environ.get("TERM") == "dumb" or not stream.isatty()
        self._colour = "FORCE_COLOR" in environ or not plain

    def open(self, *, relay: str, admin: str, receiver: str, folder: Path) -> None:
        """Say what is where."""
        self._line(self._paint(_BOLD, f"hookferry {__version__}") + ", a demo of everything once")
        self._line()
        self._line(f"  relay     {relay}")
        self._line(f"  metrics   {admin}/metrics")
        self._line(f"  receiver  {receiver}, checks every signature")
        self._line(f"  state     {folder}, removed at the end")
        self._line()

    def step(self, source: str, what: str, detail: str) -> None:
        """Tell one step; the source's name stands at its first."""
        self._tell(source, what, detail if len(detail) <= _WIDTH else f"{detail[: _WIDTH - 3]}...")

    def arrived(self, arrival: Arrival) -> None:
        """Tell that something reached the receiver, and whether its signature is valid."""
        about = f"{arrival.type} ({arrival.subject})" if arrival.subject else arrival.type
        if arrival.problem:
            self._tell("", "refused", f"{about}, {self._paint(_RED, arrival.problem)}")
        else:
            valid = self._paint(_GREEN, "signature valid")
            self._tell("", "delivered", f"{about}, {valid}, {arrival.milliseconds:.0f} ms")

    def conclude(self, delivered: int, problems: Sequence[str]) -> None:
        """Sum up."""
        self._line()
        for problem in problems:
            self._line(self._paint(_RED, problem))
        if not problems:
            self._line(self._paint(_GREEN, f"{delivered} events delivered, every signature valid."))

    def invite(self, relay: str) -> None:
        """Offer a request to paste."""
        self._line("Send one yourself; what arrives is shown here. Ctrl-C ends the demo.")
        self._line()
        self._line(
            f"curl -i {relay}/api/v1/events -H 'Authorization: Bearer {TOKEN}' "
            """-H 'Content-Type: application/json' -d '{"name":"hello.world","payload":{"from":"curl"}}'"""
        )
        self._line()

    def _tell(self, source: str, what: str, detail: str) -> None:
        self._line(f"{self._paint(_BOLD, f'{source:<10}')}{self._paint(_DIM, f'{what:<11}')}{detail}")

    def _paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text

    def _line(self, text: str = "") -> None:
        print(text, file=self._stream, flush=True)
