"""Characters cut out: references from the film, and where in a picture one is looked for.

Nothing that this package stands on finds cartoon characters in pictures, so references are grown from
the faces that stage 3 found, and in other pictures windows are slid over the whole and the one that
looks most like the character is taken. Pictures of the base model, of the LoRA, of shots held out and
of other characters are searched alike, so that the best of many windows flatters none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps

from bunny_lora.config import Config
from bunny_lora.data.captions import Box
from bunny_lora.data.frames import FaceNames, Sample
from bunny_lora.data.images import FACE_TO_BODY, crop_around, open_rgb
from bunny_lora.data.shots import shots
from bunny_lora.dataset import ImageDataset
from bunny_lora.evaluation.features import PALETTE
from bunny_lora.model import devices
from bunny_lora.model.image_encoder import FeatureExtractor, load_image_encoder
from bunny_lora.training.faces import tie_faces

MAX_CROPS = 200  # of one character; more are thinned out evenly
CROP_SIZE_PX = 256  # what feature extractors take in is no finer
WINDOWS = ((1.0, 1), (0.75, 2), (0.5, 3))
"""Sides of windows over the picture's, and at how many places across and down each is looked at."""
CHUNK = 4  # pictures in memory with all their windows


@dataclass(frozen=True)
class Cutout:
    """A character in a frame; without the box of its face, the middle square of the whole frame."""

    path: Path
    box: Box | None = None

    @property
    def size(self) -> float:
        """The longer side of the face in pixels; 0 without one."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1]) if self.box else 0

    def image(self) -> Image.Image:
        """Return the square around the face that holds most of the body."""
        frame = open_rgb(self.path)
        if self.box:
            frame = crop_around(frame, self.box, FACE_TO_BODY)
        return ImageOps.fit(frame, (CROP_SIZE_PX, CROP_SIZE_PX))


def references(
    samples: Sequence[Sample], names: Sequence[str], face_names: Sequence[FaceNames] | None = None
) -> dict[str, list[Cutout]]:
    """Return where each character is surely seen, once in every shot, and say what that leaves out.

    Args:
        samples: in the order of the film.
        names: of the characters.
        face_names: whose the faces of each sample are, where they were tied to names.
    """
    found, doubtful, faceless = {}, [], []
    for name in names:
        shown = _tied(samples, face_names, name) or _alone(samples, name)
        if not shown:
            with_faces = images_of([sample for sample in samples if sample.faces], name)
            doubtful += [name] if with_faces else []
            shown = [Cutout(sample.path, _largest(sample)) for sample in with_faces]
        if not shown:
            faceless.append(name)
            shown = [Cutout(sample.path) for sample in images_of(samples, name)]
        found[name] = one_a_shot(shown)
    for line in _left_out(samples, names, doubtful, faceless):
        print(f"References: {line}")
    return found


def tied_faces(samples: Sequence[Sample], config: Config) -> list[FaceNames] | None:
    """Return whose the faces of each image are, as `face_encoder` or else the judge's features tell.

    Where they are in doubt they stay untied. None where no face was found, or only palettes could tell.

    Raises:
        BunnyLoraError: the encoder cannot be loaded.
    """
    key = "face_encoder" if config.face_encoder else "evaluation.features"
    name = config.face_encoder or config.evaluation.features
    if name == PALETTE or not any(sample.faces for sample in samples):
        return None
    encoder = load_image_encoder(name, key, devices.resolve_device(config.device).type)
    images = ImageDataset(samples, resolution=config.resolution, center_crop=False)
    return tie_faces(images, encoder)


def _tied(samples: Sequence[Sample], face_names: Sequence[FaceNames] | None, name: str) -> list[Cutout]:
    pairs = zip(samples, face_names or (), strict=False)
    return [
        Cutout(sample.path, box)
        for sample, tied in pairs
        for box, who in zip(sample.faces, tied, strict=True)
        if who == name
    ]


def _alone(samples: Sequence[Sample], name: str) -> list[Cutout]:
    sure = [sample for sample in samples if sample.is_sure and name in sample.characters]
    return [Cutout(sample.path, sample.faces[0]) for sample in sure]


def _largest(sample: Sample) -> Box:
    return max(sample.faces, key=lambda box: Cutout(sample.path, box).size)


def _left_out(
    samples: Sequence[Sample], names: Sequence[str], doubtful: list[str], faceless: list[str]
) -> Iterator[str]:
    n = sum(not sample.faces for sample in samples if set(names) & set(sample.characters))
    if n and len(faceless) < len(names):
        yield f"{n} images that name a character show no face that was found, and are left out"
    if doubtful:
        yield (
            f"{', '.join(doubtful)}: nowhere alone with one face, so the largest face of an image"
            " stands for each; face_encoder ties faces to names"
        )
    if faceless:
        yield f"{', '.join(faceless)}: no face was found, so whole images stand in, scenery and all"


def images_of(samples: Sequence[Sample], name: str) -> list[Sample]:
    """Return the images that show this character most surely.

    That is alone, with no second face that might be a passer-by's; where there are none of these, named
    alone; where there are none either, named among others.
    """
    named = [sample for sample in samples if name in sample.characters]
    alone = [sample for sample in named if len(sample.characters) == 1]
    return [sample for sample in alone if len(sample.faces) < 2] or alone or named


def one_a_shot(cutouts: Sequence[Cutout]) -> list[Cutout]:
    """Return one of each shot, that of the largest face; at most `MAX_CROPS`, evenly spaced.

    Neighbouring frames are nearly one picture: they would count often, and make all agree.
    """
    if not cutouts:
        return []
    best: dict[int, Cutout] = {}
    for cutout, shot in zip(cutouts, shots([cutout.path for cutout in cutouts]), strict=True):
        if shot not in best or cutout.size > best[shot].size:
            best[shot] = cutout
    return list(best.values())[:: -(-len(best) // MAX_CROPS)]


def windows(image: Image.Image) -> list[Image.Image]:
    """Return the squares in which a character is looked for, the whole picture's middle first."""
    side = min(image.size)
    square = ImageOps.fit(image, (side, side))
    return [square.crop(box) for box in window_boxes(side)]


def window_boxes(side: int) -> list[tuple[int, int, int, int]]:
    """Return the windows of a square of `side` pixels, in their order, as left, top, right, bottom."""
    found = []
    for scale, places in WINDOWS:
        width = round(scale * side)
        steps = [round(i * (side - width) / max(1, places - 1)) for i in range(places)]
        found += [(left, top, left + width, top + width) for top in steps for left in steps]
    return found


def apart() -> list[tuple[int, int]]:
    """Return the places of every two windows, either way round, of which one is left of the other."""
    boxes = window_boxes(CROP_SIZE_PX)
    return [
        (i, j)
        for i, one in enumerate(boxes)
        for j, other in enumerate(boxes)
        if one[2] <= other[0] or other[2] <= one[0]
    ]


def look(images: Sequence[Image.Image | Path], extractor: FeatureExtractor) -> torch.Tensor:
    """Return unit vectors of every window of every image, [N, windows, D]."""
    rows = []
    for start in range(0, len(images), CHUNK):
        opened = [
            open_rgb(image) if isinstance(image, Path) else image
            for image in images[start : start + CHUNK]
        ]
        cut = [windows(image) for image in opened]
        vectors = extractor([window for one in cut for window in one])
        rows.append(vectors.reshape(len(cut), -1, vectors.shape[1]))
    return torch.cat(rows)


def likeness(seen: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine to a character's references of the window that is most like them, [N].

    Args:
        seen: of N images, [N, windows, D], as `look` returns them.
        references: unit vectors of the character's crops, [M, D].
    """
    return (seen @ references.mean(0)).max(1).values
