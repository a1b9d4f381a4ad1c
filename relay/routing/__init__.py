"""Decides which destinations get an event, and on which terms."""
