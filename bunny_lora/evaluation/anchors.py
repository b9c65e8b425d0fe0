"""Identity between a floor and a ceiling, so that its number means something by itself.

A cosine of 0.7 may be all that features can give, or nothing. So likeness to a character's references
is measured of what is certainly not the character and of what certainly is. The floor, 0: the base
model's images for the same prompts and seeds, or the nearest other character in its own shots,
whichever is more like it. The ceiling, 1: the character itself in shots that its references do not
have, as the autoencoder gives them back, since no image of the model can be better than that. All are
cut out alike, see `cutouts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from bunny_lora.config import Config
from bunny_lora.core.eval_result import Anchors, IdentityScores, Interval
from bunny_lora.core.image_file import save_image
from bunny_lora.core.progress import progress
from bunny_lora.core.seeding import generator
from bunny_lora.evaluation import metrics
from bunny_lora.evaluation.cutouts import likeness, look
from bunny_lora.evaluation.metrics import CONFIDENCE, N_RESAMPLES
from bunny_lora.evaluation.protocol import ImageSpec
from bunny_lora.evaluation.traits import clustered_interval
from bunny_lora.model import components, devices
from bunny_lora.model.image_encoder import FeatureExtractor

MIN_CLUSTERS = 3  # of prompts: of fewer there is no interval
ALL = "all"


@dataclass(frozen=True)
class Shots:
    """Likeness to one character of shots held out.

    Attributes:
        own: of its own shots, [H].
        others: of those of the other character that is most like it, [O]; of one character, none.
    """

    own: torch.Tensor
    others: torch.Tensor


@dataclass(frozen=True)
class Drawn:
    """Likeness to a character of a model's images [N], and of the base model's from the same seeds."""

    values: torch.Tensor
    base: torch.Tensor
    prompts: Sequence[int]


def held_out(
    seen: Sequence[torch.Tensor], places: Sequence[Sequence[int]], references: Sequence[torch.Tensor]
) -> list[Shots]:
    """Return the likeness of shots held out to each of K characters.

    Args:
        seen: of each character the windows of its shots, [H_k, windows, D].
        places: which of its references each of these shots is; it is compared with the others.
        references: of each character its crops, one a shot, [M_k, D].
    """
    found = []
    for k, crops in enumerate(references):
        own = [
            likeness(shot[None], torch.cat([crops[:place], crops[place + 1 :]]))
            for shot, place in zip(seen[k], places[k], strict=True)
            if len(crops) > 1
        ]
        others = [likeness(windows, crops) for j, windows in enumerate(seen) if j != k]
        nearest = max(others, key=lambda values: float(values.mean()), default=torch.empty(0))
        found.append(Shots(torch.cat(own) if own else torch.empty(0), nearest))
    return found


def why_blind(base: torch.Tensor, shots: Shots) -> str | None:
    """Return why a character cannot be judged between floor and ceiling; None where it can.

    Args:
        base: likeness to it of the base model's images.
        shots: of shots held out.
    """
    if not len(shots.own):
        return "a single shot shows it surely, and none can be held out; face_encoder may find more"
    rng = generator(0, "blind")
    floor = _resampled(shots.others, rng).clamp(min=float(base.mean()))
    gap = _resampled(shots.own, rng) - floor
    surely = gap.quantile((1 - CONFIDENCE) / 2) if len(shots.own) > 2 else gap.mean()
    if surely <= 1e-6:
        return "these features cannot tell it: the ceiling is not surely above the floor"
    return None


def placed(values: torch.Tensor, base: torch.Tensor, shots: Shots) -> torch.Tensor:
    """Return likeness as identity: 0 at the higher floor, 1 at the ceiling."""
    floor, ceiling = base.mean(), shots.own.mean()
    if len(shots.others):
        floor = torch.maximum(floor, shots.others.mean())
    return (values - floor) / (ceiling - floor)


def identity_interval(parts: Sequence[tuple[Drawn, Shots]], *, minus_base: bool = False) -> Interval:
    """Return the mean identity of images of some characters, with its interval.

    In each resample (Efron's bootstrap of clusters) whole prompts are drawn, with the base model's
    images of the same seeds, and the shots that floor and ceiling stand on: all four are uncertain.

    Args:
        parts: of each character what was drawn of it, and its shots held out.
        minus_base: of the differences to the base model's images.
    """
    drawn = [part for part, _ in parts]
    points = [placed(d.values, d.base, s) for d, s in parts]
    if minus_base:
        points = [p - placed(d.base, d.base, s) for p, (d, s) in zip(points, parts, strict=True)]
    mean, n = float(torch.cat(points).mean()), sum(len(d.values) for d in drawn)
    sums = [_by_prompt(d) for d in drawn]
    clusters = sum(len(one) for one in sums)
    if clusters < MIN_CLUSTERS:
        return Interval(mean=mean, low=None, high=None, n=n)
    rng = generator(0, "identity")
    chosen = torch.randint(clusters, (N_RESAMPLES, clusters), generator=rng)
    times = torch.zeros(N_RESAMPLES, clusters, dtype=torch.double)
    times.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.double))
    total, weight, start = torch.zeros(N_RESAMPLES).double(), torch.zeros(N_RESAMPLES).double(), 0
    for (_, shots), one in zip(parts, sums, strict=True):
        values, base, counts = (times[:, start : start + len(one)] @ one).T
        start += len(one)
        floor = torch.maximum(base / counts, _resampled(shots.others, rng))
        span = _resampled(shots.own, rng) - floor
        place = (values - (base if minus_base else floor * counts)) / span
        total += torch.where(counts > 0, place, 0)
        weight += counts
    tail = (1 - CONFIDENCE) / 2
    low, high = (total / weight).quantile(torch.tensor([tail, 1 - tail]).double()).tolist()
    return Interval(mean=mean, low=low, high=high, n=n)


def _by_prompt(drawn: Drawn) -> torch.Tensor:
    """Return the sums of each prompt's images, of the base model's, and how many they are, [P, 3]."""
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(drawn.prompts))}
    rows = torch.stack([drawn.values, drawn.base, torch.ones_like(drawn.values)], dim=1).double()
    place = torch.tensor([index[prompt] for prompt in drawn.prompts])
    return torch.zeros(len(index), 3, dtype=torch.double).index_add_(0, place, rows)


def _resampled(values: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Return means of values drawn with replacement; minus infinity of none, which is no floor."""
    if not len(values):
        return torch.full((N_RESAMPLES,), -torch.inf, dtype=torch.double)
    chosen = torch.randint(len(values), (N_RESAMPLES, len(values)), generator=rng)
    return values.double()[chosen].mean(1)


def summarise(
    features: str, drawn: Mapping[str, Mapping[str, Drawn]], shots: Mapping[str, Shots]
) -> IdentityScores:
    """Return the identity of every model's images.

    Args:
        features: the extractor's name.
        drawn: of each model, "base" and "final" among them, what it drew of each character.
        shots: of each character the shots held out.
    """
    anchors = {name: _anchors(part, shots[name]) for name, part in drawn["base"].items()}
    reasons = {name: why_blind(part.base, shots[name]) for name, part in drawn["base"].items()}
    models: dict[str, dict[str, Interval]] = {}
    for model, parts in drawn.items():
        seen = {name: (part, shots[name]) for name, part in parts.items() if reasons[name] is None}
        each = {name: identity_interval([pair]) for name, pair in seen.items()}
        models[model] = {ALL: identity_interval(list(seen.values()))} | each if seen else {}
    final = [(part, shots[name]) for name, part in drawn["final"].items() if reasons[name] is None]
    return IdentityScores(
        features=features,
        anchors=anchors,
        blind={name: reason for name, reason in reasons.items() if reason},
        models=models,
        change=identity_interval(final, minus_base=True) if final else None,
    )


def _anchors(base: Drawn, shots: Shots) -> Anchors:
    return Anchors(
        base=clustered_interval(base.values, base.prompts),
        wrong=metrics.interval(shots.others) if len(shots.others) else None,
        ceiling=metrics.interval(shots.own) if len(shots.own) else None,
    )


# ---------------------------------------------------------------------------- of a run


def identity_scores(
    run_dir: Path,
    config: Config,
    plan: Sequence[ImageSpec],
    crops: Mapping[str, Sequence[Image.Image]],
    references: Sequence[torch.Tensor],
    extractor: FeatureExtractor,
    base_model: str,
) -> tuple[IdentityScores | None, dict[str, float]]:
    """Return the identity of a run's images, and of each image by its file.

    Args:
        run_dir: the run's folder.
        config: says how many shots are held out, and at which size.
        plan: images that name a character.
        crops: of each character, one a shot.
        references: their unit vectors, [M_k, D] of each character.
        extractor: what made them.
        base_model: whose autoencoder it is.
    """
    if not config.evaluation.ceiling_shots:
        return None, {}
    places = [evenly(len(images), config.evaluation.ceiling_shots) for images in crops.values()]
    chosen = [[images[i] for i in at] for images, at in zip(crops.values(), places, strict=True)]
    shown = [crop for images in chosen for crop in images]
    returned = through_autoencoder(run_dir, config, shown, base_model)
    seen = look(returned, extractor).split([len(images) for images in chosen])
    shots = dict(zip(crops, held_out(seen, places, references), strict=True))
    drawn = _drawn(run_dir, plan, dict(zip(crops, references, strict=True)), extractor)
    found = summarise(extractor.name, {model: _paired(drawn, model) for model in drawn}, shots)
    for name, reason in found.blind.items():
        print(f"Identity of {name} is not told: {reason}")
    return found, _of_images(drawn, shots, found)


Likeness = dict[str, dict[ImageSpec, float]]
"""Of each character, of each image that should show it, the likeness to its references."""


def _drawn(
    run_dir: Path,
    plan: Sequence[ImageSpec],
    references: Mapping[str, torch.Tensor],
    extractor: FeatureExtractor,
) -> dict[str, Likeness]:
    found: dict[str, Likeness] = {}
    for spec in progress(plan, desc="Looking for the characters", unit="image"):
        windows = look([run_dir / "evaluation" / spec.file], extractor)
        value = float(likeness(windows, references[spec.character]))
        found.setdefault(spec.model, {}).setdefault(spec.character, {})[spec] = value
    return found


def _paired(drawn: Mapping[str, Likeness], model: str) -> dict[str, Drawn]:
    """Return a model's images of each character with the base model's of the same prompts and seeds."""
    base = {
        (spec.character, spec.prompt_index, spec.seed): value
        for values in drawn["base"].values()
        for spec, value in values.items()
    }
    return {
        name: Drawn(
            torch.tensor(list(values.values())),
            torch.tensor([base[spec.character, spec.prompt_index, spec.seed] for spec in values]),
            [spec.prompt_index for spec in values],
        )
        for name, values in drawn[model].items()
    }


def _of_images(
    drawn: Mapping[str, Likeness], shots: Mapping[str, Shots], found: IdentityScores
) -> dict[str, float]:
    placed_at: dict[str, float] = {}
    base = {name: torch.tensor(list(values.values())) for name, values in drawn["base"].items()}
    for of_model in drawn.values():
        for name in of_model.keys() - found.blind.keys():
            values = torch.tensor(list(of_model[name].values()))
            places = placed(values, base[name], shots[name]).tolist()
            placed_at |= {spec.file: place for spec, place in zip(of_model[name], places, strict=True)}
    return placed_at


def evenly(n: int, at_most: int) -> list[int]:
    """Return at most so many places out of n, evenly spaced."""
    return list(range(0, n, max(1, -(-n // at_most))))


def through_autoencoder(
    run_dir: Path, config: Config, images: Sequence[Image.Image], base_model: str
) -> list[Path]:
    """Return images as the base model's autoencoder gives them back, kept in the run for the next time.

    Args:
        run_dir: the run's folder.
        config: says at which size.
        images: squares.
        base_model: whose autoencoder it is.
    """
    folder = run_dir / "evaluation" / "images" / "held_out"
    size = (config.resolution, config.resolution)
    squares = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
    made_by = f"{base_model} {config.resolution}".encode()
    paths = [folder / f"{hashlib.sha256(made_by + s.tobytes()).hexdigest()[:20]}.png" for s in squares]
    missing = {p: s for p, s in zip(paths, squares, strict=True) if not p.is_file()}
    if missing:
        device = devices.resolve_device(config.device)
        vae = components.load_vae(base_model, device)
        for path, square in progress(missing.items(), desc="Shots held out", unit="image"):
            save_image(components.reconstruct(vae, square), path)
    for stale in set(folder.glob("*.png")) - set(paths):
        stale.unlink()
    return paths
