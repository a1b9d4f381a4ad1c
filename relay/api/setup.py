"""What the relay goes by: its configuration with every default, and what its plugins offer."""

from aiohttp import web

from relay.api.context import Parts
from relay.api.responses import say
from relay.config.effective import effective


class SetupApi:
    """The part of the admin API that says what the relay was made of."""

    def __init__(self, parts: Parts) -> None:
        self._state = parts.state

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [
            web.get("/api/config", self._config),
            web.get("/api/plugins", self._plugins),
        ]

    async def _config(self, _request: web.Request) -> web.Response:
        config = self._state.config
        return say({"path": config.path, "config": effective(config), "warnings": config.warnings})

    async def _plugins(self, _request: web.Request) -> web.Response:
        items = [offering.shown() for offering in self._state.setup.offers]
        return say({"items": items, "next_cursor": None})
