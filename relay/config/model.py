"""The shape of config.toml: one record per table, every default in one place.

`relay.config.bind` fills these from TOML; a field's type decides how its text is read (`Duration`,
`Size`, `Rate`, `Secret`, `Secrets`, `Path`), its name is the key.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec

from relay.config.secret import Secret
from relay.units import Duration, Rate, Size


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """`[server]`: the public listener, where senders post."""

    listen: str = "127.0.0.1:8080"
    max_body: Size = 2 * 2**20
    trusted_proxies: tuple[str, ...] = ()
    shutdown_grace: Duration = 20.0


class Admin(msgspec.Struct, frozen=True, kw_only=True):
    """`[admin]`: metrics, health and the JSON API."""

    listen: str = "127.0.0.1:8081"
    socket: str = "relay.sock"
    tokens: tuple[Secret, ...] = ()


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """`[storage]`: where events live."""

    url: str = "sqlite:relay.db"
    durability: Literal["full", "normal"] = "full"
    min_free_disk: Size = 64 * 2**20


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """`[log]`."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text", "journald"] = "auto"


class Plugins(msgspec.Struct, frozen=True, kw_only=True):
    """`[plugins]`: where to look for sources of one's own."""

    dirs: tuple[Path, ...] = (Path("plugins.d"),)


class WorkerRules(msgspec.Struct, frozen=True, kw_only=True):
    """`[workers]`, and `workers = {…}` of a source: when a silent worker is offline."""

    offline_after: Duration = 90.0
    check_every: Duration = 10.0
    startup_hold: Duration = 90.0
    forget_after: Duration = 30 * 86_400.0


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[sources.NAME]`: the keys that every source has; the plugin's own become `settings`."""

    name: str
    plugin: str
    prefix: str = ""
    max_body: Size = 2 * 2**20
    rate_limit: Rate | None = None
    cors_origins: tuple[str, ...] = ()
    workers: WorkerRules = WorkerRules()
    settings: Any = None  # the plugin's Source instance, bound by the loader


class RetryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`retry = {…}` of a destination."""

    schedule: tuple[Duration, ...] = (
        5, 30, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400,
    )  # fmt: skip
    jitter: float = 0.1
    max_retry_after: Duration = 3600.0


class DestinationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[destinations.NAME]`: one outgoing webhook."""

    name: str
    url: str
    events: tuple[str, ...] = ("*",)
    where: Any = None  # relay.filters reads it
    secrets: tuple[Secret, ...] = ()
    format: str = "standard"
    method: Literal["POST", "PUT"] = "POST"
    headers: dict[str, Secret] = {}  # values may be secrets, so none of them prints
    timeout: Duration = 15.0
    connect_timeout: Duration = 5.0
    concurrency: int = 8
    retry: RetryConfig = RetryConfig()
    allow_private: bool = False
    ca_file: Path | None = None


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything config.toml says, checked and complete."""

    path: Path  # the file it came from
    state_dir: Path  # absolute; where the daemon writes
    development: bool = False
    server: Server = Server()
    admin: Admin = Admin()
    storage: Storage = Storage()
    log: Log = Log()
    plugins: Plugins = Plugins()
    workers: WorkerRules = WorkerRules()
    sources: dict[str, SourceConfig] = {}
    destinations: dict[str, DestinationConfig] = {}
    warnings: tuple[str, ...] = ()
