"""The judgement of a run: the base model against the LoRA, same prompts, same seeds.

Has the pictures of `protocol` drawn into `<run>/evaluation/images/`, compares them with the training
data and writes `<run>/evaluation/eval.json`. What the numbers mean is said in `metrics`; on random base
weights they mean nothing, which is why eval.json carries the base model's name.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from bunny_lora.config import Config, load_config
from bunny_lora.core.files import read_json, write_json
from bunny_lora.core.image_file import read_metadata, save_image
from bunny_lora.core.paths import resolve
from bunny_lora.core.provenance import provenance
from bunny_lora.data.images import crop_around, open_rgb
from bunny_lora.dataset import Sample, read_samples
from bunny_lora.evaluation import metrics, protocol
from bunny_lora.evaluation.features import Features, load_features
from bunny_lora.evaluation.protocol import NEUTRAL, SUBJECT, Picture
from bunny_lora.model import devices, random_models
from bunny_lora.training import distributed, handover

SCHEMA_VERSION = 1
RANDOM = "random weights, so the pictures and numbers mean nothing"
FACE_TO_CROP = 2.5  # the crop's side over the face box's: face, ears and shoulders
MAX_CROPS = 200  # of one character; more are thinned out evenly
N_SHOWN_CROPS = 4
CROP_SIZE_PX = 256  # what features look at is no finer
CHUNK = 64  # images in memory at a time


@dataclass(frozen=True)
class Reference:
    """What the training data shows: square crops of each character, and all whole frames."""

    crops: dict[str, list[Image.Image]]
    frames: list[Path]

    @classmethod
    def load(cls, data_dir: Path) -> Reference:
        """Read the crops of every character, most frequent first."""
        samples = read_samples(data_dir)
        counts = Counter(name for sample in samples for name in sample.characters)
        named = sorted(counts, key=lambda name: (-counts[name], name))
        shows = {name: images_of(samples, name) for name in named}
        crops = {
            name: [crop_of(sample) for sample in thinned(shown)]
            for name, shown in (shows or {SUBJECT: samples}).items()
        }
        return cls(crops, [sample.path for sample in samples])


def evaluate(
    run_dir: str | Path, *, config: Config | None = None, data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Judge a run and return what `eval.json` then holds.

    Under `accelerate launch` the processes share the drawing; the run folder must be one for all.

    Args:
        run_dir: the run folder, with `final/`.
        config: prompts, seeds, sampling and features; None is the run's own. The base model and its
            precision are always the run's.
        data_dir: the prepared images the run was trained on; None is the configuration's `data_dir`.

    Raises:
        BunnyLoraError: no weights, no configuration or no prepared data.
    """
    run_dir = resolve(run_dir)
    config = config or load_config(run_dir / "config.yaml")
    data_dir = resolve(data_dir or config.data_dir)
    device = devices.resolve_device(config.device)
    look = load_features(config.evaluation.features, device.type)
    with distributed.together(device) as group:
        models = protocol.find_models(run_dir, config)
        data = Reference.load(data_dir)
        plan = protocol.plan_pictures(config, list(data.crops), [model.name for model in models])
        protocol.draw(run_dir, models, plan, config, group)
        return group.told_by_main(
            lambda: _judge(run_dir, config, data, look, models[-1].identity, plan)
        )


def _judge(
    run_dir: Path,
    config: Config,
    data: Reference,
    look: Features,
    identity: dict[str, Any],
    plan: list[Picture],
) -> dict[str, Any]:
    shown = save_shown_crops(run_dir, data)
    result = {
        "schema_version": SCHEMA_VERSION,
        "base_model": identity["base_model"],
        "warning": RANDOM if identity["base_model"] in random_models.STANDINS else None,
        "run_info": run_info(run_dir, config) | {"final": identity},
        "settings": settings(config, data),
        **score(run_dir, plan, data, look),
        "training_crops": shown,
    }
    write_json(run_dir / "evaluation" / "eval.json", result)
    if (run_dir / "config.yaml").is_file():
        handover.write_handover(run_dir, load_config(run_dir / "config.yaml"), means(result))
    return result


def means(result: dict[str, Any]) -> dict[str, Any]:
    """Return the mean of every measure, of base model and LoRA: what is handed on."""
    found: dict[str, Any] = {"features": result["settings"]["features"], "warning": result["warning"]}
    for name in ("base", "final"):
        measures = result["models"][name]["all"]
        found[name] = {measure: value and value["mean"] for measure, value in measures.items()}
    return found


# ---------------------------------------------------------------------------- training data


def images_of(samples: list[Sample], name: str) -> list[Sample]:
    """Return the images that show this character most surely.

    That is alone, with no second face that might be a passer-by's; where there are none of these, named
    alone; where there are none either, named among others.
    """
    named = [sample for sample in samples if name in sample.characters]
    alone = [sample for sample in named if len(sample.characters) == 1]
    return [sample for sample in alone if len(sample.faces) < 2] or alone or named


def thinned(samples: list[Sample]) -> list[Sample]:
    """Return at most `MAX_CROPS` samples, evenly spaced."""
    return samples[:: -(-len(samples) // MAX_CROPS)] if samples else []


def crop_of(sample: Sample) -> Image.Image:
    """Return the square around the largest face, or the middle of a frame without one."""
    frame = open_rgb(sample.path)
    if sample.faces:
        face = max(sample.faces, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        frame = crop_around(frame, face, FACE_TO_CROP)
    return ImageOps.fit(frame, (CROP_SIZE_PX, CROP_SIZE_PX))


def save_shown_crops(run_dir: Path, data: Reference) -> dict[str, list[str]]:
    """Keep a few crops of each character in the run, for grids that outlive the training data."""
    shown = {}
    for character, crops in data.crops.items():
        chosen = crops[:: -(-len(crops) // N_SHOWN_CROPS)]
        names = [
            f"images/training/{protocol.slug(character)}-{index}.png" for index in range(len(chosen))
        ]
        for crop, name in zip(chosen, names, strict=True):
            save_image(crop, run_dir / "evaluation" / name)
        shown[character] = names
    return shown


# ---------------------------------------------------------------------------- scores


def score(run_dir: Path, plan: list[Picture], data: Reference, look: Features) -> dict[str, Any]:
    """Return the measures of every model, their differences, drift, and the data's own scores."""
    characters = list(data.crops)
    crops = [look(images) for images in data.crops.values()]
    frames = look_at(look, data.frames)
    vectors = look_at(look, [run_dir / "evaluation" / picture.file for picture in plan])

    def rows(model: str, neutral: bool) -> list[int]:
        chosen = [(p.model, p.character == NEUTRAL) == (model, neutral) for p in plan]
        return [index for index, wanted in enumerate(chosen) if wanted]

    judged, pictures = {}, [asdict(p) | {"file": p.file} for p in plan]
    for model in dict.fromkeys(picture.model for picture in plan):
        mine = rows(model, neutral=False)
        own = torch.tensor([characters.index(plan[index].character) for index in mine])
        judged[model] = metrics.judge(vectors[mine], own, crops, frames)
        nearest = metrics.max_copy(vectors[mine], frames)[1]
        for position, index in enumerate(mine):
            scores = {name: float(values[position]) for name, values in judged[model].scores.items()}
            pictures[index] |= rounded(scores) | {"nearest_frame": data.frames[nearest[position]].name}
    drift = metrics.drift(vectors[rows("base", neutral=True)], vectors[rows("final", neutral=True)])
    return {
        "models": {model: table(images, characters) for model, images in judged.items()},
        "differences": table(judged["final"], characters, judged["base"]),
        "drift": as_dict(metrics.interval(drift)),
        "reference": reference_scores(characters, crops, frames),
        "seconds_per_image": seconds_per_image(run_dir, plan),
        "pictures": pictures,
    }


def look_at(look: Features, paths: list[Path]) -> torch.Tensor:
    """Return unit vectors [N, D] of image files, cut to the square that training sees."""
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    return torch.cat([look([open_square(path) for path in chunk]) for chunk in chunks])


def open_square(path: Path) -> Image.Image:
    """Return the middle square of an image file."""
    return ImageOps.fit(open_rgb(path), (CROP_SIZE_PX, CROP_SIZE_PX))


def table(
    judged: metrics.Judged, characters: list[str], base: metrics.Judged | None = None
) -> dict[str, Any]:
    """Return every measure for all images and for each character that has any."""
    found = {"all": as_dicts(metrics.summarise(judged, base)), "characters": {}}
    for index, name in enumerate(characters):
        if len((mine := judged.of(index)).own):
            summary = metrics.summarise(mine, base.of(index) if base else None)
            found["characters"][name] = as_dicts(summary)
    return found


def reference_scores(
    characters: list[str], crops: list[torch.Tensor], frames: torch.Tensor
) -> dict[str, Any]:
    """Return what the training data scores itself: what a perfect model could be expected to reach."""
    alone = torch.zeros(max(map(len, crops)), dtype=torch.long)
    likeness = [metrics.consistency_interval(rows, alone[: len(rows)]) for rows in crops]
    return {
        "likeness_of_crops": {
            name: as_dict(value) for name, value in zip(characters, likeness, strict=True)
        },
        "separation_of_crops": as_dict(metrics.interval(metrics.separation_of_crops(crops))),
        "nearest_other_frame": as_dict(metrics.interval(metrics.nearest_other(frames))),
        "chance_level": metrics.chance_level(len(characters)),
        "n_crops": {name: len(rows) for name, rows in zip(characters, crops, strict=True)},
        "n_frames": len(frames),
    }


def as_dicts(found: dict[str, metrics.Interval | None]) -> dict[str, Any]:
    """Return intervals as JSON takes them."""
    return {name: as_dict(value) for name, value in found.items()}


def as_dict(value: metrics.Interval | None) -> dict[str, Any] | None:
    """Return one interval as JSON takes it."""
    return None if value is None else rounded(value._asdict())


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Round floats to what float32 arithmetic can promise."""
    return {key: round(v, 5) if isinstance(v, float) else v for key, v in values.items()}


# ---------------------------------------------------------------------------- beside the scores


def settings(config: Config, data: Reference) -> dict[str, Any]:
    """Return what must be equal for two evaluations to be comparable."""
    return {
        "features": config.evaluation.features,
        "characters": list(data.crops),
        "prompts": config.evaluation.prompts,
        "neutral_prompts": list(
            dict.fromkeys(p.prompt for p in protocol.pictures_of(config, "base", NEUTRAL))
        ),
        "num_images_per_prompt": config.evaluation.num_images_per_prompt,
        "seed": config.evaluation.seed,
        "resolution": config.resolution,
        **config.sampling.model_dump(),
    }


def run_info(run_dir: Path, config: Config) -> dict[str, Any]:
    """Return where the run and this evaluation came from."""
    record = run_dir / "provenance.json"
    return {
        "config": config.model_dump(mode="json"),
        "trained_by": read_json(record) if record.is_file() else None,
        "evaluated_by": provenance(),
    }


def seconds_per_image(run_dir: Path, plan: list[Picture]) -> float:
    """Return the median time of drawing one image, whenever it was drawn."""
    files = [run_dir / "evaluation" / picture.file for picture in plan]
    return round(statistics.median((read_metadata(file) or {})["seconds"] for file in files), 3)
