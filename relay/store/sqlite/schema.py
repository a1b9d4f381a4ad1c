"""The tables, as a list of migrations under `PRAGMA user_version`: its length is the version."""

EVENTS = """
CREATE TABLE events (
    id           INTEGER PRIMARY KEY,          -- order of acceptance
    public_id    TEXT    NOT NULL UNIQUE,      -- evt_ + UUIDv7
    source       TEXT    NOT NULL,
    type         TEXT    NOT NULL,             -- full: source name and type
    subject      TEXT,
    received_at  INTEGER NOT NULL,             -- microseconds UTC
    content_type TEXT    NOT NULL,
    traceparent  TEXT,
    sha256       BLOB    NOT NULL,             -- of the body, verified before it is forwarded
    size         INTEGER NOT NULL,             -- bytes of the body
    context      BLOB    NOT NULL,             -- JSON
    data_at      INTEGER,                      -- where in the body the data stands, and how long it is,
    data_size    INTEGER,                      --   so that it is not stored twice
    data         BLOB,                         -- only where it does not stand in the body
    body         BLOB    NOT NULL              -- last: a list never reads its overflow pages
) STRICT;
CREATE INDEX events_source ON events (source, id);
CREATE INDEX events_type ON events (type, id);
CREATE INDEX events_subject ON events (subject, id) WHERE subject IS NOT NULL;
CREATE INDEX events_received ON events (received_at);  -- its entries come in order: cheap
"""

DELIVERIES = """
CREATE TABLE deliveries (
    id              INTEGER PRIMARY KEY,
    public_id       TEXT    NOT NULL UNIQUE,   -- dlv_ + UUIDv7
    event_id        INTEGER NOT NULL REFERENCES events (id),
    destination     TEXT    NOT NULL,
    state           TEXT    NOT NULL DEFAULT 'pending'
                    CHECK (state IN ('pending', 'delivered', 'dead', 'expired', 'cancelled')),
    reason          TEXT,                      -- why it ended, unless delivered
    attempts        INTEGER NOT NULL DEFAULT 0,
    created_at      INTEGER NOT NULL,
    next_attempt_at INTEGER,                   -- steady clock; only while pending
    finished_at     INTEGER,
    last_status     INTEGER,
    last_error      TEXT,
    order_key       TEXT,                      -- only the oldest pending one of a key has a due time
    latest_key      TEXT,                      -- a newer one of the key expires the older
    expires_at      INTEGER,                   -- steady clock
    on_dead         TEXT,                      -- destination to hand the event to
    replay_of       INTEGER                    -- the delivery that an operator had repeated
) STRICT;
-- First attempts and retries are claimed apart, so that neither can starve the other.
CREATE INDEX deliveries_first ON deliveries (destination, next_attempt_at, id)
    WHERE state = 'pending' AND attempts = 0;
CREATE INDEX deliveries_retry ON deliveries (destination, next_attempt_at, id)
    WHERE state = 'pending' AND attempts > 0;
CREATE INDEX deliveries_order ON deliveries (destination, order_key, id)
    WHERE state = 'pending' AND order_key IS NOT NULL;
CREATE INDEX deliveries_latest ON deliveries (destination, latest_key, id)
    WHERE state = 'pending' AND latest_key IS NOT NULL;
CREATE INDEX deliveries_expiry ON deliveries (expires_at)
    WHERE state = 'pending' AND expires_at IS NOT NULL;
CREATE INDEX deliveries_event ON deliveries (event_id);
CREATE INDEX deliveries_ended ON deliveries (destination, state, id)
    WHERE state IN ('dead', 'expired', 'cancelled');
CREATE INDEX deliveries_repeat ON deliveries (state, event_id, destination)
    WHERE state IN ('dead', 'expired', 'cancelled');

CREATE TABLE attempts (
    id          INTEGER PRIMARY KEY,
    delivery_id INTEGER NOT NULL REFERENCES deliveries (id) ON DELETE CASCADE,
    started_at  INTEGER NOT NULL,
    duration_ms REAL    NOT NULL,
    result      TEXT    NOT NULL,
    status      INTEGER,
    error       TEXT,
    truncated   INTEGER NOT NULL,
    answer      BLOB    NOT NULL               -- first 16 KiB
) STRICT;
CREATE INDEX attempts_delivery ON attempts (delivery_id, id);
CREATE INDEX attempts_started ON attempts (started_at);  -- its entries come in order: cheap

CREATE TABLE ledger (                          -- created = all the others + pending
    destination TEXT    PRIMARY KEY,
    created     INTEGER NOT NULL,
    delivered   INTEGER NOT NULL,
    dead        INTEGER NOT NULL,
    expired     INTEGER NOT NULL,
    cancelled   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE destinations (
    name            TEXT    PRIMARY KEY,
    paused          INTEGER NOT NULL DEFAULT 0,
    failing_since   INTEGER,
    disabled_at     INTEGER,
    disabled_reason TEXT
) STRICT, WITHOUT ROWID;

CREATE TABLE sources (
    name   TEXT    PRIMARY KEY,
    paused INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""

HELD = """
CREATE TABLE held (                            -- destinations that accept nothing at the moment
    destination TEXT    PRIMARY KEY,
    since       INTEGER NOT NULL,              -- steady clock
    told        INTEGER NOT NULL DEFAULT 0     -- whether the operator was warned that deliveries will expire
) STRICT, WITHOUT ROWID;
"""

WORKERS = """
CREATE TABLE workers (
    source          TEXT    NOT NULL,
    id              TEXT    NOT NULL,
    status          TEXT    NOT NULL CHECK (status IN ('ONLINE', 'OFFLINE', 'MAINTENANCE')),
    last_heartbeat  INTEGER NOT NULL,          -- wall clock, for display
    deadline        INTEGER NOT NULL,          -- steady clock
    record          BLOB    NOT NULL,          -- the whole row as JSON
    PRIMARY KEY (source, id)
) STRICT, WITHOUT ROWID;

CREATE TABLE worker_metrics (                  -- at most one row per worker and minute
    source        TEXT    NOT NULL,
    worker_id     TEXT    NOT NULL,
    at            INTEGER NOT NULL,            -- wall clock
    status        TEXT    NOT NULL,
    cpu           REAL,
    memory        REAL,
    uptime        REAL,
    message_count INTEGER,
    sessions      BLOB    NOT NULL,            -- JSON: counts by status
    PRIMARY KEY (source, worker_id, at)
) STRICT, WITHOUT ROWID;
CREATE INDEX worker_metrics_at ON worker_metrics (at);

CREATE TABLE worker_commands (
    public_id  TEXT    PRIMARY KEY,            -- cmd_ + UUIDv7
    source     TEXT    NOT NULL,
    worker_id  TEXT    NOT NULL,
    state      TEXT    NOT NULL CHECK (state IN ('queued', 'sent', 'expired', 'cancelled')),
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,               -- steady clock
    sent_at    INTEGER,
    body       BLOB    NOT NULL                -- JSON
) STRICT, WITHOUT ROWID;
CREATE INDEX worker_commands_worker ON worker_commands (source, worker_id, created_at);
CREATE INDEX worker_commands_ended ON worker_commands (created_at) WHERE state <> 'queued';
CREATE INDEX worker_commands_queued ON worker_commands (expires_at) WHERE state = 'queued';
"""

DEDUPE = """
CREATE TABLE dedupe (
    source     TEXT    NOT NULL,
    key        TEXT    NOT NULL,
    event_id   TEXT    NOT NULL,               -- public id of the first event
    expires_at INTEGER NOT NULL,
    PRIMARY KEY (source, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX dedupe_expires ON dedupe (expires_at);
"""

STATS = """
CREATE TABLE stats (                           -- outlives the events that it counts
    hour       INTEGER NOT NULL,               -- its beginning, microseconds UTC
    source     TEXT    NOT NULL,
    type       TEXT    NOT NULL,
    events     INTEGER NOT NULL,
    duplicates INTEGER NOT NULL,               -- requests that repeated a stored event
    bytes      INTEGER NOT NULL,               -- of bodies
    PRIMARY KEY (hour, source, type)
) STRICT, WITHOUT ROWID;
"""

META = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""

LISTS = """
CREATE TABLE event_times (                     -- see relay.store.times
    block INTEGER PRIMARY KEY,                 -- of 1,024 row ids of events
    first INTEGER NOT NULL,                    -- microseconds UTC: none of them came in earlier,
    last  INTEGER NOT NULL                     --   and none later
) STRICT;
INSERT INTO event_times SELECT id >> 10, min(received_at), max(received_at) FROM events GROUP BY 1;

CREATE TABLE repetitions (                     -- apart from the events: it changes, and they never do
    event_id INTEGER PRIMARY KEY REFERENCES events (id) ON DELETE CASCADE,
    requests INTEGER NOT NULL                  -- that repeated it
) STRICT;

-- Its entries come in order: cheap. Only statements that say `id > 0` see it: the planner knows too little
-- to be left the choice between it and the index that the others mean.
CREATE INDEX deliveries_destination ON deliveries (destination, id) WHERE id > 0;
CREATE INDEX deliveries_lost ON deliveries (destination, state, event_id)
    WHERE state IN ('dead', 'expired', 'cancelled');
"""

IDENTITIES = """
CREATE TABLE identities (
    source     TEXT    NOT NULL,
    key        TEXT    NOT NULL,
    identity   BLOB    NOT NULL,               -- of the request, see relay.store.dedupe
    event_id   TEXT    NOT NULL,               -- public id of the first event
    expires_at INTEGER NOT NULL,
    PRIMARY KEY (source, key, identity)
) STRICT, WITHOUT ROWID;
INSERT INTO identities                         -- of older requests the body alone is known
     SELECT d.source, d.key, e.sha256, d.event_id, d.expires_at
       FROM dedupe AS d JOIN events AS e ON e.public_id = d.event_id;
DROP TABLE dedupe;
ALTER TABLE identities RENAME TO dedupe;
CREATE INDEX dedupe_expires ON dedupe (expires_at);
"""

GROUPS = """
ALTER TABLE deliveries ADD COLUMN group_key TEXT;      -- pending ones of a key go out together; NULL: alone
CREATE INDEX deliveries_group ON deliveries (destination, group_key, next_attempt_at)
    WHERE state = 'pending' AND group_key IS NOT NULL;
ALTER TABLE attempts ADD COLUMN group_id TEXT;         -- of the message that told of several deliveries
ALTER TABLE attempts ADD COLUMN group_size INTEGER;    -- how many
"""

PAUSES = """
ALTER TABLE destinations ADD COLUMN paused_until INTEGER;  -- steady clock; NULL: until an operator resumes
"""

REFUSED = """
CREATE TABLE refused (                         -- requests that were refused, without tokens
    id         INTEGER PRIMARY KEY,
    public_id  TEXT    NOT NULL UNIQUE,        -- ref_ + UUIDv7
    at         INTEGER NOT NULL,               -- wall clock
    source     TEXT,                           -- NULL: no source owns the path
    reason     TEXT    NOT NULL,
    size       INTEGER NOT NULL,               -- bytes of head and body
    retried_at INTEGER,
    event_id   TEXT,                           -- public id of the event that a retry stored
    head       BLOB    NOT NULL,               -- the request without its body, as JSON
    body       BLOB                            -- NULL: not kept
) STRICT;
CREATE INDEX refused_source ON refused (source, id);
CREATE INDEX refused_reason ON refused (reason, id);
"""

OPERATORS = """
CREATE TABLE logins (                          -- to the dashboard, and the codes that begin them
    digest     BLOB    PRIMARY KEY,            -- of the cookie or the code
    name       TEXT    NOT NULL,               -- of the operator
    scope      TEXT    NOT NULL,
    binding    BLOB,                           -- digest that includes an admin token; NULL: no token
    created_at INTEGER NOT NULL,               -- wall clock
    seen_at    INTEGER NOT NULL                -- wall clock: about its latest use
) STRICT, WITHOUT ROWID;
CREATE TABLE audit (                           -- changes over the admin API
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    at         INTEGER NOT NULL,               -- wall clock
    operator   TEXT    NOT NULL,
    access     TEXT    NOT NULL,               -- how the operator proved the name
    remote     TEXT    NOT NULL,
    method     TEXT    NOT NULL,
    path       TEXT    NOT NULL,
    body       TEXT    NOT NULL,
    status     INTEGER,                        -- NULL: the client disconnected
    request_id TEXT    NOT NULL,
    node       TEXT    NOT NULL
) STRICT;
"""

CIRCUITS = """
ALTER TABLE destinations ADD COLUMN circuit_opened TEXT;  -- reason, as reported to operators; NULL: closed
"""

MIGRATIONS: tuple[str, ...] = (
    EVENTS + DELIVERIES + HELD + WORKERS + DEDUPE + STATS + META,
    LISTS,
    IDENTITIES,
    GROUPS,
    PAUSES,
    REFUSED,
    OPERATORS,
    CIRCUITS,
)
"""Each runs in one transaction; never edit one that has been released, append another."""
