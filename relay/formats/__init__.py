"""Formats: how an event is rendered as the body of a delivery."""

from collections.abc import Mapping

from relay.formats.envelope import ENVELOPES, Format
from relay.formats.services import SERVICES

__all__ = ["FORMATS", "Format"]

FORMATS: Mapping[str, Format] = {each.name: each for each in (*ENVELOPES, *SERVICES)}
"""Every format by its name in config.toml."""
