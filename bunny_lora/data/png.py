"""PNGs whose text or colour profile is larger than Pillow takes: their pixels are whole.

Drawing programs write a whole workflow or edit history into a picture, and Pillow refuses the file.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
MAX_PROFILE_BYTES = 1 << 26


def without_large_chunks(path: Path) -> tuple[io.BytesIO | None, bytes | None]:
    """Return the file without its texts and the profile that is too large, and that profile.

    (None, None) for files that Pillow takes as they are, PNGs or others.
    """
    with path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            return None, None
        large, total, profile = set(), 0, None
        for start, kind, length in _chunks(file):
            if kind in (*TEXTS, b"iCCP"):
                plain, packed = _split(kind, file.read(length))
                text = _inflated(packed, PngImagePlugin.MAX_TEXT_CHUNK)
                total += len(plain) + len(text or b"")
                if text is None:
                    large.add(start)
                    profile = _inflated(packed, MAX_PROFILE_BYTES) if kind == b"iCCP" else profile
        if not large and total <= PngImagePlugin.MAX_TEXT_MEMORY:
            return None, None
        kept = [SIGNATURE]
        for start, kind, length in _chunks(file):
            if start not in large and kind not in TEXTS:
                file.seek(start - 8)
                kept.append(file.read(8 + length + 4))
    return io.BytesIO(b"".join(kept)), profile


def _chunks(file: BinaryIO) -> Iterator[tuple[int, bytes, int]]:
    """Yield (start of its data, kind, length) of each chunk, the file being there."""
    place = len(SIGNATURE)
    while file.seek(place) and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield place + 8, kind, length
        place += 8 + length + 4


def _split(kind: bytes, data: bytes) -> tuple[bytes, bytes]:
    """Return what of a chunk is not compressed, and what is."""
    rest = data.partition(b"\0")[2]
    if kind in (b"zTXt", b"iCCP"):
        return b"", rest[1:]
    if kind == b"iTXt" and rest[:1] == b"\1":
        return b"", rest[2:].split(b"\0", 2)[-1]
    return rest, b""


def _inflated(packed: bytes, limit: int) -> bytes | None:
    """Return what was compressed, None if there is more of it; nothing if it is damaged."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(packed, limit)
    except zlib.error:
        return b""  # Pillow reads over these.
    return None if stream.unconsumed_tail else found
