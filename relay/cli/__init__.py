"""The `relay` command line. `relay.cli:main` is the entry point."""

from relay.cli.main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
