"""What a source gives: its frames, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bunny_lora.data.captions import Box

FaceNames = tuple[str | None, ...]
"""Who each face of a picture is, in the order of its boxes; None where nobody can tell."""


@dataclass(frozen=True)
class Sample:
    """One picture to train on: of a source while it is read, in the prepared folder from then on.

    Attributes:
        frame_id: what the source calls it.
        path: where the picture lies.
        caption: what it is trained on.
        characters: who is named as being in it.
        confidence: the analysis's own, None where there was none.
        rescued: the caption is the scene description, since the real one was cut off.
        faces: boxes (x1, y1, x2, y2) in pixels.
        size: (width, height) in pixels, empty where nobody looked.
        tokens: how many the caption takes, start and end included; None where nobody counted.
        prompted: the caption is the `instance_prompt`, for want of one.
        repeats: how often it counts in an epoch.
    """

    frame_id: str
    path: Path
    caption: str
    characters: tuple[str, ...] = ()
    confidence: float | None = None
    rescued: bool = False
    faces: tuple[Box, ...] = ()
    size: tuple[int, ...] = ()
    tokens: int | None = None
    prompted: bool = False
    repeats: int = 1

    @property
    def is_sure(self) -> bool:
        """Whether there is no doubt who is seen: one name, and one face."""
        return len(self.characters) == 1 and len(self.faces) == 1


@dataclass(frozen=True)
class Dropped:
    """One entry that is not used. `reason` is `kind: detail`; `path` None without a picture."""

    frame_id: str
    path: Path | None
    reason: str


@dataclass(frozen=True)
class Unused:
    """A file, from its source's folder, that nothing is learnt from. `reason` is as in `Dropped`."""

    file: str
    reason: str


@dataclass(frozen=True)
class Source:
    """All that was read. `origin` is the run folder or the plain one, `kind` "stage-4" or "folder".

    `unused` are files beside the pictures, `notes` what was guessed and has to be said.
    """

    origin: Path
    kind: str
    frames: list[Sample]
    dropped: list[Dropped]
    digest: str
    min_confidence: float | None = None
    unused: list[Unused] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
