"""Finds plugins, registers their sources, formats, jobs and hooks, and binds their settings."""
