"""The judgement of a run: the base model against the LoRA, same prompts, same seeds.

Has the pictures of `protocol` drawn into `<run>/evaluation/images/`, compares them with the training
data and writes `<run>/evaluation/eval.json`, whose keys `core.eval_result` describes. How the numbers
come about is said in `metrics`; on random base weights they mean nothing, and the file says so.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from bunny_lora.config import Config, load_config
from bunny_lora.core import eval_result
from bunny_lora.core.eval_result import (
    EvalResult,
    EvalSettings,
    ImageScores,
    ReferenceScores,
    RunInfo,
    ScoreTable,
)
from bunny_lora.core.files import read_json
from bunny_lora.core.image_file import read_metadata, save_image
from bunny_lora.core.paths import resolve
from bunny_lora.core.provenance import provenance
from bunny_lora.data.captions import find_name
from bunny_lora.data.images import open_rgb
from bunny_lora.dataset import Sample
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import (
    anchors,
    checklist,
    company,
    copies,
    cutouts,
    drift,
    following,
    metrics,
    protocol,
    world_traits,
)
from bunny_lora.evaluation.cutouts import CROP_SIZE_PX
from bunny_lora.evaluation.features import FeatureExtractor, load_feature_extractor
from bunny_lora.evaluation.following import PromptReader
from bunny_lora.evaluation.protocol import NEUTRAL, NOBODY, SUBJECT, ImageSpec
from bunny_lora.model import components, devices, prompts, random_models
from bunny_lora.prepare import read_split
from bunny_lora.training import distributed, handover

RANDOM = "random weights, so the pictures and numbers mean nothing"
N_SHOWN_CROPS = 4
CHUNK = 64  # images in memory at a time


@dataclass(frozen=True)
class Reference:
    """What the training data shows: square crops of each character, and all whole frames."""

    crops: dict[str, list[Image.Image]]
    samples: list[Sample]

    @property
    def frames(self) -> list[Path]:
        """Where the frames lie."""
        return [sample.path for sample in self.samples]

    @classmethod
    def load(cls, data_dir: Path, config: Config) -> Reference:
        """Read the crops of every character, most frequent first.

        Raises:
            BunnyLoraError: no data, or nobody is named in them.
        """
        samples, _ = read_split(config, data_dir)
        counts = Counter(name for sample in samples for name in sample.characters)
        named = sorted(counts, key=lambda name: (-counts[name], name))
        shown = samples if named else subject_of(samples, config)
        found = cutouts.references(shown, named or [SUBJECT], cutouts.tied_faces(shown, config))
        crops = {name: [cutout.image() for cutout in cut] for name, cut in found.items()}
        return cls(crops, samples)


def evaluate(
    run_dir: str | Path, *, config: Config | None = None, data_dir: str | Path | None = None
) -> EvalResult:
    """Evaluate a run and return what `eval.json` then holds.

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
    extractor = load_feature_extractor(config.evaluation.features, device.type)
    asked = config.evaluation.prompt_features
    reader = PromptReader(asked, device.type) if asked else None
    with distributed.process_group(device) as group:
        models = protocol.find_models(run_dir, config)
        data = Reference.load(data_dir, config)
        plan = protocol.plan_images(config, list(data.crops), [model.name for model in models])
        of_two = company.plan_pairs(config, list(data.crops))
        whole = plan + [spec.image for spec in of_two]
        if group.is_main:
            _say_untold(config, list(data.crops))
            _say_doubts(whole, models[-1].identity["base_model"])
        protocol.generate_missing(run_dir, models, whole, config, group)
        return group.broadcast_from_main(
            lambda: _score_and_write(
                run_dir, config, data, extractor, reader, models[-1].identity, plan, of_two
            )
        )


def _say_untold(config: Config, characters: list[str]) -> None:
    untold = [name for name in characters if name not in config.looks]
    if untold and any("{looks}" in prompt for prompt in config.evaluation.prompts):
        print(f"looks: nothing of {', '.join(untold)}, so {{looks}} is left out of their prompts")


def _say_doubts(plan: list[ImageSpec], base_model: str) -> None:
    tokenizer = components.load_tokenizer(base_model)
    for doubt in prompts.doubts((spec.prompt for spec in plan), tokenizer):
        print(f"Prompts of the evaluation: {doubt}")


def _score_and_write(
    run_dir: Path,
    config: Config,
    data: Reference,
    extractor: FeatureExtractor,
    reader: PromptReader | None,
    identity: dict[str, Any],
    plan: list[ImageSpec],
    of_two: list[company.PairSpec],
) -> EvalResult:
    crops = [extractor(images) for images in data.crops.values()]
    frames = extract_files(extractor, data.frames)
    vectors = extract_files(extractor, [run_dir / "evaluation" / spec.file for spec in plan])
    characters = list(data.crops)
    scores = score_models(plan, vectors, characters, crops, frames)
    named = [spec for spec in plan if spec.character in data.crops]
    placed, places = anchors.identity_scores(
        run_dir, config, named, data.crops, crops, extractor, identity["base_model"]
    )
    asked, matches = following.following(run_dir, config, named, reader)
    drifts = drift.drift_scores(plan, vectors)
    read, answers = world_traits.trait_scores(run_dir, config, plan)
    result = EvalResult(
        base_model=identity["base_model"],
        warning=RANDOM if identity["base_model"] in random_models.RANDOM_MODELS else None,
        run_info=run_info(run_dir, config, identity),
        settings=settings(config, characters),
        models={model: table(found, characters) for model, found in scores.items()},
        differences=table(scores["final"], characters, scores["base"]),
        drift=drifts["templates"].moved,
        drift_ratio=drifts["templates"].ratio,
        drifts=drifts,
        copies=copies.copies_of(run_dir, config, data.samples, extractor, plan, vectors),
        traits=read,
        identity=placed,
        following=asked,
        colour=following.colour(run_dir, named, data.crops),
        pairs=company.pair_scores(
            run_dir, of_two, dict(zip(characters, crops, strict=True)), extractor, placed
        ),
        reference=reference_scores(characters, crops, frames),
        seconds_per_image=seconds_per_image(run_dir, plan),
        images=[
            image.model_copy(
                update={"identity": places.get(image.file), "following": matches.get(image.file)}
            )
            for image in image_scores(plan, scores, data, crops, frames, answers)
        ],
        training_crops=save_shown_crops(run_dir, data),
    )
    eval_result.write(run_dir, result)
    checklist.write_checklist(run_dir, config.evaluation.checklist, result.images)
    if (run_dir / "config.yaml").is_file():
        handover.write_handover(run_dir, load_config(run_dir / "config.yaml"), result.means())
    return result


# ---------------------------------------------------------------------------- training data


def subject_of(samples: list[Sample], config: Config) -> list[Sample]:
    """Return the images of the one that `instance_prompt` names, where captions name no one else.

    Raises:
        BunnyLoraError: it names nobody: a class, or something that no caption says.
    """
    prompt = config.instance_prompt
    shown = [sample for sample in samples if prompt and find_name(sample.caption, prompt)]
    if prompt == config.prior_preservation.class_prompt or not shown:
        raise BunnyLoraError(
            "Nobody is named in the training data, so there is nobody to judge: tell the names or"
            " trigger words that its captions have, with character_names: [ellie, rex] (--set"
            " 'character_names=[ellie, rex]'). Nothing has to be trained again for that."
        )
    return [replace(sample, characters=(SUBJECT,)) for sample in shown]


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


def rows_of(plan: list[ImageSpec], model: str) -> list[int]:
    """Return which images of the plan are one model's, of prompts that name a character."""
    return [i for i, s in enumerate(plan) if s.model == model and s.character not in NOBODY]


def score_models(
    plan: list[ImageSpec],
    vectors: torch.Tensor,
    characters: list[str],
    crops: list[torch.Tensor],
    frames: torch.Tensor,
) -> dict[str, metrics.Scores]:
    """Return the scores of every model's images that name a character, in the order of the plan."""
    scores = {}
    for model in dict.fromkeys(spec.model for spec in plan):
        rows = rows_of(plan, model)
        labels = torch.tensor([characters.index(plan[row].character) for row in rows])
        scores[model] = metrics.score(vectors[rows], labels, crops, frames)
    return scores


def image_scores(
    plan: list[ImageSpec],
    scores: dict[str, metrics.Scores],
    data: Reference,
    crops: list[torch.Tensor],
    frames: torch.Tensor,
    answers: list[dict[str, str]],
) -> list[ImageScores]:
    """Return every image of the plan with its own scores, and with what was read off it."""
    characters = list(data.crops)
    found: list[dict[str, Any]] = [
        asdict(spec) | {"file": spec.file, "read": read}
        for spec, read in zip(plan, answers, strict=True)
    ]
    for model, of_model in scores.items():
        nearest = metrics.memorisation(of_model.vectors, frames)[1]
        alike = metrics.centroid_cosines(of_model.vectors, crops).argmax(1).tolist()
        for position, row in enumerate(rows_of(plan, model)):
            found[row] |= {name: float(values[position]) for name, values in of_model.values.items()}
            found[row] |= {
                "nearest_frame": data.frames[nearest[position]].name,
                "nearest_character": characters[alike[position]],
            }
    return [ImageScores(**image) for image in found]


def extract_files(extractor: FeatureExtractor, paths: list[Path]) -> torch.Tensor:
    """Return unit vectors [N, D] of image files, cut to the square that training sees."""
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    return torch.cat([extractor([open_square(path) for path in chunk]) for chunk in chunks])


def open_square(path: Path) -> Image.Image:
    """Return the middle square of an image file."""
    return ImageOps.fit(open_rgb(path), (CROP_SIZE_PX, CROP_SIZE_PX))


def table(
    scores: metrics.Scores, characters: list[str], base: metrics.Scores | None = None
) -> ScoreTable:
    """Return every measure for all images and for each character that has any."""
    found = {}
    for index, name in enumerate(characters):
        if len((of_character := scores.of(index)).labels):
            found[name] = metrics.summarise(of_character, base.of(index) if base else None)
    return ScoreTable(all=metrics.summarise(scores, base), characters=found)


def reference_scores(
    characters: list[str], crops: list[torch.Tensor], frames: torch.Tensor
) -> ReferenceScores:
    """Return what the training data scores itself: what a perfect model could be expected to reach."""
    alone = torch.zeros(max(map(len, crops)), dtype=torch.long)
    similarity = [metrics.consistency_interval(rows, alone[: len(rows)]) for rows in crops]
    separation, nearest = metrics.separation_of_crops(crops), metrics.nearest_other(frames)
    return ReferenceScores(
        similarity_of_crops=dict(zip(characters, similarity, strict=True)),
        separation_of_crops=metrics.interval(separation) if len(separation) else None,
        nearest_other_frame=metrics.interval(nearest) if len(nearest) else None,
        chance_level=metrics.chance_level(len(characters)),
        n_crops={name: len(rows) for name, rows in zip(characters, crops, strict=True)},
        n_frames=len(frames),
    )


# ---------------------------------------------------------------------------- beside the scores


def settings(config: Config, characters: list[str]) -> EvalSettings:
    """Return what must be equal for two evaluations to be comparable."""
    return EvalSettings(
        **config.evaluation.model_dump(),
        characters=characters,
        looks=config.looks,
        neutral_prompts=protocol.prompts_of(config, NEUTRAL),
        resolution=config.resolution,
        **config.sampling.model_dump(),
    )


def run_info(run_dir: Path, config: Config, identity: dict[str, Any]) -> RunInfo:
    """Return where the run and this evaluation came from."""
    record = run_dir / "provenance.json"
    return RunInfo(
        config=config.model_dump(mode="json"),
        trained_by=read_json(record) if record.is_file() else None,
        evaluated_by=provenance(),
        final=identity,
    )


def seconds_per_image(run_dir: Path, plan: list[ImageSpec]) -> float:
    """Return the median time of drawing one image, whenever it was drawn."""
    files = [run_dir / "evaluation" / spec.file for spec in plan]
    return round(statistics.median((read_metadata(file) or {})["seconds"] for file in files), 3)
