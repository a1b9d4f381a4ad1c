"""Finds plugins, asks pluggy what they offer, and binds their settings."""
