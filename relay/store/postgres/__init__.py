"""The store in PostgreSQL. Several daemons may share it."""
