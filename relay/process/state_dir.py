"""The state directory belongs to one daemon at a time: locks that end with its process."""

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from relay.errors import RelayError


class StateDir:
    """Holds the locks from `take` to `release`.

    The directory itself is locked: `relay.lock` can be deleted, and a second daemon would lock a new one.
    The file is locked as well: it tells the process id, and older versions look at nothing else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path / "relay.lock"
        self._folder: int | None = None  # file descriptors
        self._file: int | None = None

    def take(self) -> None:
        """Create the directory if need be and lock it.

        Raises:
            RelayError: another daemon holds it, it cannot be written, or `relay.lock` is no plain file.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._take_folder()
            self._take_file()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let another daemon have it."""
        for descriptor in (self._file, self._folder):
            if descriptor is not None:
                os.close(descriptor)
        self._file = self._folder = None

    def _take_folder(self) -> None:
        assert self._folder is not None  # noqa: S101 - `take` has opened it
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use() from None
        except OSError as error:
            # Some network file systems lock no directories; the file's lock is what there is then.
            if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOTSUP):
                raise self._unusable(error) from error

    def _take_file(self) -> None:
        # Opening must neither follow a link nor wait for the other end of a pipe.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._file = os.open("relay.lock", flags, 0o600, dir_fd=self._folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._odd() from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return  # a full disk: the directory's lock holds
            raise self._unusable(error) from error
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise self._odd()  # what it is linked to would be emptied
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use() from None
        os.ftruncate(self._file, 0)
        with suppress(OSError):  # on a full disk the locks hold all the same
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def _in_use(self) -> RelayError:
        pid = "unknown"
        with suppress(OSError, ValueError):
            descriptor = os.open(
                "relay.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._folder
            )
            try:
                pid = str(int(os.read(descriptor, 20)))
            finally:
                os.close(descriptor)
        return RelayError(
            f"{self.path} is in use by another relay (pid {pid})",
            hint="stop that one first, or give this one a state_dir of its own",
        )

    def _odd(self) -> RelayError:
        return RelayError(
            f"{self._lock} is not a plain file of its own: a link, a directory, a pipe or a device",
            hint=f"look who made it (ls -l {self._lock}), then remove it: no relay keeps anything in it",
        )

    def _unusable(self, error: OSError) -> RelayError:
        return RelayError(
            f"cannot write to the state directory {self.path}: {error.strerror}",
            hint="set state_dir in config.toml to a directory that this user may write to",
        )
