"""Reads SQLite's write-ahead log: which frames SQLite recovers, and which it drops.

SQLite reads the log up to the first frame whose checksum is wrong, and silently drops all later frames. After
a crash, that is right for an unfinished transaction, but wrong for committed ones.
"""

import errno
import os
import stat
import struct
from pathlib import Path
from typing import BinaryIO

import msgspec

HEAD, FRAME_HEAD = 32, 24  # bytes
SMALLEST, LARGEST = 512, 65_536  # bytes of a page
MAGIC = {0x377F0682: "<", 0x377F0683: ">"}  # the byte order of the checksums
_MASK = 0xFFFFFFFF


class Log(msgspec.Struct, frozen=True):
    """The contents of a log."""

    valid: int = 0  # frames that SQLite recovers
    dropped: int = 0  # frames of the same generation after the first broken one
    commits: int = 0  # transactions that end in dropped frames

    @property
    def damaged(self) -> bool:
        """Whether SQLite will drop committed transactions; a crash alone does not cause that."""
        return self.commits > 0


def log_of(database: Path) -> Path:
    """Return the path of a database's log; if the database is a link, the log is beside its target."""
    real = Path(os.path.realpath(database))  # `resolve` fails where links lead in a circle
    return real.with_name(f"{real.name}-wal")


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading, without waiting for a pipe or device.

    Raises:
        OSError: it does not exist, cannot be read, or is not a plain file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return os.fdopen(descriptor, "rb")


def read_log(path: Path) -> Log:
    """Check every frame of a log as SQLite does when it recovers; the file is only read.

    Raises:
        OSError: it exists and cannot be read.
    """
    try:
        with open_plain(path) as file:
            return _read(file)
    except FileNotFoundError:
        return Log()


def _read(file: BinaryIO) -> Log:
    head = file.read(HEAD)
    if len(head) < HEAD:
        return Log()
    magic, _, page, _, *salts, first, second = struct.unpack(">8I", head)
    order = MAGIC.get(magic, "<")
    sums = _checksum(struct.unpack_from(f"{order}6I", head), (0, 0))
    sound = magic in MAGIC and sums == (first, second)
    if not sound:
        # With a damaged head all frames are dropped; each frame contains its generation as well.
        frames = file.read(2 * (FRAME_HEAD + LARGEST))
        if len(frames) < FRAME_HEAD:
            return Log()
        page, salts = _page_size(frames), list(struct.unpack_from(">2I", frames, 8))
        file.seek(HEAD)
    if not SMALLEST <= page <= LARGEST:
        return Log()
    words = struct.Struct(f"{order}{page // 4}I")
    valid = dropped = commits = 0
    while len(frame := file.read(FRAME_HEAD + page)) == FRAME_HEAD + page:
        number, size, *salt, first, second = struct.unpack_from(">6I", frame)
        if sound:
            sums = _checksum(
                struct.unpack_from(f"{order}2I", frame) + words.unpack_from(frame, FRAME_HEAD), sums
            )
            # The first broken frame may be the one that was being written: its head first, then the page.
            sound = salt == salts and number > 0 and sums == (first, second)
            valid += sound
        elif salt == salts:
            dropped += 1
            commits += size > 0
    return Log(valid, dropped, commits)


def _page_size(frames: bytes) -> int:
    """Find the size of pages by the distance of the first two frames, because the head is damaged."""
    salts, size = frames[8:16], SMALLEST
    while size <= LARGEST:
        if frames[FRAME_HEAD + size + 8 :][:8] == salts:
            return size
        size *= 2
    return 4096


def _checksum(words: tuple[int, ...], sums: tuple[int, int]) -> tuple[int, int]:
    one, two = sums
    for at in range(0, len(words), 2):
        one = (one + words[at] + two) & _MASK
        two = (two + words[at + 1] + one) & _MASK
    return one, two
