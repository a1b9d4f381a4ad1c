"""The tables, as a list of migrations; the row `version` of `meta` has the number of those that ran.

The row `least` has the schema version that a program must know to use the tables, and `program` the version
of the program that migrated them.

Pending deliveries are rows of `owed`, and nothing else is pending. `deliveries`, `ends` and `attempts` are
written once and never changed, so their pages stay full and vacuum has nothing to do there. Texts are
compared as bytes (COLLATE "C"), as in SQLite. There are no foreign keys: one statement writes an event with
everything that belongs to it.
"""

from relay.errors import StorageError
from relay.store.postgres.connection import Address, Connection, database_advice
from relay.store.postgres.rows import EPOCH

FOREIGN_SQL = """
    SELECT to_regclass('meta') IS NULL
           AND (to_regclass('events') IS NOT NULL OR to_regclass('deliveries') IS NOT NULL)
"""

PARTITIONED = ("events", "deliveries", "ends", "attempts")
"""Tables with one partition a day, by ranges of their first column."""

EVENTS = f"""
CREATE TABLE events (
    id           bigint  PRIMARY KEY,          -- see relay.store.postgres.rows
    public_id    uuid    NOT NULL,             -- of evt_ + UUIDv7
    source       text    COLLATE "C" NOT NULL,
    type         text    COLLATE "C" NOT NULL, -- full: source name and type
    subject      text    COLLATE "C",
    received_at  bigint  NOT NULL,             -- microseconds UTC
    content_type text    COLLATE "C" NOT NULL,
    traceparent  text    COLLATE "C",
    sha256       bytea   NOT NULL,             -- of the body, verified before it is forwarded
    size         integer NOT NULL,             -- bytes of the body
    context      bytea   NOT NULL,             -- JSON
    data_at      integer,                      -- position and length of the data in the body,
    data_size    integer,                      --   so that it is not stored twice
    data         bytea,                        -- only if it is not part of the body
    body         bytea   NOT NULL
) PARTITION BY RANGE (id);
CREATE INDEX events_public ON events (public_id);
CREATE INDEX events_source ON events (source, id);
CREATE INDEX events_type ON events (type, id);
CREATE INDEX events_subject ON events (subject, id) WHERE subject IS NOT NULL;
-- Nearly empty: events whose time of receipt differs from the time in their row id.
CREATE INDEX events_early ON events (received_at)
    WHERE received_at > (id >> 22) * 1000 + 1000 + {EPOCH};
CREATE INDEX events_late ON events (received_at)
    WHERE received_at < (id >> 22) * 1000 + {EPOCH} - 60000000;

CREATE TABLE repetitions (
    event_id bigint  PRIMARY KEY,
    requests integer NOT NULL                  -- that repeated the event
);
"""

DELIVERIES = """
CREATE TABLE deliveries (
    id          bigint PRIMARY KEY,
    public_id   uuid   NOT NULL,               -- of dlv_ + UUIDv7
    event_id    bigint NOT NULL,
    destination text   COLLATE "C" NOT NULL,
    created_at  bigint NOT NULL,
    order_key   text   COLLATE "C",            -- deliveries of a key are sent one after another
    latest_key  text   COLLATE "C",            -- a newer event with the key expires older ones
    expires_at  bigint,                        -- steady clock
    on_dead     text   COLLATE "C",            -- destination that gets the event of a dead delivery
    replay_of   bigint,                        -- the delivery that an operator repeated
    group_key   text   COLLATE "C"             -- deliveries of a key are sent together
) PARTITION BY RANGE (id);
CREATE INDEX deliveries_public ON deliveries (public_id);
CREATE INDEX deliveries_event ON deliveries (event_id, id);
CREATE INDEX deliveries_destination ON deliveries (destination, id);
-- Small: deliveries more than a day after their event, by replays and hand-overs (86,400,000 ms << 22).
CREATE INDEX deliveries_later ON deliveries (event_id, id) WHERE id - event_id > 362387865600000;

CREATE TABLE ends (                            -- how deliveries ended
    delivery_id bigint  PRIMARY KEY,
    event_id    bigint  NOT NULL,
    destination text    COLLATE "C" NOT NULL,
    state       text    COLLATE "C" NOT NULL
                CHECK (state IN ('delivered', 'dead', 'expired', 'cancelled')),
    reason      text    COLLATE "C",           -- of the end, unless delivered
    attempts    integer NOT NULL,
    finished_at bigint  NOT NULL,
    last_status integer,
    last_error  text    COLLATE "C"
) PARTITION BY RANGE (delivery_id);
CREATE INDEX ends_bad ON ends (destination, state, delivery_id) WHERE state <> 'delivered';
CREATE INDEX ends_repeat ON ends (state, event_id) WHERE state <> 'delivered';
CREATE INDEX ends_lost ON ends (destination, state, event_id) WHERE state <> 'delivered';

CREATE TABLE attempts (
    id          bigint  PRIMARY KEY,
    delivery_id bigint  NOT NULL,
    started_at  bigint  NOT NULL,
    duration_ms double precision NOT NULL,
    result      text    COLLATE "C" NOT NULL,
    status      integer,
    error       text    COLLATE "C",
    truncated   boolean NOT NULL,
    group_id    text    COLLATE "C",           -- of the message for several deliveries
    group_size  integer,
    answer      bytea   NOT NULL               -- first 16 KiB of the response
) PARTITION BY RANGE (id);
CREATE INDEX attempts_delivery ON attempts (delivery_id, id);
CREATE INDEX attempts_started ON attempts (started_at, id);

CREATE TABLE owed (                            -- the queue: every pending delivery, and nothing else
    id              bigint  PRIMARY KEY,
    public_id       uuid    NOT NULL,
    event_id        bigint  NOT NULL,
    destination     text    COLLATE "C" NOT NULL,
    attempts        integer NOT NULL DEFAULT 0,
    created_at      bigint  NOT NULL,
    size            integer NOT NULL,          -- bytes of the event's body
    next_attempt_at bigint,                    -- steady clock; NULL: it waits behind one of its order key
    order_key       text    COLLATE "C",
    latest_key      text    COLLATE "C",
    expires_at      bigint,
    on_dead         text    COLLATE "C",
    replay_of       bigint,
    group_key       text    COLLATE "C",
    last_status     integer,
    last_error      text    COLLATE "C"
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_cost_delay = 0,
        parallel_workers = 0);
-- First attempts and retries are claimed separately, so that neither can starve the other.
CREATE INDEX owed_first ON owed (destination, next_attempt_at, id) WHERE attempts = 0;
CREATE INDEX owed_retry ON owed (destination, next_attempt_at, id) WHERE attempts > 0;
CREATE INDEX owed_event ON owed (event_id);
CREATE INDEX owed_order ON owed (destination, order_key, id) WHERE order_key IS NOT NULL;
CREATE INDEX owed_latest ON owed (destination, latest_key, id) WHERE latest_key IS NOT NULL;
CREATE INDEX owed_expiry ON owed (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX owed_group ON owed (destination, group_key, next_attempt_at) WHERE group_key IS NOT NULL;

CREATE TABLE order_keys (                      -- locked before the next delivery of a key becomes due
    destination text    COLLATE "C",
    order_key   text    COLLATE "C",
    pending     integer NOT NULL,
    PRIMARY KEY (destination, order_key)
) WITH (fillfactor = 70);

CREATE TABLE ledger (                          -- a row per node, so that commits of nodes do not wait
    slot        integer,
    destination text    COLLATE "C",
    created     bigint  NOT NULL,
    delivered   bigint  NOT NULL,
    dead        bigint  NOT NULL,
    expired     bigint  NOT NULL,
    cancelled   bigint  NOT NULL,
    PRIMARY KEY (slot, destination)
) WITH (fillfactor = 50, parallel_workers = 0);

CREATE TABLE destinations (
    name            text    COLLATE "C" PRIMARY KEY,
    paused          boolean NOT NULL DEFAULT false,
    paused_until    bigint,                    -- steady clock; NULL: no end
    failing_since   bigint,
    disabled_at     bigint,
    disabled_reason text    COLLATE "C"
);

CREATE TABLE sources (
    name   text    COLLATE "C" PRIMARY KEY,
    paused boolean NOT NULL
);

CREATE TABLE held (                            -- destinations that accept nothing at the moment
    destination text    COLLATE "C" PRIMARY KEY,
    since       bigint  NOT NULL,              -- steady clock
    warned      boolean NOT NULL DEFAULT false -- whether the operator was warned that deliveries will expire
);
"""

WORKERS = """
CREATE TABLE workers (
    source         text   COLLATE "C",
    id             text   COLLATE "C",
    version        bigint NOT NULL DEFAULT 0,  -- id of the last transaction; see workers.py
    status         text   COLLATE "C" NOT NULL CHECK (status IN ('ONLINE', 'OFFLINE', 'MAINTENANCE')),
    last_heartbeat bigint NOT NULL,            -- wall clock, for display
    deadline       bigint NOT NULL,            -- steady clock
    record         bytea  NOT NULL,            -- the whole row as JSON
    PRIMARY KEY (source, id)
) WITH (fillfactor = 70);

CREATE TABLE worker_metrics (                  -- at most one row per worker and minute
    source        text   COLLATE "C",
    worker_id     text   COLLATE "C",
    at            bigint,                      -- wall clock
    status        text   COLLATE "C" NOT NULL,
    cpu           double precision,
    memory        double precision,
    uptime        double precision,
    message_count bigint,
    sessions      bytea  NOT NULL,             -- JSON: counts by status
    PRIMARY KEY (source, worker_id, at)
);
CREATE INDEX worker_metrics_at ON worker_metrics (at);

CREATE TABLE worker_commands (
    public_id  text   COLLATE "C" PRIMARY KEY, -- cmd_ + UUIDv7
    source     text   COLLATE "C" NOT NULL,
    worker_id  text   COLLATE "C" NOT NULL,
    state      text   COLLATE "C" NOT NULL CHECK (state IN ('queued', 'sent', 'expired', 'cancelled')),
    created_at bigint NOT NULL,
    expires_at bigint NOT NULL,                -- steady clock
    sent_at    bigint,
    body       bytea  NOT NULL                 -- JSON
);
CREATE INDEX worker_commands_worker ON worker_commands (source, worker_id, created_at);
CREATE INDEX worker_commands_ended ON worker_commands (created_at) WHERE state <> 'queued';
CREATE INDEX worker_commands_queued ON worker_commands (expires_at) WHERE state = 'queued';
"""

OTHERS = """
CREATE TABLE dedupe (
    source     text   COLLATE "C",
    key        text   COLLATE "C",
    identity   bytea,                          -- of the request, see relay.store.dedupe; empty: any
    event_id   uuid   NOT NULL,                -- of the first event
    expires_at bigint NOT NULL,                -- steady clock
    PRIMARY KEY (source, key, identity)
) WITH (parallel_workers = 0);
CREATE INDEX dedupe_expires ON dedupe (expires_at);

CREATE TABLE stats (                           -- outlives the events that it counts; a row per node
    slot       integer,
    hour       bigint,                         -- its beginning, microseconds UTC
    source     text   COLLATE "C",
    type       text   COLLATE "C",
    events     bigint NOT NULL,
    duplicates bigint NOT NULL,                -- requests that repeated a stored event
    bytes      bigint NOT NULL,                -- of bodies
    PRIMARY KEY (hour, source, type, slot)
) WITH (fillfactor = 70, parallel_workers = 0);

CREATE TABLE nodes (
    incarnation   uuid    PRIMARY KEY,         -- new at each start of a daemon
    slot          integer UNIQUE,              -- number of the node in row ids
    name          text    NOT NULL,
    version       text    NOT NULL,
    schema        integer NOT NULL,
    config_digest bytea,
    destinations  text[],
    internal_url  text,
    started       timestamptz NOT NULL,
    seen          timestamptz NOT NULL
);

CREATE TABLE leases (
    name        text        COLLATE "C" PRIMARY KEY,
    incarnation uuid,
    epoch       bigint      NOT NULL DEFAULT 0,           -- grows whenever the lease changes hands
    until       timestamptz NOT NULL DEFAULT '-infinity',
    standing    jsonb
) WITH (fillfactor = 50);

CREATE TABLE requests (                        -- of operators, for the node that owns a lane
    id          uuid        PRIMARY KEY,
    destination text        COLLATE "C" NOT NULL,
    verb        text        NOT NULL,
    argument    bytea       NOT NULL,
    asked       timestamptz NOT NULL DEFAULT clock_timestamp(),
    taken       timestamptz,
    answered    timestamptz,
    answer      bytea,
    error       text
);

CREATE TABLE refused (                         -- requests that were refused, without tokens
    id         bigint  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    public_id  text    COLLATE "C" NOT NULL UNIQUE,
    at         bigint  NOT NULL,               -- wall clock
    source     text    COLLATE "C",            -- NULL: no source owns the path
    reason     text    COLLATE "C" NOT NULL,
    size       bigint  NOT NULL,               -- bytes of head and body
    retried_at bigint,
    event_id   text    COLLATE "C",            -- public id of the event that a retry stored
    head       bytea   NOT NULL,               -- the request without its body, as JSON
    body       bytea                           -- NULL: not kept
);
CREATE INDEX refused_source ON refused (source, id);
CREATE INDEX refused_reason ON refused (reason, id);

CREATE TABLE logins (                          -- to the dashboard, and the codes that begin them
    digest     bytea   PRIMARY KEY,            -- of the cookie or the code
    name       text    NOT NULL,               -- of the operator
    scope      text    NOT NULL,
    binding    bytea,                          -- digest that includes an admin token; NULL: no token
    created_at bigint  NOT NULL,               -- wall clock
    seen_at    bigint  NOT NULL                -- wall clock: about its latest use
);

CREATE TABLE audit (                           -- changes over the admin API
    id         bigint  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at         bigint  NOT NULL,               -- wall clock
    operator   text    COLLATE "C" NOT NULL,
    access     text    NOT NULL,               -- how the operator proved the name
    remote     text    NOT NULL,
    method     text    NOT NULL,
    path       text    NOT NULL,
    body       text    NOT NULL,
    status     integer,                        -- NULL: the client disconnected
    request_id text    NOT NULL,
    node       text    NOT NULL
);
"""

META = """
CREATE TABLE IF NOT EXISTS meta (name text COLLATE "C" PRIMARY KEY, value text NOT NULL);
"""

SHARED = """
ALTER TABLE nodes ADD COLUMN flushed bigint;   -- steady clock: all heartbeats until then are in `workers`

CREATE TABLE unheard (                         -- requests whose replies did not reach their senders
    digest    bytea       PRIMARY KEY,
    event_ids text        NOT NULL,            -- public ids, separated by spaces
    expires   timestamptz NOT NULL
) WITH (parallel_workers = 0);
"""

SHARDS = """
ALTER TABLE owed ADD COLUMN slot smallint;     -- see relay.base.shards; NULL: its destination has no shards
CREATE INDEX owed_shard_first ON owed (destination, slot, next_attempt_at, id)
    WHERE attempts = 0 AND slot IS NOT NULL;
CREATE INDEX owed_shard_retry ON owed (destination, slot, next_attempt_at, id)
    WHERE attempts > 0 AND slot IS NOT NULL;
ALTER TABLE nodes ADD COLUMN shards jsonb;     -- numbers of shards in its config, by destination
"""

CEILINGS = """
ALTER TABLE ledger ADD COLUMN ceiling bigint;  -- for `created`, see backlog.py; NULL: the node has none
"""

PLACES = """
ALTER TABLE nodes ADD COLUMN place text;       -- of its state folder, see relay.store.postgres.owner
ALTER TABLE nodes ADD COLUMN definitions jsonb; -- digests by destination, '' for jobs
ALTER TABLE leases ADD COLUMN definition text; -- of the node that held it last
ALTER TABLE leases ADD COLUMN place text;      -- of that node
"""

FORMER = """
ALTER TABLE nodes ADD COLUMN former jsonb;     -- digests before reloads of its config, as `definitions`
"""

CIRCUITS = """
ALTER TABLE destinations ADD COLUMN circuit_opened text; -- reason, as reported to operators; NULL: closed
"""

MIGRATIONS: tuple[str, ...] = (
    EVENTS + DELIVERIES + WORKERS + OTHERS,
    SHARED,
    SHARDS,
    CEILINGS,
    PLACES,
    FORMER,
    CIRCUITS,
)
"""Each runs in one transaction; never edit one that has been released, append another.

Nodes of the previous version run while the first node of a new version migrates the tables, and such a node
may start again afterwards. So a migration only adds: tables, nullable columns or columns with a default, and
indexes of small tables. What a version no longer uses, a later version removes: see `REMOVALS`."""

REMOVALS: dict[int, int] = {}
"""Migrations that remove something, by number, with the schema version that a program must know afterwards.

Such a migration waits until no node of an older version runs. The program works without it as well, and no
migration of the same version follows it."""


def problem_of(version: int, least: int) -> str | None:
    """Return why this program cannot use tables with a schema version; None: it can.

    `least` is the version that a program must know to use them.
    """
    known = len(MIGRATIONS)
    if least > known:
        return (
            f"its tables have schema version {version} and need a program that knows version {least}; "
            f"this one knows {known}"
        )
    needed = max(number for number in range(1, known + 1) if number not in REMOVALS)
    if version < needed:
        return f"its tables have schema version {version}, this program needs {needed}"
    return None


async def refuse_unsuitable(connection: Connection, address: Address) -> None:
    """Check that a database can have the relay's tables.

    Raises:
        StorageError: it has another encoding, or tables of another program.
    """
    encoding = await connection.value("SELECT current_setting('server_encoding')")
    if encoding != "UTF8":
        raise StorageError(
            f"{address.location} has the encoding {encoding}, the relay needs UTF8",
            hint=database_advice(address, "NAME"),
        )
    if await connection.value(FOREIGN_SQL):
        raise StorageError(
            f"{address.location} has tables named events or deliveries that belong to another program",
            hint="use a separate database or schema for the relay",
        )
