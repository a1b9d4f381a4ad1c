"""How long the steps of one request took."""

import msgspec


class Times(msgspec.Struct):
    """When each step of a request was done, by `time.perf_counter`; 0: it was not reached."""

    began: float = 0.0
    dialled: float = 0.0  # the first connect was begun: the name, if it was one, had been resolved
    connected: float = 0.0  # through a proxy: to the receiver, by its tunnel
    ready: float = 0.0  # with TLS: the handshake was done
    answered: float = 0.0  # the answer's head was there

    def steps(self, *, tls: bool) -> dict[str, float | None]:
        """Return the milliseconds of each step; None: it was not reached, or there was none."""
        return {
            "dns": _between(self.began, self.dialled),
            "connect": _between(self.dialled, self.connected),
            "tls": _between(self.connected, self.ready) if tls else None,
            "first_byte": _between(self.ready, self.answered),
        }


def _between(start: float, end: float) -> float | None:
    return round((end - start) * 1000, 1) if start and end else None
