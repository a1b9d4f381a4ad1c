"""Periodic and long-running work, outside the path of an event from sender to destination."""
