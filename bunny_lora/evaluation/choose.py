"""Which checkpoint, LoRA scale and guidance a run is to be drawn with.

Every checkpoint is scored by its loss, in seconds; pictures are drawn with a few of them, at several
LoRA scales and guidances, and judged on both axes and by their drift. `choosing` has the rule; the
answer goes to `evaluation/choice.json`, and to `handover.json`, as which the run is drawn from then on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bunny_lora.config import Config, load_config
from bunny_lora.core import choice as choice_file
from bunny_lora.core.choice import Candidate, CheckpointLoss, Choice
from bunny_lora.core.paths import resolve
from bunny_lora.data.shots import shots
from bunny_lora.dataset import Sample
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import cutouts, following, metrics, protocol, world_traits
from bunny_lora.evaluation.choosing import Point, Verdict, choose_point
from bunny_lora.evaluation.drift import seed_distance
from bunny_lora.evaluation.features import FeatureExtractor, load_feature_extractor
from bunny_lora.evaluation.following import PromptReader
from bunny_lora.evaluation.intervals import prompt_interval
from bunny_lora.evaluation.judge import Reference, extract_files
from bunny_lora.evaluation.protocol import NEUTRAL, ImageSpec, Model
from bunny_lora.evaluation.traits import normalised
from bunny_lora.model import devices
from bunny_lora.prepare import read_split
from bunny_lora.training import distributed, handover
from bunny_lora.training.held_out_loss import checkpoint_losses

Judge = Callable[[Sequence[ImageSpec]], tuple[torch.Tensor, torch.Tensor | None]]
MAX_FRAMES = 24  # that the loss is of; more are thinned out evenly


@dataclass(frozen=True)
class Way:
    """One way of drawing; `lora_scale` and `guidance_scale` None are the configuration's."""

    model: Model
    step: int
    lora_scale: float | None = None
    guidance_scale: float | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is how the run draws unless told otherwise."""
        return (self.model.name, self.lora_scale, self.guidance_scale) == ("final", None, None)

    def of(self, specs: Sequence[ImageSpec]) -> list[ImageSpec]:
        """Return images, drawn in this way."""
        return [
            replace(
                spec,
                model=self.model.name,
                lora_scale=self.lora_scale,
                guidance_scale=self.guidance_scale,
            )
            for spec in specs
        ]

    def of_base(self, specs: Sequence[ImageSpec]) -> list[ImageSpec]:
        """Return images, drawn by the base model with the same guidance."""
        return [replace(spec, model="base", guidance_scale=self.guidance_scale) for spec in specs]


def choose(
    run_dir: str | Path, *, config: Config | None = None, data_dir: str | Path | None = None
) -> Choice:
    """Choose how a run is drawn with, write it down and return what `choice.json` then holds.

    Args:
        run_dir: the run folder, with `final/` and `config.yaml`.
        config: prompts, seeds, features or traits, and `evaluation.choose`; None is the run's own.
        data_dir: the prepared images the run was trained on; None is the configuration's `data_dir`.

    Raises:
        BunnyLoraError: no weights, no configuration, no prepared data, or no such checkpoint.
    """
    run_dir = resolve(run_dir)
    run_config = _config_of(run_dir)
    config = config or run_config
    data_dir = resolve(data_dir or config.data_dir)
    device = devices.resolve_device(config.device)
    extractor = load_feature_extractor(config.evaluation.features, device.type)
    with distributed.process_group(device) as group:
        base, *models = protocol.find_models(run_dir, config)
        steps = {model.name: _step(model, run_config) for model in models}
        data = Reference.load(data_dir, config)
        kept, held = read_split(run_config, data_dir)
        frames = (held or kept)[:: -(-len(held or kept) // MAX_FRAMES)]
        losses = group.broadcast_from_main(lambda: loss_table(run_config, models, steps, frames))
        names = shortlist(losses, config, held_out=bool(held))
        ways = ways_of([model for model in models if model.name in names], models[-1], steps, config)
        bench = Bench.of(run_dir, config, extractor, list(data.crops))
        plan = bench.plan(ways)
        protocol.generate_missing(run_dir, [base, *models], plan, config, group)

        def judge_and_write() -> Choice:
            drawn = [spec for spec in plan if spec.character in data.crops]
            judge = judge_of(run_dir, config, extractor, data, drawn, bench.nobody)
            verdict, candidates = bench.choose(ways, judge)
            best = ways[verdict.chosen].model
            choice = Choice(
                judged_by="traits" if config.evaluation.traits else extractor.name,
                held_out=bool(held),
                n_frames=len(frames),
                losses=losses,
                candidates=candidates,
                chosen=verdict.chosen,
                tied=verdict.tied,
                why=_why(ways, verdict),
                weights_sha256=str(best.identity["weights_sha256"]),
                final_sha256=str(models[-1].identity["weights_sha256"]),
            )
            _say_what_gives_way(run_dir, choice)
            choice_file.write(run_dir, choice)
            handover.write_handover(run_dir, run_config)
            return choice

        return group.broadcast_from_main(judge_and_write)


def _say_what_gives_way(run_dir: Path, choice: Choice) -> None:
    before = choice_file.find(run_dir)
    if before and before.by_hand and before.best.label != choice.best.label:
        print(
            f"{before.best.label} was handed on by hand, and gives way to what the rule says now:"
            f" {choice.best.label}. Hand it on again if it is still meant."
        )


def _config_of(run_dir: Path) -> Config:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise BunnyLoraError(
            f"{run_dir} is no run: there is no config.yaml in it. Name the folder of a run that was"
            " trained to its end, such as outputs/lora_weights."
        )
    return load_config(path)


def _step(model: Model, run_config: Config) -> int:
    is_final = model.name == "final"
    return run_config.training.max_train_steps if is_final else int(model.name.rpartition("-")[2])


# ---------------------------------------------------------------------------- what is tried


def loss_table(
    run_config: Config, models: Sequence[Model], steps: dict[str, int], frames: Sequence[Sample]
) -> list[CheckpointLoss]:
    """Return the loss of every checkpoint on the same frames, with the same noise."""
    folders = {model.name: model.folder for model in models if model.folder is not None}
    dtype = getattr(torch, models[-1].identity["dtype"])
    losses = checkpoint_losses(run_config, folders, frames, dtype)
    lowest = min(losses.values(), key=lambda values: float(values.mean()))
    shot = shots([frame.path for frame in frames])
    who = sorted({name for frame in frames for name in frame.characters})
    showing = {name: torch.tensor([name in f.characters for f in frames]) for name in who}
    return [
        CheckpointLoss(
            model=name,
            step=steps[name],
            loss=prompt_interval(values, shot),
            above_lowest=prompt_interval(values - lowest, shot),
            characters={name: float(values[rows].mean()) for name, rows in showing.items()},
        )
        for name, values in losses.items()
    ]


def shortlist(losses: Sequence[CheckpointLoss], config: Config, *, held_out: bool) -> list[str]:
    """Return which checkpoints pictures are drawn with; the last one always is among them.

    Raises:
        BunnyLoraError: `evaluation.choose.checkpoints` names a step that has none.
    """
    wanted = config.evaluation.choose
    by_step = {loss.step: loss.model for loss in losses}
    if missing := [step for step in wanted.checkpoints if step not in by_step]:
        raise BunnyLoraError(
            f"evaluation.choose.checkpoints names step {missing[0]}, of which there is no checkpoint."
            f" There are {', '.join(map(str, by_step))}; those equal to final/ are left out."
        )
    if wanted.checkpoints:
        return [by_step[step] for step in wanted.checkpoints]
    *earlier, last = losses
    if held_out:  # else the loss says how well frames are known by heart
        earlier.sort(key=lambda loss: loss.loss.mean)
        return [loss.model for loss in (*earlier[: wanted.n_shortlist - 1], last)]
    places = torch.linspace(len(losses) - 1, 0, wanted.n_shortlist + 1).round().int().tolist()[:-1]
    return [losses[place].model for place in sorted(set(places))]


def ways_of(models: Sequence[Model], last: Model, steps: dict[str, int], config: Config) -> list[Way]:
    """Return every way of drawing that is tried, the run's own first."""
    wanted, own = config.evaluation.choose, config.sampling
    wanted_guidances = wanted.guidances or [own.guidance_scale]
    guidances = [g if g != own.guidance_scale else None for g in wanted_guidances]
    scales = [None if scale == own.lora_scale else scale for scale in wanted.scales]
    ways = [Way(last, steps[last.name])]
    for model, scale, guidance in itertools.product(models, scales, guidances):
        ways.append(Way(model, steps[model.name], scale, guidance))
    return list({(w.model.name, w.lora_scale, w.guidance_scale): w for w in ways}.values())


# ---------------------------------------------------------------------------- how it is judged


def judge_of(
    run_dir: Path,
    config: Config,
    extractor: FeatureExtractor,
    data: Reference,
    drawn: Sequence[ImageSpec],
    nobody: Sequence[ImageSpec],
) -> Judge:
    """Return what scores images of characters: the reader of traits if the configuration names any.

    Features alone tell identity; `evaluation.prompt_features` tells what was asked for, if it is set.

    Args:
        run_dir: the run's folder.
        config: says who judges.
        extractor: the features.
        data: has the characters' crops.
        drawn: all images of characters, those of the base model among them.
        nobody: the base model's images of the same prompts without a name.
    """
    base = [spec for spec in drawn if spec.model == "base"]
    if config.evaluation.traits:
        return world_traits.Judge.of_run(run_dir, config, [*base, *nobody])
    matches = _matches(run_dir, config, drawn)
    crops = {name: extractor(images) for name, images in data.crops.items()}

    def similarity(specs: Sequence[ImageSpec]) -> torch.Tensor:
        files = [run_dir / "evaluation" / spec.file for spec in specs]
        pairs = zip(cutouts.look(files, extractor), specs, strict=True)
        return torch.cat([cutouts.likeness(seen[None], crops[spec.character]) for seen, spec in pairs])

    floors = similarity(base)
    who = [spec.character for spec in base]

    def judge(specs: Sequence[ImageSpec]) -> tuple[torch.Tensor, torch.Tensor | None]:
        values = similarity(specs)
        for name, rows in crops.items():
            mine = torch.tensor([spec.character == name for spec in specs])
            floor = float(floors[torch.tensor([one == name for one in who])].mean())
            ceiling = float(metrics.consistency(rows).mean()) if len(rows) > 1 else 1.0
            values[mine] = normalised(values[mine], floor, ceiling)
        return values, torch.tensor([matches[spec.file] for spec in specs]) if matches else None

    return judge


def _matches(run_dir: Path, config: Config, drawn: Sequence[ImageSpec]) -> dict[str, float]:
    """Return how well each image shows what its prompt asks, by its file; empty where nothing tells."""
    if not (name := config.evaluation.prompt_features):
        return {}
    device = devices.resolve_device(config.device)
    return following.following(run_dir, config, drawn, PromptReader(name, device.type))[1]


@dataclass(frozen=True)
class Bench:
    """What every way draws, and how that is compared: images of characters, and of nobody."""

    run_dir: Path
    config: Config
    extractor: FeatureExtractor
    characters: list[ImageSpec]
    nobody: list[ImageSpec]

    @classmethod
    def of(
        cls, run_dir: Path, config: Config, extractor: FeatureExtractor, names: Sequence[str]
    ) -> Bench:
        """Return the images of an evaluation, those of nobody as many a prompt as of characters."""
        few, seed = range(config.evaluation.num_images_per_prompt), config.evaluation.seed
        characters = [spec for name in names for spec in protocol.specs_of(config, "base", name)]
        nobody = [
            spec
            for spec in protocol.specs_of(config, "base", NEUTRAL)
            if spec.seed in [protocol.image_seed(seed, spec.prompt_index, image) for image in few]
        ]
        return cls(run_dir, config, extractor, characters, nobody)

    def plan(self, ways: Sequence[Way]) -> list[ImageSpec]:
        """Return all images to draw, the base model's among them."""
        plan = list(self.characters)
        for way in ways:
            plan += [*way.of(self.characters), *way.of(self.nobody), *way.of_base(self.nobody)]
        return list(dict.fromkeys(plan))

    def choose(self, ways: Sequence[Way], judge: Judge) -> tuple[Verdict, list[Candidate]]:
        """Return what the rule says of the ways, and how each was judged."""
        clusters = [(spec.character, spec.prompt) for spec in self.characters]
        points = [self._point(way, judge) for way in ways]
        verdict = choose_point(points, clusters, [spec.prompt for spec in self.nobody])
        judged = zip(ways, points, strict=True)
        return verdict, [self._candidate(way, point, clusters) for way, point in judged]

    def _scales(self, way: Way) -> tuple[float, float]:
        """Return a way's LoRA scale and guidance in numbers."""
        settings = protocol.generation_settings(way.of(self.characters[:1])[0], self.config)
        return settings.lora_scale, settings.guidance_scale

    def _point(self, way: Way, judge: Judge) -> Point:
        identity, asked = judge(way.of(self.characters))
        lora_scale, guidance_scale = self._scales(way)
        away = abs(guidance_scale - self.config.sampling.guidance_scale)
        order = (float(not way.is_own), float(way.step), lora_scale, away)
        return Point(identity, asked, self._drift(way), order)

    def _drift(self, way: Way) -> torch.Tensor | None:
        """Return how far each image of nobody moved, over what another seed moves it."""
        base, drawn = (
            _vectors(self.run_dir, self.extractor, specs)
            for specs in (way.of_base(self.nobody), way.of(self.nobody))
        )
        between_seeds = seed_distance(base, [spec.prompt for spec in self.nobody])
        return metrics.drift(base, drawn) / between_seeds if between_seeds else None

    def _candidate(self, way: Way, point: Point, clusters: Sequence[object]) -> Candidate:
        nobody = [spec.prompt for spec in self.nobody]
        asked, drift = point.asked, point.drift
        lora_scale, guidance_scale = self._scales(way)
        return Candidate(
            model=way.model.name,
            step=way.step,
            lora_scale=lora_scale,
            guidance_scale=guidance_scale,
            identity=prompt_interval(point.identity, clusters),
            asked=None if asked is None else prompt_interval(asked, clusters),
            drift=None if drift is None else prompt_interval(drift, nobody),
            files=[spec.file for spec in way.of(self.characters)],
        )


def _vectors(run_dir: Path, extractor: FeatureExtractor, specs: Sequence[ImageSpec]) -> torch.Tensor:
    return extract_files(extractor, [run_dir / "evaluation" / spec.file for spec in specs])


def _why(ways: Sequence[Way], verdict: Verdict) -> str:
    """Say the choice in a sentence: over what the others dropped out, and who is tied."""
    if len(ways) == 1:
        return "nothing else was tried"
    said = {"asked": "in what is asked for", "identity": "in identity", "drift": "in drift"}
    behind = [f"{len(places)} {said[axis]}" for axis, places in verdict.dropped.items() if places]
    text = f"of {len(ways) - 1} others {', '.join(behind) or 'none'} clearly behind"
    if not verdict.tied:
        return text
    rule = "the run's own way" if ways[verdict.chosen].is_own else "the earliest and weakest"
    return f"{text}; {len(verdict.tied)} tied with it, and it is {rule}"
