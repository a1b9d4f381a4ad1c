"""Where the demo plays: a config.toml of its own, with every bundled source and one destination."""

from pathlib import Path

from relay.config.schema import Server
from relay.config.secrets import Secret
from relay.errors import RelayError
from relay.process.sockets import bind

TOKEN = "dev-token"  # noqa: S105 - it opens nothing but the demo, on loopback
OFFLINE_AFTER = 2
"""Seconds of silence that take the demo's worker offline."""

_CONFIG = """\
development = true
state_dir = "."
[server]
listen = "{listen}"
[admin]
listen = "127.0.0.1:0"
[log]
level = "error"
[workers]
offline_after = "{offline_after}s"
check_every = "500ms"
startup_hold = "0s"
[sources.lazychat]
plugin = "lazychat"
tokens = ["{token}"]
[sources.moddy]
plugin = "moddy"
tokens = ["{token}"]
[sources.adorn]
plugin = "adorn"
tokens = ["{token}"]
[sources.compozy]
plugin = "compozy"
tokens = ["{token}"]
[sources.whatsapp]
plugin = "whatsapp"
tokens = ["{token}"]
[destinations.receiver]
url = "{receiver}"
secrets = ["{secret}"]
allow_private = true
"""


def write_config(folder: Path, *, listen: str, receiver: str, secret: Secret) -> Path:
    """Write the demo's config.toml into `folder`, readable by its owner alone, and return its path."""
    file = folder / "config.toml"
    file.touch(mode=0o600)
    file.write_text(
        _CONFIG.format(
            listen=listen,
            offline_after=OFFLINE_AFTER,
            token=TOKEN,
            receiver=receiver,
            secret=secret.reveal(),
        )
    )
    return file


def choose_listen(preferred: str = Server().listen, *, leave: bool = False) -> str:
    """Return the usual address, or any free port if that is taken or nobody stays to use it."""
    anywhere = "127.0.0.1:0"
    if leave:
        return anywhere
    try:
        bind(preferred, "[server] listen").close()
    except RelayError:
        return anywhere
    return preferred
