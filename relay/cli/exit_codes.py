"""How a command ends when it is not well: each exit code means one thing, in every command."""

from relay.config.problems import UnreadableError
from relay.errors import RelayError

FAILED = 1  # it did not work, or found problems
UNREACHABLE = 3  # no relay answers
NOTHING = 4  # what was named is not there
NOT_ALLOWED = 5
BATCH = 6  # part of a batch failed
CONFIG = 78  # `relay serve`: config.toml cannot be used (EX_CONFIG), so starting it again is of no use
INTERRUPTED = 130  # by Ctrl-C, as shells have it


class CommandError(RelayError):
    """A command failed in a way that has an exit code of its own."""

    def __init__(self, message: str, *, hint: str = "", code: int = FAILED) -> None:
        super().__init__(message, hint=hint)
        self.code = code


def code_of(error: RelayError) -> int:
    """Return the exit code of a command that ends with an error."""
    if isinstance(error, CommandError):
        return error.code
    return NOT_ALLOWED if isinstance(error, UnreadableError) else FAILED
