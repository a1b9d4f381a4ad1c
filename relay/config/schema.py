"""The shape of config.toml: one record per table, every default in one place.

`relay.config.binding` fills these from TOML; a field's type decides how its text is read (`Duration`,
`Size`, `Rate`, `Secret`, `Secrets`, `Path`), its name is the key. Bounds are msgspec's `Meta`; a
`check` is a function of `relay.config.validators`; with `reads`, it reads files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from relay.base.units import Duration, Rate, Size
from relay.config import validators
from relay.config.client_cert import ClientCert
from relay.config.secrets import Secret


def _check(function: Callable[[Any], Any], **more: Any) -> msgspec.Meta:
    return msgspec.Meta(extra={"check": function, **more})


Interval = Annotated[Duration, msgspec.Meta(gt=0)]
"""A duration that cannot be zero."""


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """`[server]`: the public listener, where senders post."""

    listen: Annotated[str, _check(validators.listen)] = "127.0.0.1:8080"
    implementation: Literal["fast", "aiohttp"] = "fast"
    max_body: Annotated[Size, msgspec.Meta(gt=0), _check(validators.body_size)] = 2 * 2**20
    body_timeout: Interval = 10.0
    min_body_rate: Size = 32 * 2**10
    trusted_proxies: tuple[Annotated[str, _check(validators.network)], ...] = ()
    forwarded_header: Literal["X-Forwarded-For", "Forwarded"] = "X-Forwarded-For"
    shutdown_grace: Duration = 20.0


class Admin(msgspec.Struct, frozen=True, kw_only=True):
    """`[admin]`: metrics, health and the JSON API."""

    listen: Annotated[str, _check(validators.listen_or_off)] = "127.0.0.1:8081"
    socket: Annotated[str, msgspec.Meta(min_length=1), _check(validators.file_name)] = "relay.sock"
    tokens: tuple[Secret, ...] = ()


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """`[storage]`: where events live."""

    url: Annotated[str, _check(validators.storage)] = "sqlite:relay.db"
    durability: Literal["full", "normal"] = "full"
    min_free_disk: Size = 64 * 2**20


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """`[retention]`: how long what is no longer needed is kept."""

    events: Interval = 14 * 86_400.0
    dead: Interval = 30 * 86_400.0
    held: Interval = 30 * 86_400.0
    attempts: Interval = 14 * 86_400.0
    stats: Interval = 400 * 86_400.0
    worker_metrics: Interval = 7 * 86_400.0


class BackupConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[backup]`: copies of the database, made while it works."""

    every: Interval | None = None
    keep: Annotated[int, msgspec.Meta(ge=1)] = 7
    dir: Annotated[str, msgspec.Meta(min_length=1), _check(validators.file_name)] = "backups"


class SourceRetention(msgspec.Struct, frozen=True, kw_only=True):
    """`retention = {…}` of a source: what is different for its events."""

    events: Interval | None = None
    types: dict[Annotated[str, _check(validators.pattern)], Interval] = {}


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """`[log]`."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text", "journald"] = "auto"


class Plugins(msgspec.Struct, frozen=True, kw_only=True):
    """`[plugins]`: where to look for plugins of one's own."""

    dirs: tuple[Path, ...] = (Path("plugins.d"),)


class WorkerOverride(msgspec.Struct, frozen=True, kw_only=True):
    """`ids = { "batch-*" = {…} }` of worker rules: what is different for ids of a pattern."""

    offline_after: Interval | None = None
    check_every: Interval | None = None
    startup_hold: Duration | None = None
    forget_after: Interval | None = None
    recover_after: Annotated[int, msgspec.Meta(ge=1)] | None = None


class WorkerRules(msgspec.Struct, frozen=True, kw_only=True):
    """`[workers]`, and `workers = {…}` of a source: when a silent worker is offline."""

    offline_after: Interval = 90.0
    check_every: Interval = 10.0
    startup_hold: Duration = 90.0
    forget_after: Interval = 30 * 86_400.0
    recover_after: Annotated[int, msgspec.Meta(ge=1)] = 1
    ids: dict[Annotated[str, _check(validators.pattern)], WorkerOverride] = {}


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[sources.NAME]`: the keys that every source has; the plugin's own become `settings`."""

    name: str
    plugin: str
    prefix: Annotated[str, _check(validators.prefix)] = ""
    max_body: Annotated[Size, msgspec.Meta(gt=0), _check(validators.body_size)] = 2 * 2**20
    rate_limit: Rate | None = None
    key_conflict: Literal["store", "reject"] = "store"
    cors_origins: tuple[Annotated[str, _check(validators.web_origin)], ...] = ()
    retention: SourceRetention = SourceRetention()
    workers: WorkerRules = WorkerRules()
    settings: Any = None  # the plugin's Source instance, bound by the loader


class RetryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`retry = {…}` of a destination."""

    schedule: tuple[Interval, ...] = (
        5, 30, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400,
    )  # fmt: skip
    jitter: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    max_retry_after: Duration = 3600.0


class CircuitConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`circuit = {…}` of a destination: when to stop asking, and how often to probe."""

    failures: Annotated[int, msgspec.Meta(ge=1)] = 10
    probe: Interval = 30.0
    max_probe: Interval = 300.0


class DestinationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[destinations.NAME]`: one outgoing webhook."""

    name: str
    url: Annotated[str, _check(validators.url)]
    events: tuple[Annotated[str, _check(validators.pattern)], ...] = ("*",)
    where: Any = None  # relay.routing.filters reads it
    secrets: tuple[Annotated[Secret, _check(validators.signing_secret)], ...] = ()
    format: str = "standard"
    method: Literal["POST", "PUT"] = "POST"
    headers: dict[
        Annotated[str, _check(validators.header_name)],
        Annotated[Secret, _check(validators.header_value, literal=True)],
    ] = {}  # values may be secrets, so none of them prints
    timeout: Interval = 15.0
    connect_timeout: Interval = 5.0
    concurrency: Annotated[int, msgspec.Meta(ge=1)] = 8
    rate_limit: Rate | None = None
    max_pending: Annotated[int, msgspec.Meta(ge=1)] = 1_000_000
    order_by: str | None = None
    ttl: Interval | None = None
    latest_by: str | None = None
    on_dead: str | None = None
    final_statuses: tuple[Annotated[int, _check(validators.final_status)], ...] = ()
    disable_after: Interval = 5 * 86_400.0
    retry: RetryConfig = RetryConfig()
    circuit: CircuitConfig = CircuitConfig()
    allow_private: bool = False
    ca_file: Annotated[Path, _check(validators.existing_file, reads=True)] | None = None
    client_cert: Annotated[ClientCert, _check(validators.client_cert, reads=True)] | None = None
    proxy: Annotated[Secret, _check(validators.proxy, literal=True)] | None = None  # may hold a password


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything config.toml says, checked and complete."""

    path: Path  # the file it came from
    state_dir: Path  # absolute; where the daemon writes
    development: bool = False
    server: Server = Server()
    admin: Admin = Admin()
    storage: Storage = Storage()
    retention: Retention = Retention()
    backup: BackupConfig = BackupConfig()
    log: Log = Log()
    plugins: Plugins = Plugins()
    workers: WorkerRules = WorkerRules()
    sources: dict[str, SourceConfig] = {}
    destinations: dict[str, DestinationConfig] = {}
    warnings: tuple[str, ...] = ()
