"""Checksums of a blosc2 file: over every compressed chunk, and over the bytes before and after the
chunks.

A chunk is checked when a process first touches it, so reading stays lazy, and each chunk is checked
once per process.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIGITS = 8
HEADER_LENGTH, CHUNKS_LENGTH = slice(11, 15), slice(39, 47)
"""Positions of the lengths of the header and of all chunks in a blosc2 frame, big-endian."""


@dataclass(frozen=True)
class Seal:
    """The checksums by which a torn or altered file is recognised.

    Attributes:
        num_bytes: the file's size.
        head_bytes, tail_bytes: numbers of bytes before and after the chunks.
        frame_crc32: over head and tail.
        chunk_crc32: 8 hexadecimal digits per chunk, in order.
    """

    num_bytes: int
    head_bytes: int
    tail_bytes: int
    frame_crc32: int
    chunk_crc32: str


def seal_of(array: Any, frame: bytes) -> Seal:
    """Return the seal of ``frame``, the serialised form of a blosc2 ``array``."""
    schunk = array.schunk
    head = int.from_bytes(frame[HEADER_LENGTH], "big")
    chunks = int.from_bytes(frame[CHUNKS_LENGTH], "big")
    tail = len(frame) - head - chunks
    assert 0 < head < len(frame), "not a blosc2 frame"
    assert 0 < tail <= len(frame) - head, "not a blosc2 frame"

    frame_crc = zlib.crc32(frame[-tail:], zlib.crc32(frame[:head]))
    chunk_crcs = [zlib.crc32(schunk.get_chunk(i)) for i in range(schunk.nchunks)]
    chunk_text = "".join(f"{crc:0{DIGITS}x}" for crc in chunk_crcs)
    return Seal(len(frame), head, tail, frame_crc, chunk_text)


def frame_damage(path: Path, seal: Seal) -> str:
    """Return what is wrong with a file's size, head or tail; "" if nothing is.

    OSErrors pass.
    """
    with path.open("rb") as handle:
        head = handle.read(seal.head_bytes)
        size = handle.seek(0, 2)
        if size != seal.num_bytes:
            return f"it has {size} bytes, not {seal.num_bytes}"
        handle.seek(size - seal.tail_bytes)
        crc = zlib.crc32(handle.read(), zlib.crc32(head))
    return "" if crc == seal.frame_crc32 else "the checksum of its header differs"


def chunk_damage(array: Any, seal: Seal, numbers: Iterable[int]) -> str:
    """Return what is wrong with some chunks of an open blosc2 array; "" if nothing is."""
    for i in numbers:
        found = f"{zlib.crc32(array.schunk.get_chunk(i)):0{DIGITS}x}"
        if found != seal.chunk_crc32[i * DIGITS : (i + 1) * DIGITS]:
            return f"the checksum of chunk {i} differs"
    return ""
