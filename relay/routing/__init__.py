"""Routing: which destinations get an event."""
