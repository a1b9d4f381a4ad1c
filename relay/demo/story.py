"""What the demo plays: one documented request after the other, through the front door, until it arrives."""

import asyncio

import aiohttp

from relay.config.schema import Config
from relay.demo.narrator import Narrator
from relay.demo.receiver import Arrival
from relay.demo.setting import OFFLINE_AFTER, TOKEN
from relay.incoming import Incoming

PATIENCE = 10.0
"""Seconds that an event may take to arrive."""

SAMPLES: dict[str, tuple[str | None, ...]] = {
    "lazychat": ("lazychat.plugin.updated",),
    "moddy": ("moddy.member_joined",),
    "adorn": ("adorn.image.shared",),
    "compozy": ("compozy.user.created",),
    "whatsapp": (
        "whatsapp.qr_ready",
        "whatsapp.worker.registered",
        None,
        "whatsapp.worker.unregistered",
    ),
}
"""What each of a source's samples arrives as; None: a heartbeat, which is no event."""

OFFLINE = "whatsapp.worker.offline"


class Story:
    """Sends samples and waits for each to arrive, telling every step."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        narrator: Narrator,
        arrivals: asyncio.Queue[Arrival],
        config: Config,
        relay: str,
    ) -> None:
        self.delivered = 0  # arrivals with a valid signature
        self._session = session
        self._narrator = narrator
        self._arrivals = arrivals
        self._config = config
        self._relay = relay  # URL

    async def tell(self) -> list[str]:
        """Play everything once; return what went wrong, a sentence each."""
        *steps, farewell = [
            (source, sample, type_)
            for source, types in SAMPLES.items()
            for sample, type_ in zip(self._config.sources[source].settings.samples(), types, strict=True)
        ]
        problems = [await self._send(*step) for step in steps]
        self._narrator.step("whatsapp", "silent", f"no more heartbeats: offline after {OFFLINE_AFTER} s")
        problems.append(await self._expect(OFFLINE))
        problems.append(await self._send(*farewell))
        return [problem for problem in problems if problem]

    async def watch(self) -> None:
        """Show what arrives, for ever."""
        while True:
            self._show(await self._arrivals.get())

    async def _send(self, source: str, sample: Incoming, type_: str | None) -> str:
        self._narrator.step(source, "sent", f"{sample.method} {sample.path}")
        url = self._relay + sample.path
        headers = {**sample.headers, "Authorization": f"Bearer {TOKEN}"}
        try:
            async with self._session.request(
                sample.method, url, data=sample.body, headers=headers
            ) as response:
                answer = await response.text()
        except aiohttp.ClientError as error:
            return f"{source}: {sample.path} could not be sent: {error}"
        self._narrator.step("", "answered", f"{response.status} {answer}")
        if not response.ok:
            return f"{source}: {sample.path} was answered with {response.status}"
        return await self._expect(type_) if type_ else ""

    async def _expect(self, type_: str) -> str:
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    arrival = await self._arrivals.get()
                    self._show(arrival)
                    if arrival.type == type_:
                        return f"{type_}: {arrival.problem}" if arrival.problem else ""
        except TimeoutError:
            return f"{type_} did not arrive within {PATIENCE:g} s"

    def _show(self, arrival: Arrival) -> None:
        self.delivered += arrival.problem is None
        self._narrator.arrived(arrival)
