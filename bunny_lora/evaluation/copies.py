"""Copies: pictures nearer to what training saw than frames are that it did not see; and sameness.

Training saw squares of its frames, faces from near and mirror images, not whole frames, so pictures are
compared with such views. How near is too near is measured, not chosen: every view is compared with
those of the other shots, as if its own shot were held out. The similarity that 95 % of them stay below
is the threshold, and pictures that copy nothing are above it about as often, in 5 % of cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bunny_lora.config import Config
from bunny_lora.core.eval_parts import Copies, Interval, NearestView, Sameness
from bunny_lora.core.image_file import save_image
from bunny_lora.core.seeding import generator
from bunny_lora.data.frames import Sample
from bunny_lora.data.shots import shots
from bunny_lora.dataset import ImageDataset
from bunny_lora.evaluation.metrics import CONFIDENCE
from bunny_lora.evaluation.protocol import NOBODY, ImageSpec
from bunny_lora.model.image_encoder import FeatureExtractor

QUANTILE = 0.95  # of held-out views, that are no copies
VIEW_PX = 256  # what feature extractors take in is no finer
N_SQUARES = 5  # of a frame that is not square, evenly spaced along it
N_NEAREST = 6
N_RESAMPLES = 500
MAX_FRAMES = 400  # more are thinned out evenly


@dataclass(frozen=True)
class Views:
    """What training saw: of each view whose frame it is of, of which shot, and as a vector, [V, D]."""

    samples: list[Sample]
    frames: list[int]
    shot: list[int]
    vectors: torch.Tensor


def views_of(images: ImageDataset, config: Config, index: int) -> list[Image.Image]:
    """Return the views of a frame that training draws from, whole ones as evenly spaced squares."""
    whole = images[index]
    height, width = whole.shape[1:]
    side, slack = min(height, width), abs(width - height)
    n = N_SQUARES if slack else 1
    starts = [round(i * slack / max(1, n - 1)) for i in range(n)]
    found = [
        whole[:, :, start : start + side] if width > height else whole[:, start : start + side]
        for start in starts
    ]
    if config.zoom_on_faces:
        n_faces = len(images.samples[index].faces)
        faces = range(n_faces) if config.face_encoder else images.faces_to_zoom(index)
        near = [images.zoomed(index, face) for face in faces]
        found = near if near and config.zoom_on_faces == "only" else found + near
    found += [view.flip(-1) for view in found] if config.random_flip else []
    return [_image(view) for view in found]


def _image(pixels: torch.Tensor) -> Image.Image:
    array = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def dataset_of(samples: Sequence[Sample], config: Config) -> ImageDataset:
    """Return the frames as training cuts them, no finer than anybody looks."""
    kept = samples[:: -(-len(samples) // MAX_FRAMES)]
    size = min(config.resolution, VIEW_PX)
    return ImageDataset(kept, resolution=size, center_crop=config.center_crop)


def look_at_views(images: ImageDataset, config: Config, extractor: FeatureExtractor) -> Views:
    """Return what training saw of its frames, as vectors."""
    rows = [extractor(views_of(images, config, index)) for index in range(len(images))]
    frames = [index for index, views in enumerate(rows) for _ in views]
    shot = shots([sample.path for sample in images.samples])
    return Views(images.samples, frames, [shot[index] for index in frames], torch.cat(rows))


def held_out_similarity(vectors: torch.Tensor, shot: Sequence[int]) -> torch.Tensor:
    """Return of each view the cosine to the nearest of another shot, [V]; empty of a single shot."""
    number = torch.tensor(shot)
    if len(set(shot)) < 2:
        return vectors.new_empty(0)
    cosines = vectors @ vectors.T
    return cosines.masked_fill(number[:, None] == number[None, :], -torch.inf).max(1).values


def share_above(
    similarity: torch.Tensor,
    clusters: Sequence[object],
    held_out: torch.Tensor,
    shot: Sequence[int],
    *,
    seed: int = 0,
) -> Interval:
    """Return the share of images above the threshold that `held_out` gives, with its interval.

    Shots and prompts are both drawn anew, whole, since the threshold is an estimate as well.

    Args:
        similarity: of each image to the nearest view, [N].
        clusters: of each image what makes it like others: its prompt.
        held_out: of each view to the nearest view of another shot, [V].
        shot: of each view.
    """
    share = float((similarity > held_out.quantile(QUANTILE)).float().mean())
    groups, folds = _groups(clusters), _groups(shot)
    if len(groups) < 3 or len(folds) < 3:
        return Interval(mean=share, low=None, high=None, n=len(similarity))
    rng = generator(seed, "copies")
    found = []
    for _ in range(N_RESAMPLES):
        threshold = held_out[_drawn(folds, rng)].quantile(QUANTILE)
        found.append((similarity[_drawn(groups, rng)] > threshold).float().mean())
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.stack(found).quantile(torch.tensor([tail, 1 - tail])).tolist()
    return Interval(mean=share, low=low, high=high, n=len(similarity))


def _groups(names: Sequence[object]) -> list[torch.Tensor]:
    rows: dict[object, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return [torch.tensor(found) for found in rows.values()]


def _drawn(groups: list[torch.Tensor], rng: torch.Generator) -> torch.Tensor:
    chosen = torch.randint(len(groups), (len(groups),), generator=rng).tolist()
    return torch.cat([groups[place] for place in chosen])


def cross_similarity(
    vectors: torch.Tensor, groups: Sequence[object], *, seed: int = 0
) -> Interval | None:
    """Return the mean cosine of images of different groups, prompts or shots; None of one group."""
    rows = _groups(groups)
    if len(rows) < 2:
        return None
    cosines = vectors @ vectors.T
    means = torch.stack([torch.stack([cosines[a][:, b].mean() for b in rows]) for a in rows])
    off = ~torch.eye(len(rows), dtype=torch.bool)
    mean = float(means[off].mean())
    if len(rows) < 3:
        return Interval(mean=mean, low=None, high=None, n=len(vectors))
    drawn = torch.randint(
        len(rows), (N_RESAMPLES, len(rows)), generator=generator(seed, "cross similarity")
    )
    counted = (drawn[:, :, None] != drawn[:, None, :]).float()
    pairs = means[drawn[:, :, None], drawn[:, None, :]] * counted
    values = pairs.sum((1, 2)) / counted.sum((1, 2))
    tail = (1 - CONFIDENCE) / 2
    low, high = values[values.isfinite()].quantile(torch.tensor([tail, 1 - tail])).tolist()
    return Interval(mean=mean, low=low, high=high, n=len(vectors))


def copies_of(
    run_dir: Path,
    config: Config,
    samples: Sequence[Sample],
    extractor: FeatureExtractor,
    plan: Sequence[ImageSpec],
    vectors: torch.Tensor,
) -> Copies | None:
    """Return how much of a run's images was copied, and keep the nearest views in the run.

    Args:
        run_dir: the run; views go to its `evaluation/images/training/`.
        config: how training cut its frames.
        samples: what it saw.
        extractor: what measures.
        plan: the images.
        vectors: unit vectors [N, D] of them.

    Returns:
        None where all frames are of one shot, so that nothing can be held out.
    """
    images = dataset_of(samples, config)
    views = look_at_views(images, config, extractor)
    held_out = held_out_similarity(views.vectors, views.shot)
    if not len(held_out):
        return None
    above, nearest = {}, {}
    for model in ("base", "final"):
        rows = [i for i, s in enumerate(plan) if s.model == model and s.character not in NOBODY]
        similarity, place = (vectors[rows] @ views.vectors.T).max(1)
        clusters = [plan[row].prompt for row in rows]
        above[model] = share_above(similarity, clusters, held_out, views.shot)
        nearest = dict(zip(rows, zip(similarity.tolist(), place.tolist(), strict=True), strict=True))
    closest = sorted(nearest, key=lambda row: -nearest[row][0])[:N_NEAREST]
    return Copies(
        threshold=float(held_out.quantile(QUANTILE)),
        n_views=len(held_out),
        above=above,
        sameness=_sameness(plan, vectors, views),
        nearest=[
            _kept(run_dir, number, plan[row].file, nearest[row], images, config, views)
            for number, row in enumerate(closest)
        ],
    )


def _kept(
    run_dir: Path,
    number: int,
    file: str,
    found: tuple[float, int],
    images: ImageDataset,
    config: Config,
    views: Views,
) -> NearestView:
    similarity, place = found
    index = views.frames[place]
    view = views_of(images, config, index)[place - views.frames.index(index)]
    name = f"images/training/nearest-{number}.png"
    save_image(view, run_dir / "evaluation" / name)
    frame = views.samples[index].path.name
    return NearestView(file=file, view=name, frame=frame, similarity=similarity)


def _sameness(plan: Sequence[ImageSpec], vectors: torch.Tensor, views: Views) -> dict[str, Sameness]:
    found = {}
    for name in dict.fromkeys(spec.character for spec in plan if spec.character not in NOBODY):
        rows = [i for i, s in enumerate(plan) if (s.model, s.character) == ("final", name)]
        alone = [
            i for i, frame in enumerate(views.frames) if views.samples[frame].characters == (name,)
        ]
        if pictures := cross_similarity(vectors[rows], [plan[row].prompt for row in rows]):
            shot = [views.shot[row] for row in alone]
            found[name] = Sameness(
                pictures=pictures,
                training=cross_similarity(views.vectors[alone], shot) if alone else None,
            )
    return found
