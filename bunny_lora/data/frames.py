"""What a source gives: its frames, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bunny_lora.data.captions import Box, clean, names_in

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

    def naming(self, names: Sequence[str]) -> Sample:
        """Return the same picture with those in it, too, whose name is in the caption."""
        found = names_in(self.caption, [clean(name).lower() for name in names])
        characters = tuple(dict.fromkeys((*self.characters, *found)))
        return self if characters == self.characters else replace(self, characters=characters)

    @property
    def is_sure(self) -> bool:
        """Whether there is no doubt who is seen: one name, and one face."""
        return len(self.characters) == 1 and len(self.faces) == 1


def unseen(names: Sequence[str], samples: Sequence[Sample]) -> list[str]:
    """Return in a line which of `character_names` nobody is called."""
    called = {name for sample in samples for name in sample.characters}
    missing = [name for name in names if clean(name).lower() not in called]
    return [f"character_names: no caption has {', '.join(map(repr, missing))}"] if missing else []


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
