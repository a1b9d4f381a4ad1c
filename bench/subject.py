"""The relay under test: a real daemon in another process, with Moddy as the sender."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench.load import post
from bench.processes import Server, python

TOKEN = "bench-token"
_SERVE = "from relay.cli import main; main()"
_CONFIG = """\
development = true
state_dir = "."
[server]
listen = "127.0.0.1:0"
[admin]
listen = "{admin}"
[storage]
durability = "full"
{storage}
[log]
format = "text"
[sources.moddy]
plugin = "moddy"
tokens = ["{token}"]
"""
_DESTINATION = """\
[destinations.bench]
url = "{url}/hook"
events = ["moddy.*"]
secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
allow_private = true
concurrency = 192
"""
SAMPLE = b"""{
  "event_type": "member_joined",
  "discord_id": "123456789012345678",
  "metadata": {
    "guild_id": "987654321098765432",
    "guild_name": "Moddy Server",
    "joined_at": "2024-01-20T15:30:00Z"
  }
}"""

PATH = "/internal/event/notify"
TYPES = ("member_joined", "member_left", "role_updated", "command_used", "message_sent")


def request(prefix: str = "", type_: str = TYPES[0]) -> bytes:
    """Build the bytes of Moddy's example event, 206 bytes of JSON (docs/contracts/moddy.md#event-types)."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    return post(prefix + PATH, SAMPLE.replace(TYPES[0].encode(), type_.encode()), headers)


REQUEST = request()


def write_config(
    folder: Path, destination: str | None = None, more: str = "", storage: str = "", admin: str = ""
) -> Path:
    """Write a config.toml with a destination at that URL, or without one, followed by `more`.

    `storage` are further lines of its table `[storage]`; `admin` is the address of the admin listener.
    """
    config = folder / "config.toml"
    text = _CONFIG.format(storage=storage, token=TOKEN, admin=admin)
    config.write_text(text + (_DESTINATION.format(url=destination) if destination else "") + more)
    return config


@asynccontextmanager
async def relay(
    folder: Path, destination: str | None = None, more: str = "", *, storage: str = "", admin: str = ""
) -> AsyncIterator[Server]:
    """Run `relay serve` in a folder, with the configuration of `write_config`."""
    config = write_config(folder, destination, more, storage=storage, admin=admin)
    async with python(folder / "relay.log", "-c", _SERVE, "serve", "-c", str(config)) as server:
        yield server
