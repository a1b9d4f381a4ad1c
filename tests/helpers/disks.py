"""Small disks for tests: real file systems of some MiB, which fill up as real ones do."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


class SmallDisk:
    """A mounted file system, and a file on it that takes room from everybody else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "somebody-elses"

    @property
    def free(self) -> int:
        """Bytes that may still be written."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def fill(self, leaving: int = 0) -> None:
        """Take all room but so many bytes."""
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            while (size := self.free - leaving) > 0:
                if not file.write(b"\0" * min(size, 2**20)):
                    break

    def clear(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[SmallDisk]:
    """Mount a file system of so many bytes; skips the test where nobody may mount one."""
    path.mkdir(mode=0o700, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
