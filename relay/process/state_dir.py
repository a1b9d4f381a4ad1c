"""Locks the state directory, so that only one daemon uses it; the locks end with the process."""

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from relay.errors import RelayError


def obstacle(path: Path) -> RelayError | None:
    """Return why a path cannot be a state directory for any user; None: it is one, or can be created."""
    other = "set state_dir in config.toml to a directory"
    for place in (path, *path.parents):
        try:
            if not place.is_symlink() and not place.exists():
                continue
            if place.is_dir():
                return None
        except PermissionError:
            return None
        except OSError as error:
            too_long = error.errno == errno.ENAMETOOLONG
            hint = "set state_dir in config.toml to a shorter path" if too_long else other
            return RelayError(f"the state directory {path} cannot be used: {error.strerror}", hint=hint)
        if place.exists():
            what, hint = f"{place} is not a directory", f"move {place} away, or {other}"
        else:
            target = place.readlink()
            what = f"{place} is a link to {target}, which does not exist"
            hint = f"create {place.parent / target}, or {other}"
        return RelayError(f"the state directory {path} cannot be used: {what}", hint=hint)
    return None


class StateDir:
    """Holds the locks from `take` to `release`.

    The directory itself is locked, because `relay.lock` can be deleted, and a second daemon would then lock a
    new file. The file is locked as well: it contains the process id, and older versions check only the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path / "relay.lock"
        self._folder: int | None = None  # file descriptors
        self._file: int | None = None

    def take(self) -> None:
        """Create the directory if necessary and lock it.

        Raises:
            RelayError: another daemon uses it, it is not a directory, its path is too long, it is not
                writable, or `relay.lock` is not a regular file.
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
        """Release the locks."""
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
            # Some network file systems cannot lock directories; then only the file is locked.
            if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOTSUP):
                raise self._unusable(error) from error

    def _take_file(self) -> None:
        # Opening must not follow a link, and must not block on a pipe.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._file = os.open("relay.lock", flags, 0o600, dir_fd=self._folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._odd() from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return  # the disk is full: the directory's lock suffices
            raise self._unusable(error) from error
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise self._odd()  # truncating it would empty another file
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use() from None
        os.ftruncate(self._file, 0)
        with suppress(OSError):  # on a full disk, the locks suffice
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
            f"{self.path} is in use by another relay daemon (pid {pid})",
            hint="stop that daemon first, or set another state_dir in config.toml",
        )

    def _odd(self) -> RelayError:
        return RelayError(
            f"{self._lock} is not a regular file, but a link, a directory, a pipe or a device",
            hint=f"check its owner (ls -l {self._lock}), then remove it; the relay stores no data in it",
        )

    def _unusable(self, error: OSError) -> RelayError:
        return obstacle(self.path) or RelayError(
            f"cannot write to the state directory {self.path}: {error.strerror}",
            hint="set state_dir in config.toml to a directory that this user may write to",
        )
