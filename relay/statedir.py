"""The state directory belongs to one daemon at a time: a lock that dies with its process."""

import fcntl
import os
from pathlib import Path

from relay.errors import RelayError


class StateDir:
    """Holds the lock from `take` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path / "relay.lock"
        self._fd: int | None = None

    def take(self) -> None:
        """Create the directory if need be and lock it.

        Raises:
            RelayError: another daemon holds it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RelayError(
                f"cannot write to the state directory {self.path}: {error.strerror}",
                hint="set state_dir in config.toml to a directory that this user may write to",
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(fd, 20).decode().strip() or "unknown"
            os.close(fd)
            raise RelayError(
                f"{self.path} is in use by another relay (pid {pid})",
                hint="stop that one first, or give this one a state_dir of its own",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """Let another daemon have it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def free_bytes(self) -> int:
        """Return the free space that this user may still fill."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize
