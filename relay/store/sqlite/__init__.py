"""The store in one SQLite file: `relay.store.sqlite.store.SqliteStore`."""
