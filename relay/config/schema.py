"""The tables and keys of config.toml. Each key is declared once: name, type, default, checks and help text.

`relay.config.binding` fills these records from TOML; a field's type decides how its text is read (`Duration`,
`Size`, `Rate`, `Secret`, `Secrets`, `Path`). Bounds are `msgspec.Meta`, a `check` is a function of
`relay.config.validators`; with `reads`, it reads files. The tables of docs/configuration.md are made from the
help texts (`make docs`), and tests compare the keys and defaults in the reference config.toml.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from relay.base.shards import MOST_SHARDS
from relay.base.units import Duration, Rate, Size
from relay.config import validators
from relay.config.client_cert import ClientCert
from relay.config.document import INCLUDED
from relay.config.maintenance import MaintenanceWindow
from relay.config.message import MessageConfig
from relay.config.secrets import Secret, Url
from relay.config.signatures import DEFAULT, SignatureConfig


def _check(function: Callable[[Any], Any], **more: Any) -> msgspec.Meta:
    return msgspec.Meta(extra={"check": function, **more})


def _help(text: str) -> msgspec.Meta:
    """Describe a key; docs/configuration.md has the same text."""
    return msgspec.Meta(description=text)


Interval = Annotated[Duration, msgspec.Meta(gt=0)]
"""A duration that cannot be zero."""


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """`[server]`: the public listener, where senders post."""

    listen: Annotated[
        str, _check(validators.listen), _help("`host:port`; IPv6 in brackets; port 0 for any free port")
    ] = "127.0.0.1:8080"
    implementation: Annotated[
        Literal["fast", "aiohttp"],
        _help('the implementation of the listener: `"fast"` or `"aiohttp"`, see below'),
    ] = "fast"
    max_body: Annotated[
        Size,
        msgspec.Meta(gt=0),
        _check(validators.body_size),
        _help("largest request body, at most 256 MiB; a larger body gets 413, in the sender's own envelope"),
    ] = 2 * 2**20
    body_timeout: Annotated[Interval, _help("how long a body may take to arrive; a slower body gets 408")] = (
        10.0
    )
    min_body_rate: Annotated[
        Size,
        _help(
            "each time this many bytes have arrived before the deadline, the body gets one more second, so "
            'that a large body can arrive over a slow connection; `"0 B"`: no extra time'
        ),
    ] = 32 * 2**10
    trusted_proxies: Annotated[
        tuple[Annotated[str, _check(validators.network)], ...],
        _help(
            "addresses or networks of proxies. For requests from these, the relay reads the sender's "
            "address from "
            "`forwarded_header`: the last entry that is not a trusted proxy"
        ),
    ] = ()
    forwarded_header: Annotated[
        Literal["X-Forwarded-For", "Forwarded"],
        _help(
            'the header to which your proxies add the address: `"X-Forwarded-For"` or `"Forwarded"` (RFC '
            "7239). "
            "The relay never reads the other header, because proxies pass on the sender's own value"
        ),
    ] = "X-Forwarded-For"
    shutdown_grace: Annotated[
        Duration, _help("how long requests and deliveries in flight may take to finish after SIGTERM")
    ] = 20.0


Scope = Literal["read", "operate", "admin"]
"""The scope of an operator of the admin API; each scope includes the ones before it."""


class AdminToken(msgspec.Struct, frozen=True, kw_only=True):
    """One of `[admin] tokens`: a secret, or a table with the secret, its name and its scope."""

    secret: Annotated[Secret, _help("the token")]
    name: Annotated[
        str,
        _help(
            "name in the audit log and in metrics; default: name of the secret's variable, file or credential"
        ),
    ] = ""
    scope: Annotated[
        Scope,
        _help(
            '`"read"` allows requests that change nothing, `"operate"` also changes to deliveries, '
            'destinations, sources, workers and jobs, and `"admin"` every request'
        ),
    ] = "admin"

    @classmethod
    def expand(cls, value: Any) -> tuple[Any, None]:
        """Return the table that a value stands for: a secret alone is a token with the scope admin."""
        is_table = isinstance(value, dict) and bool(value.keys() & {"secret", "name", "scope"})
        return (value if is_table else {"secret": value}), None

    def written(self) -> Any:
        """Return the shortest value that config.toml could have for this record, with its secret."""
        name = {"name": self.name} if self.name else {}
        scope = {"scope": self.scope} if self.scope != "admin" else {}
        return {"secret": self.secret, **name, **scope} if name or scope else self.secret

    @property
    def title(self) -> str:
        """Return the token's name; "" if neither config.toml nor its place names it."""
        return self.name or self.secret.name


class Admin(msgspec.Struct, frozen=True, kw_only=True):
    """`[admin]`: metrics, health and the JSON API."""

    listen: Annotated[
        str, _check(validators.listen_or_off), _help('`host:port`; `""` turns the listener off')
    ] = "127.0.0.1:8081"
    socket: Annotated[
        str,
        msgspec.Meta(min_length=1),
        _check(validators.file_name),
        _help("the unix socket of the `relay` command"),
    ] = "relay.sock"
    tokens: Annotated[
        tuple[AdminToken, ...],
        _help(
            "secrets for the JSON API on the listener, or tables with `secret`, `name` and `scope`; without "
            "tokens, only the socket and logins to the dashboard give access to the API"
        ),
    ] = ()
    hosts: Annotated[
        tuple[Annotated[str, _check(validators.host_name)], ...],
        _help(
            "names under which a reverse proxy serves the listener; the API refuses requests to all names "
            "except these, `localhost` and the listener's own address"
        ),
    ] = ()
    ui: Annotated[bool, _help("whether the listener and the socket serve the dashboard at `/ui/`")] = True
    user_header: Annotated[
        str | None,
        _check(validators.user_header),
        _help(
            "the header in which a proxy names the user whom it has authenticated, such as "
            '`"X-Remote-User"`; read only from `trusted_proxies`'
        ),
    ] = None
    trusted_proxies: Annotated[
        tuple[Annotated[str, _check(validators.admin_proxy)], ...],
        _help(
            "proxies that may send `user_header`: addresses or networks, or `unix:` and the user of a proxy "
            "that connects to the socket; requests of this user have only the rights of the named user"
        ),
    ] = ()
    proxy_secret: Annotated[
        Secret | None,
        _help(
            "a secret that proxies send in `X-Relay-Proxy-Secret`; required for a proxy on this machine, "
            "because every local user can connect from its address"
        ),
    ] = None
    user_scope: Annotated[Scope, _help("the scope of users that a proxy names")] = "read"


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """`[storage]`: where events are stored."""

    url: Annotated[
        Url,
        _check(validators.storage),
        _help(
            "`sqlite:` and a file, relative to `state_dir`; or `postgresql://USER@HOST/DATABASE`, a string "
            "or, with a password, a secret"
        ),
    ] = Url("sqlite:relay.db")
    listen_url: Annotated[
        Url | None,
        _check(validators.listen_url),
        _help(
            "URL of the same PostgreSQL database without the pooler, for the notifications of a cluster; "
            "unset: the relay listens over `url`, or polls if `url` has `pooler=true`"
        ),
    ] = None
    durability: Annotated[
        Literal["full", "normal"],
        _help(
            '`"full"` syncs each commit to disk; `"normal"` may lose the latest events in a power '
            "failure, never in a crash of the relay"
        ),
    ] = "full"
    min_free_disk: Annotated[
        Size,
        _help("a request that would leave less free space than this gets 503, until there is enough again"),
    ] = 64 * 2**20

    @property
    def free_after_backup(self) -> int:
        """Bytes that a backup leaves free on the database's disk.

        With only `min_free_disk`, the next request of a sender would be refused.
        """
        return 2 * self.min_free_disk


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """`[retention]`: the time to keep finished data."""

    events: Annotated[
        Interval,
        _help("events with their deliveries, from the time of receipt; never while a delivery is pending"),
    ] = 14 * 86_400.0
    dead: Annotated[Interval, _help("events with a dead delivery, from the time it became dead")] = (
        30 * 86_400.0
    )
    held: Annotated[
        Interval,
        _help(
            "a delivery expires if it has been due for this long and its destination accepted nothing "
            "meanwhile"
        ),
    ] = 30 * 86_400.0
    attempts: Annotated[Interval, _help("HTTP attempts with their responses")] = 14 * 86_400.0
    stats: Annotated[Interval, _help("counts of events per source, type and hour")] = 400 * 86_400.0
    worker_metrics: Annotated[Interval, _help("gauges of workers, at most one row per worker and minute")] = (
        7 * 86_400.0
    )


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """`[cluster]`: this daemon as one of several nodes on a PostgreSQL database."""

    enabled: Annotated[
        bool | None,
        _help(
            "let other daemons use the same PostgreSQL database and share the work; `false` refuses a "
            "second daemon; unset: `true` with PostgreSQL, `false` with SQLite"
        ),
    ] = None
    node: Annotated[
        str,
        _check(validators.printable),
        _help('the name of this node in lists and logs; `""`: the host name. It need not be unique'),
    ] = ""
    lease: Annotated[
        Duration,
        _check(validators.lease),
        _help(
            "other nodes take over the work of a node that has not answered for this long, or for twice a "
            "destination's `timeout` if that is longer; at least 3 s, the same on all nodes"
        ),
    ] = 30.0


class BackupConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[backup]`: copies of the database, made while the relay runs."""

    every: Annotated[Interval | None, _help("interval between backups")] = None
    keep: Annotated[
        int,
        msgspec.Meta(ge=1),
        _help("number of backups to keep; the oldest is deleted after a new one has passed its check"),
    ] = 7
    dir: Annotated[
        str,
        msgspec.Meta(min_length=1),
        _check(validators.file_name),
        _help(
            "folder, relative to `state_dir`. Use a different disk from the database's, so that backups "
            "survive the loss of that disk"
        ),
    ] = "backups"


class SourceRetention(msgspec.Struct, frozen=True, kw_only=True):
    """`retention = {…}` of a source: other retention for its events."""

    events: Interval | None = None
    types: dict[Annotated[str, _check(validators.pattern)], Interval] = {}


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """`[log]`."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], _help("`debug`, `info`, `warning` or `error`")
    ] = "info"
    format: Annotated[
        Literal["auto", "json", "text", "journald"],
        _help(
            "`json`, `text` or `journald`; `auto` is `journald` under systemd, `text` on a terminal, "
            "else `json`"
        ),
    ] = "auto"


class Plugins(msgspec.Struct, frozen=True, kw_only=True):
    """`[plugins]`: folders with the operator's plugins."""

    dirs: Annotated[
        tuple[Path, ...],
        _help(
            "folders whose `*.py` files are plugins. A missing folder is fine; files that begin with "
            "`_` or `test_` are ignored"
        ),
    ] = (Path("plugins.d"),)


class WorkerOverride(msgspec.Struct, frozen=True, kw_only=True):
    """`ids = { "batch-*" = {…} }` of worker rules: the rules that differ for ids of a pattern."""

    offline_after: Interval | None = None
    check_every: Interval | None = None
    startup_hold: Duration | None = None
    forget_after: Interval | None = None
    recover_after: Annotated[int, msgspec.Meta(ge=1)] | None = None


class WorkerRules(msgspec.Struct, frozen=True, kw_only=True):
    """`[workers]`, and `workers = {…}` of a source: when a silent worker is offline."""

    offline_after: Annotated[Interval, _help("a worker that was silent for this long is offline")] = 90.0
    check_every: Annotated[
        Interval,
        _help("interval between checks; all workers are checked at the shortest interval of all sources"),
    ] = 10.0
    startup_hold: Annotated[
        Duration, _help("after a start of the relay, workers have at least this long to send a heartbeat")
    ] = 90.0
    forget_after: Annotated[
        Interval, _help("a worker that was offline for this long is removed from the registry")
    ] = 30 * 86_400.0
    recover_after: Annotated[
        int,
        msgspec.Meta(ge=1),
        _help("number of consecutive heartbeats, each in time, after which a silent worker is ONLINE again"),
    ] = 1
    ids: Annotated[
        dict[Annotated[str, _check(validators.pattern)], WorkerOverride],
        _help(
            'other values of these keys for ids that match a shell-style pattern: `{ "batch-*" = { '
            'offline_after = "10m" } }`; the first matching pattern is used'
        ),
    ] = {}
    maintenance: Annotated[
        tuple[MaintenanceWindow, ...],
        _help("[planned windows](workers.md#maintenance) in which silent workers are not reported offline"),
    ] = ()


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[sources.NAME]`: the keys that every source has; the plugin's own become `settings`."""

    name: str
    plugin: Annotated[str, _help("the kind of source; `relay plugins list` lists all kinds")]
    prefix: Annotated[
        str,
        _check(validators.prefix),
        _help(
            "a path such as `/acme` that precedes the source's paths, for a second source of the same kind"
        ),
    ] = ""
    max_body: Annotated[
        Size,
        msgspec.Meta(gt=0),
        _check(validators.body_size),
        _help("this source's limit; if it is not set, the limit in `[server]` applies"),
    ] = 2 * 2**20
    rate_limit: Annotated[
        Rate | None,
        _help(
            'requests per token, such as `"1000/m"`; further requests get 429. For heartbeats, '
            "registrations and unregistrations, this is the rate of each worker of a token; all workers of "
            "the token together have ten times this rate"
        ),
    ] = None
    key_conflict: Annotated[
        Literal["store", "reject", "duplicate"],
        _help(
            "a request whose [idempotency key](sources.md#idempotency-keys) was used for another "
            'request: `"store"` it as a new event, `"reject"` it with 422, or answer it as a `"duplicate"`'
        ),
    ] = "store"
    cors_origins: Annotated[
        tuple[Annotated[str, _check(validators.web_origin)], ...],
        _help(
            'origins of web pages that may send from a browser, such as `"https://shop.example"`, or '
            '`"*"`. A source without secrets refuses, with 403, every other request that has an `Origin` '
            "header"
        ),
    ] = ()
    schemas: Annotated[
        dict[Annotated[str, _check(validators.pattern)], Path],
        _help(
            'files with JSON Schemas of `data`, by event type or shell-style pattern: `{ "order.*" = '
            '"schemas/order.json" }`; see [schemas](sources.md#schemas). Needs the extra `schemas`'
        ),
    ] = {}
    retention: Annotated[
        SourceRetention,
        _help(
            "retention of this source's events: `events` as in [`[retention]`](#retention), and "
            "`types`, see below"
        ),
    ] = SourceRetention()
    workers: Annotated[
        WorkerRules, _help("rules for the source's workers; missing keys come from `[workers]`")
    ] = WorkerRules()
    keep_refused: Annotated[
        bool, _help("whether its refused requests are kept, see [`[refused]`](#refused)")
    ] = True
    settings: Any = None  # the plugin's Source instance, bound by the loader
    compiled: Any = None  # `relay.schemas.Schemas` of the files in `schemas`, read by the loader


class RefusedConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[refused]`: refused requests that are kept for operators."""

    keep: Annotated[Interval, _help("the time to keep a refused request")] = 7 * 86_400.0
    max_size: Annotated[
        Size,
        _help('maximum total size of the kept requests; the oldest are deleted first. `"0 B"` keeps none'),
    ] = 32 * 2**20


class RetryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`retry = {…}` of a destination."""

    schedule: Annotated[
        tuple[Interval, ...], _help("waits between attempts: 11 attempts in about 76 hours")
    ] = (5, 30, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
    jitter: Annotated[
        float,
        msgspec.Meta(ge=0, le=1),
        _help("the largest random share by which a wait is lengthened, from 0 to 1"),
    ] = 0.1
    max_retry_after: Annotated[Duration, _help("longest wait that a `Retry-After` header can cause")] = 3600.0


class CircuitConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`circuit = {…}` of a destination: when to stop sending attempts, and how often to probe."""

    failures: Annotated[
        int,
        msgspec.Meta(ge=1),
        _help(
            "number of consecutive failures (connection, TLS, DNS, timeout and protocol errors, 429, "
            "5xx) that "
            "opens the circuit; the relay then sends only probes"
        ),
    ] = 10
    probe: Annotated[Interval, _help("wait before the first probe; doubles with each failed probe")] = 30.0
    max_probe: Annotated[Interval, _help("longest wait between probes")] = 300.0


class DestinationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[destinations.NAME]`: one outgoing webhook."""

    name: str
    url: Annotated[
        Url,
        _check(validators.url),
        _help(
            "`http` or `https`, without user name and password; a string, or a secret, of which only "
            "scheme "
            "and host are ever shown"
        ),
    ]
    events: Annotated[
        tuple[Annotated[str, _check(validators.pattern)], ...],
        _help(
            'shell-style patterns of event types; `"!adorn.attire.*"` excludes types. `"*"` does not match '
            'the relay\'s own events; to get these, add `"relay.*"`'
        ),
    ] = ("*",)
    paused: Annotated[
        bool,
        _help(
            "holds the destination's deliveries, for a test before go-live: events are stored and routed, "
            "and nothing is sent until the key is `false` or removed and `relay reload` has run. "
            "`relay destinations resume` does not end this pause"
        ),
    ] = False
    where: Annotated[
        Any,
        _help(
            "[conditions](#conditions) on the event: a table whose conditions must all hold, or a "
            "list of tables of which one must hold"
        ),
    ] = None  # relay.routing.conditions compiles it
    secrets: Annotated[
        tuple[Secret, ...],
        _help(
            "Standard Webhooks secrets, [`whsec_…` or `whsk_…`](#signing-keys); each secret signs. "
            "Without secrets, deliveries are unsigned and the relay logs a warning"
        ),
    ] = ()  # relay.config.tables checks them by `signatures`
    signatures: Annotated[
        tuple[SignatureConfig, ...],
        _help(
            "how deliveries are signed: a list of [schemes](#signature-schemes), by name or as tables; "
            "each of them signs every request"
        ),
    ] = DEFAULT
    format: Annotated[
        str,
        _help(
            "format of the request body: `standard`, `raw`, `cloudevents`, a [message](messages.md) for "
            "`slack`, `discord`, `teams`, `telegram`, `ntfy` or `pagerduty`, or a [plugin's](hooks.md)"
        ),
    ] = "standard"
    template: Annotated[
        Any,
        _help(
            "instead of `format`: a custom [request body](messages.md#request-bodies), as text, a "
            "table or a list with placeholders"
        ),
    ] = None  # relay.formats compiles it
    content_type: Annotated[
        str | None,
        _help("content type of `template`, if it is neither JSON nor plain text"),
    ] = None
    message: Annotated[
        MessageConfig,
        _help("the texts that a [message format](messages.md) shows, and the settings of its service"),
    ] = MessageConfig()
    method: Annotated[Literal["POST", "PUT"], _help('HTTP method: `"POST"` or `"PUT"`')] = "POST"
    headers: Annotated[
        dict[
            Annotated[str, _check(validators.header_name)],
            Annotated[Secret, _check(validators.header_value, literal=True)],
        ],
        _help(
            "additional headers of each request; a value may be a secret, or plain text even without "
            "`development`. The relay sets "
            "`webhook-*`, `host`, `connection`, `content-length` and `transfer-encoding` itself, so they "
            "are "
            "refused here"
        ),
    ] = {}  # values may be secrets, so no value is printed
    timeout: Annotated[Interval, _help("timeout of a whole attempt")] = 15.0
    connect_timeout: Annotated[Interval, _help("timeout for connecting, within `timeout`")] = 5.0
    concurrency: Annotated[
        int, msgspec.Meta(ge=1), _help("maximum number of attempts in flight; 1 sends one at a time")
    ] = 8
    shards: Annotated[
        int,
        msgspec.Meta(ge=1, le=MOST_SHARDS),
        _help(
            "in a cluster, number of [shards](cluster.md#shards) into which the deliveries are divided, so "
            "that several nodes send them at the same time; at most 16"
        ),
    ] = 1
    rate_limit: Annotated[
        Rate | None,
        _help(
            'maximum rate of attempts, such as `"50/s"`; deliveries above the rate wait, which does '
            "not count as an attempt"
        ),
    ] = None
    max_pending: Annotated[
        int,
        msgspec.Meta(ge=1),
        _help(
            "maximum number of pending deliveries; beyond it, a new delivery is dead at once, with the "
            "reason "
            "`backlog_full`, and can be replayed later"
        ),
    ] = 1_000_000
    order_by: Annotated[
        str | None,
        _help(
            'a path such as `"subject"` or `"data.order.id"`: deliveries with the same value are '
            "sent one after another"
        ),
    ] = None
    group_by: Annotated[
        str | tuple[str, ...] | None,
        _help(
            'a path or a list of paths, such as `"data.destination"`: one [message for several '
            "events](messages.md#grouping) with the same values; `[]`: for all events of the destination"
        ),
    ] = None
    group_wait: Annotated[
        Interval, _help("with `group_by`: how long the first event of a group waits for others")
    ] = 30.0
    group_max: Annotated[
        int,
        msgspec.Meta(ge=2, le=1000),
        _help("with `group_by`: maximum number of events in a message; a full group is sent at once"),
    ] = 100
    ttl: Annotated[Interval | None, _help("deliveries older than this expire, also while they are held")] = (
        None
    )
    latest_by: Annotated[
        str | None,
        _help(
            'a path such as `"subject"`: a newer event with the same type and value expires the delivery '
            "of the older event; if that delivery is in flight, it is not retried after a failure"
        ),
    ] = None
    on_dead: Annotated[
        str | None,
        _help(
            "the destination that receives the events of dead deliveries; a cycle is a configuration error"
        ),
    ] = None
    final_statuses: Annotated[
        tuple[Annotated[int, _check(validators.final_status)], ...],
        _help(
            "statuses from 300 to 599, such as `[400, 413]`, that [end a delivery at once](#retries):"
            " dead, reason `final_status`"
        ),
    ] = ()
    disable_after: Annotated[
        Interval,
        _help(
            "if every attempt fails for this long, the destination is disabled and its deliveries are held"
        ),
    ] = 5 * 86_400.0
    retry: RetryConfig = RetryConfig()
    circuit: CircuitConfig = CircuitConfig()
    allow_private: Annotated[bool, _help("permits private, loopback and link-local addresses")] = False
    ca_file: Annotated[
        Annotated[Path, _check(validators.existing_file, reads=True)] | None,
        _help("file with the CA certificates to trust instead of the system's"),
    ] = None
    client_cert: Annotated[ClientCert, _check(validators.client_cert, reads=True)] | None = None
    proxy: Annotated[
        Annotated[Secret, _check(validators.proxy, literal=True)] | None,
        _help(
            "the URL of an [HTTP proxy](#proxies); a string, or a secret if it contains a user name "
            "and password"
        ),
    ] = None  # may hold a password


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of config.toml, checked and with defaults."""

    path: Path  # the file that was read
    included: tuple[Path, ...] = ()  # further files
    origins: dict[str, str] = {}  # of each key that is set; see `relay.config.origins`
    include: Annotated[
        tuple[str, ...],
        _help(
            "[further files](#several-files) of the configuration: names or shell-style patterns, relative "
            "to the folder of the config file"
        ),
    ] = INCLUDED
    state_dir: Annotated[
        Path,
        _help(
            "the folder that the daemon writes to. If the key is not set: `$STATE_DIRECTORY` (set by "
            "systemd), "
            "else the folder of the config file"
        ),
    ]  # absolute; where the daemon writes
    development: Annotated[
        bool, _help("permits plain-text secrets and [substitutes](#secrets); never set it in production")
    ] = False
    server: Server = Server()
    admin: Admin = Admin()
    storage: Storage = Storage()
    retention: Retention = Retention()
    cluster: Cluster = Cluster()
    refused: RefusedConfig = RefusedConfig()
    backup: BackupConfig = BackupConfig()
    log: Log = Log()
    plugins: Plugins = Plugins()
    workers: WorkerRules = WorkerRules()
    sources: dict[str, SourceConfig] = {}
    destinations: dict[str, DestinationConfig] = {}
    warnings: tuple[str, ...] = ()

    @property
    def is_node(self) -> bool:
        """Whether the daemon is a node of a cluster, which other daemons may join."""
        is_shareable = self.storage.url.reveal().partition(":")[0] in validators.POSTGRES
        return is_shareable and self.cluster.enabled is not False
