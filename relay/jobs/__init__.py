"""Periodic and long-running work beside the event's way."""
