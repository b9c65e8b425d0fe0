"""What a source gives: its frames, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bunny_lora.data.captions import Box


@dataclass(frozen=True)
class Frame:
    """One picture to train on. `faces` are boxes (x1, y1, x2, y2) and `size` is (w, h), in pixels."""

    frame_id: str
    path: Path
    caption: str
    characters: tuple[str, ...]
    confidence: float | None
    rescued: bool
    faces: tuple[Box, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class Dropped:
    """One entry that is not used. `reason` is `kind: detail`; `path` None without a picture."""

    frame_id: str
    path: Path | None
    reason: str


@dataclass(frozen=True)
class Source:
    """All that was read. `origin` is the run folder or the plain one, `kind` "stage-4" or "folder"."""

    origin: Path
    kind: str
    frames: list[Frame]
    dropped: list[Dropped]
    digest: str
    min_confidence: float | None = None
