"""SQLite's write-ahead log as a file: how much of it SQLite takes in, and what it drops.

SQLite reads the log up to the first frame whose checksum is wrong, and drops all later ones without a word:
after a crash that is right for what was being written, and wrong for everything that was committed.
"""

import struct
from pathlib import Path

import msgspec

HEAD, FRAME_HEAD = 32, 24  # bytes
_MAGIC = {0x377F0682: "<", 0x377F0683: ">"}  # the byte order of the checksums
_MASK = 0xFFFFFFFF


class Log(msgspec.Struct, frozen=True):
    """What a log holds."""

    valid: int = 0  # frames that SQLite takes in
    dropped: int = 0  # frames of the same generation behind the first broken one
    commits: int = 0  # transactions that end in them

    @property
    def damaged(self) -> bool:
        """Whether committed transactions are dropped; a crash while writing leaves none behind it."""
        return self.commits > 0


def log_of(database: Path) -> Path:
    """Return the path of a database's log."""
    return database.with_name(f"{database.name}-wal")


def read_log(path: Path) -> Log:
    """Check every frame of a log as SQLite does when it recovers; the file is only read.

    Raises:
        OSError: it is there and cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _read(file.read())
    except FileNotFoundError:
        return Log()


def _read(raw: bytes) -> Log:
    if len(raw) < HEAD + FRAME_HEAD:
        return Log()
    magic, _, page, _, *salts, first, second = struct.unpack_from(">8I", raw)
    order = _MAGIC.get(magic, "<")
    sums = _checksum(struct.unpack_from(f"{order}6I", raw), (0, 0))
    sound = magic in _MAGIC and sums == (first, second)
    if not sound:
        # With a damaged head all frames are dropped; their generation stands in each of them.
        page, salts = _page_size(raw), list(struct.unpack_from(">2I", raw, HEAD + 8))
    if page < 512 or page & (page - 1):  # noqa: PLR2004 - the smallest page there is
        return Log()
    valid = dropped = commits = 0
    for at in range(HEAD, len(raw) - FRAME_HEAD - page + 1, FRAME_HEAD + page):
        number, size, *salt, first, second = struct.unpack_from(">6I", raw, at)
        if sound:
            words = struct.unpack_from(f"{order}2I", raw, at)
            words += struct.unpack_from(f"{order}{page // 4}I", raw, at + FRAME_HEAD)
            sums = _checksum(words, sums)
            if salt == salts and number and sums == (first, second):
                valid += 1
                continue
            sound = False  # what is being written when the process ends: head first, then the page
            continue
        if salt == salts:
            dropped += 1
            commits += size > 0
    return Log(valid, dropped, commits)


def _page_size(raw: bytes) -> int:
    """Find the size of pages of a log whose head is not to be trusted: the second frame tells."""
    salts = raw[HEAD + 8 : HEAD + 16]
    for shift in range(9, 17):
        at = HEAD + FRAME_HEAD + (1 << shift) + 8
        if raw[at : at + 8] == salts:
            return 1 << shift
    return 4096


def _checksum(words: tuple[int, ...], sums: tuple[int, int]) -> tuple[int, int]:
    one, two = sums
    for at in range(0, len(words), 2):
        one = (one + words[at] + two) & _MASK
        two = (two + words[at + 1] + one) & _MASK
    return one, two
