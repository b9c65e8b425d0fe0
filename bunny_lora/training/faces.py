"""Whose face is whose, in pictures that name several or show several.

A character's prototype is the mean of its crops in pictures of one name and one face. Elsewhere names
and faces are matched so that they are most like each other in all; what is in doubt stays untied.
Who is alone nowhere gets a prototype of the faces that are left when all others have theirs.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import normalize

from bunny_lora.core.progress import progress
from bunny_lora.data.frames import FaceNames, Sample
from bunny_lora.data.images import FACE_TO_HEAD
from bunny_lora.dataset import ImageDataset
from bunny_lora.model.image_encoder import FeatureExtractor

MARGIN = 0.05  # of cosines summed: how far the best match has to be before the second best
MAX_MATCHES = 5040  # of names and faces in a picture: four of ten

NO_PROTOTYPE = "nobody in them is anywhere alone with one face found"
HIDDEN = "fewer faces than names, and somebody is nowhere alone with one face found"
UNCLEAR = "unclear who is who"
CROWD = "too many faces"

Match = tuple[tuple[int, int], ...]  # pairs of a name and a face, by their places in the sample


def tie_faces(images: ImageDataset, encode: FeatureExtractor) -> list[FaceNames]:
    """Return whose the faces of each picture are, and say how many pictures are left in doubt.

    Args:
        images: with the names of who is in a picture, and the boxes of faces.
        encode: turns crops into unit vectors.
    """
    numbers = progress(range(len(images)), desc="tie faces to names")
    vectors = [_vectors(images, index, encode) for index in numbers]
    prototypes, least = _prototypes(images.samples, vectors)
    both = list(zip(images.samples, vectors, strict=True))
    results = [_tie(sample, found, prototypes, least) for sample, found in both]
    left = _left_over(both, [names for names, _ in results], least)
    if left:
        results = [_tie(sample, found, prototypes | left, least) for sample, found in both]
    tied = [names for names, _ in results]
    doubts = Counter(doubt for _, doubt in results if doubt)
    n_faces = sum(name is not None for names in tied for name in names)
    n_pictures = sum(any(names) for names in tied)
    print(f"face_encoder: {n_faces} faces in {n_pictures} pictures are tied to names{_said(doubts)}")
    return tied


def _said(doubts: Counter[str]) -> str:
    if not doubts:
        return ""
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(doubts.items()))
    return f"; {doubts.total()} pictures are in doubt and taken as they are: {reasons}"


def _vectors(images: ImageDataset, index: int, encode: FeatureExtractor) -> torch.Tensor:
    """Return the faces of a picture as rows; none where there is no name for them."""
    sample = images.samples[index]
    if not (sample.characters and sample.faces):
        return torch.empty(0, 0)
    return encode([images.face(index, face, FACE_TO_HEAD) for face in range(len(sample.faces))])


def _prototypes(
    samples: Sequence[Sample], vectors: list[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], float]:
    """Return each name's prototype, and the least that a crop they are made of is like its own."""
    crops: dict[str, list[torch.Tensor]] = {}
    for sample, found in zip(samples, vectors, strict=True):
        if sample.is_sure:
            crops.setdefault(sample.characters[0], []).append(found[0])
    prototypes = {name: normalize(torch.stack(rows).mean(0), dim=0) for name, rows in crops.items()}
    own = [float((torch.stack(rows) @ prototypes[name]).min()) for name, rows in crops.items()]
    return prototypes, min(own, default=1.0)


def _left_over(
    both: Sequence[tuple[Sample, torch.Tensor]], tied: Sequence[FaceNames], least: float
) -> dict[str, torch.Tensor]:
    """Return prototypes of names that are left with one face, when all others have theirs.

    One picture proves nothing, it may show a passer-by: in two and more the faces have to be alike.
    """
    crops: dict[str, list[torch.Tensor]] = {}
    for (sample, vectors), faces in zip(both, tied, strict=True):
        names = [name for name in sample.characters if name not in faces]
        places = [face for face, name in enumerate(faces) if name is None]
        if len(faces) > 1 and len(names) == len(places) == 1:
            crops.setdefault(names[0], []).append(vectors[places[0]])
    prototypes = {}
    for name, rows in crops.items():
        total = torch.stack(rows).sum(0)
        others = [float(normalize(total - row, dim=0) @ row) for row in rows if len(rows) > 1]
        if others and min(others) >= least - MARGIN:
            prototypes[name] = normalize(total, dim=0)
    return prototypes


def _tie(
    sample: Sample, vectors: torch.Tensor, prototypes: dict[str, torch.Tensor], least: float
) -> tuple[FaceNames, str]:
    """Return whose the faces are, and what the doubt is where all stay untied.

    A name that is nowhere alone stays without a face, and the others get theirs.
    """
    names, n_faces = sample.characters, len(sample.faces)
    untied: FaceNames = (None,) * n_faces
    if not names or not n_faces:
        return untied, ""
    if sample.is_sure:
        return names, ""
    known = [name for name in names if name in prototypes]
    if not known:
        return untied, NO_PROTOTYPE
    if len(known) < len(names) and n_faces < len(names):  # A face may be of whoever is not known.
        return untied, HIDDEN
    most, fewest = max(n_faces, len(known)), min(n_faces, len(known))
    if math.perm(most, fewest) > MAX_MATCHES:
        return untied, CROWD
    similarity = {name: (vectors @ prototype).tolist() for name, prototype in prototypes.items()}
    match = _clear_match(known, n_faces, similarity)
    if len(known) < len(names):  # Another face may be of whoever is not known: like is not enough.
        sure = all(similarity[known[name]][face] >= least - MARGIN for name, face in match)
        match = match if sure else ()
    who = {face: known[name] for name, face in match}
    return tuple(who.get(face) for face in range(n_faces)), "" if match else UNCLEAR


def _clear_match(names: Sequence[str], n_faces: int, similarity: dict[str, list[float]]) -> Match:
    """Return the match of most similarity; none if another is as good, or a face most like a third."""
    totals = sorted(
        (sum(similarity[names[name]][face] for name, face in match), match)
        for match in _matches(len(names), n_faces)
    )
    best, match = totals[-1]
    nearest = [max(similarity, key=lambda name: similarity[name][face]) for face in range(n_faces)]
    if any(nearest[face] != names[name] for name, face in match):
        return ()
    return () if len(totals) > 1 and best - totals[-2][0] < MARGIN else match


def _matches(n_names: int, n_faces: int) -> Iterator[Match]:
    """Yield every way of giving each name a face of its own, or each face a name if there are fewer."""
    if n_names <= n_faces:
        for faces in itertools.permutations(range(n_faces), n_names):
            yield tuple(enumerate(faces))
    else:
        for names in itertools.permutations(range(n_names), n_faces):
            yield tuple((name, face) for face, name in enumerate(names))
