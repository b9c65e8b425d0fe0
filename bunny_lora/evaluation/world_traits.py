"""Traits read by Bunny World's own reader, off a run's images and off renders of its characters."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from bunny_lora.config import Config
from bunny_lora.core.eval_result import Interval, TraitScore, TraitScores
from bunny_lora.data.images import open_rgb
from bunny_lora.evaluation import traits as axes
from bunny_lora.evaluation.protocol import NEUTRAL, ImageSpec
from bunny_lora.evaluation.traits import Reading, Traits
from bunny_lora.model import components

SIZE_PX = 128
N_RENDERS = 8
"""Renders of a character for each prompt: the ceiling."""
ALL, CEILING = "all", "ceiling"


@dataclass(frozen=True)
class Group:
    """Images of one source, "base" or "ceiling" for one: what each should show, and what was read."""

    characters: list[str]
    prompts: list[str]
    read: Reading

    def of(self, character: str) -> Group:
        """Return those of one character, or of nobody for `NEUTRAL`."""
        return self.rows([row for row, name in enumerate(self.characters) if name == character])

    def rows(self, rows: Sequence[int]) -> Group:
        """Return those at these places."""
        read = {question: answers[list(rows)] for question, answers in self.read.items()}
        return Group([self.characters[i] for i in rows], [self.prompts[i] for i in rows], read)

    def clusters(self) -> list[tuple[str, str]]:
        """Return what makes images alike beside their seed."""
        return list(zip(self.characters, self.prompts, strict=True))


def trait_scores(
    run_dir: Path, config: Config, plan: Sequence[ImageSpec]
) -> tuple[TraitScores | None, list[dict[str, str]]]:
    """Return what the reader sees in a run's images, and what it took each of them for.

    None and nothing for each where the configuration names no traits.

    Raises:
        BunnyLoraError: a trait or an answer that the reader does not know.
    """
    if not config.evaluation.traits:
        return None, [{} for _ in plan]
    right = _right(config)
    drawn = _group(run_dir, plan)
    models = [spec.model for spec in plan]
    groups = {
        model: drawn.rows([row for row, name in enumerate(models) if name == model])
        for model in dict.fromkeys(models)
    }
    base = groups["base"]
    ceiling, floor = _ceiling(config, right, base), _nobody(config, base)
    return summarise(right, groups, ceiling, floor), right.answers(drawn.read)


def summarise(
    right: Traits, groups: Mapping[str, Group], ceiling: Group, floor: Group | None = None
) -> TraitScores:
    """Return the scores of every model's images, between those of `floor`, or "base", and `ceiling`."""
    names = [name for name in dict.fromkeys(ceiling.characters) if right.of(name)]
    everything = {**groups, CEILING: ceiling}
    bounds = (floor or groups["base"], ceiling)
    of_nobody = {model: group.of(NEUTRAL) for model, group in groups.items()}
    return TraitScores(
        counted=[trait for trait in right.counted if any(trait in right.of(name) for name in names)],
        identity={model: _identity(right, group, bounds, names) for model, group in groups.items()},
        asked={source: _asked(right, group, names) for source, group in everything.items()},
        another={source: _another(right, group, names) for source, group in everything.items()},
        nobody={
            model: axes.clustered_interval(right.shows_a_hero(group.read).float(), group.prompts)
            for model, group in of_nobody.items()
            if group.prompts
        },
        traits={name: _traits(right, name, groups, ceiling, floor) for name in names},
        confusion=_confusion(right, groups["final"], names),
    )


@dataclass(frozen=True)
class Judge:
    """Reads single images: how far they are from the base model, 0, to the character itself, 1.

    Attributes:
        run_dir: whose images are read, from its `evaluation/`.
        right: what each character is like.
        floor: images of the base model, 0, see `_nobody`.
        ceiling: renders of the characters, as the same prompts ask.
    """

    run_dir: Path
    right: Traits
    floor: Group
    ceiling: Group

    @classmethod
    def of_run(cls, run_dir: Path, config: Config, base: Sequence[ImageSpec]) -> Judge:
        """Return the judge of a run, with `base` the base model's images of characters and nobody.

        Raises:
            BunnyLoraError: a trait or an answer that the reader does not know.
        """
        right, group = _right(config), _group(run_dir, base)
        return cls(run_dir, right, _nobody(config, group) or group, _ceiling(config, right, group))

    def __call__(self, specs: Sequence[ImageSpec]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return identity and what was asked for of images of characters, [N] each, in their order.

        NaN where the reader has nothing to tell: no traits, or a prompt that asks for nothing; None
        where no prompt does.
        """
        group = _group(self.run_dir, specs)
        identity = torch.full((len(specs),), float("nan"))
        for name in dict.fromkeys(group.characters):
            if self.right.of(name):
                rows = torch.tensor([character == name for character in group.characters])
                identity[rows] = self._placed(group.of(name), name)
        asked = axes.as_asked(group.read, group.prompts, self.right.asked())
        return identity, asked if asked.isfinite().any() else None

    def _placed(self, part: Group, name: str) -> torch.Tensor:
        return _placed(self.right, part, name, self.floor, self.ceiling)


def _right(config: Config) -> Traits:
    from bunny_lora.world import traits as world

    return Traits(world.QUESTIONS, config.evaluation.traits, world.reliable_questions())


def _placed(right: Traits, part: Group, name: str, floor_of: Group, ceiling: Group) -> torch.Tensor:
    """Return identity of each image of one character, [N]."""
    floor, top = (
        float(torch.tensor(list(_means(right, source, name).values())).mean())
        for source in (floor_of, ceiling)
    )
    sure = torch.stack(list(right.scores(part.read, name).values())).mean(0)
    return axes.normalised(sure, floor, top)


def _traits(
    right: Traits, name: str, groups: Mapping[str, Group], ceiling: Group, floor: Group | None
) -> dict[str, TraitScore]:
    nobody = _means(right, floor, name) if floor else {}
    means = {model: _means(right, group, name) for model, group in groups.items()}
    best = _means(right, ceiling, name)
    return {
        trait: TraitScore(
            answer=answer,
            ceiling=best[trait],
            models={model: found[trait] for model, found in means.items() if found},
            floor=nobody.get(trait),
        )
        for trait, answer in right.of(name).items()
    }


def _means(right: Traits, group: Group, name: str) -> dict[str, float]:
    """Return how sure the reader is of each right answer; nothing of a character without images."""
    scores = right.scores(group.of(name).read, name)
    return {trait: float(p.mean()) for trait, p in scores.items() if len(p)}


def _identity(
    right: Traits, group: Group, bounds: tuple[Group, Group], names: Sequence[str]
) -> dict[str, Interval]:
    """Return identity between floor and ceiling, over all images and over those of each character."""
    values, clusters, found = [], [], {}
    for name in names:
        part = group.of(name)
        if not part.prompts:
            continue
        placed = _placed(right, part, name, *bounds)
        found[name] = axes.clustered_interval(placed, part.clusters())
        values.append(placed)
        clusters += part.clusters()
    return {ALL: axes.clustered_interval(torch.cat(values), clusters)} | found


def _asked(right: Traits, group: Group, names: Sequence[str]) -> Interval:
    parts = [group.of(name) for name in names]
    values = [axes.as_asked(part.read, part.prompts, right.asked()) for part in parts]
    return axes.clustered_interval(torch.cat(values), [c for part in parts for c in part.clusters()])


def _another(right: Traits, group: Group, names: Sequence[str]) -> Interval:
    parts = {name: group.of(name) for name in names}
    values = [right.is_another(part.read, name).float() for name, part in parts.items()]
    clusters = [c for part in parts.values() for c in part.clusters()]
    return axes.clustered_interval(torch.cat(values), clusters)


def _confusion(right: Traits, group: Group, names: Sequence[str]) -> list[list[float | None]]:
    table = axes.confusion(group.read, names, group.characters, right)
    return [[None if np.isnan(share) else round(float(share), 4) for share in row] for row in table]


# ---------------------------------------------------------------------------- images


def _group(run_dir: Path, specs: Sequence[ImageSpec]) -> Group:
    images = [open_rgb(run_dir / "evaluation" / spec.file) for spec in specs]
    return Group([spec.character for spec in specs], [spec.prompt for spec in specs], _read(images))


def _read(images: Sequence[Image.Image]) -> Reading:
    from bunny_lora.world import traits as world

    squares = [ImageOps.fit(image, (SIZE_PX, SIZE_PX)) for image in images]
    pixels = np.stack([np.asarray(square) for square in squares])
    return world.read_traits(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def _nobody(config: Config, base: Group) -> Group | None:
    """Return what identity counts from where prompts tell looks: the base model's images of nobody.

    It draws much of a character by words alone, and has its own place between floor and ceiling then.
    None where they tell none: there it counts from the base model's images of the same prompts.
    """
    if not any("{looks}" in prompt for prompt in config.evaluation.prompts):
        return None
    nobody = base.of(NEUTRAL)
    names = [name for name in dict.fromkeys(base.characters) if name in config.evaluation.traits]
    whole = nobody.rows([row for _ in names for row in range(len(nobody.characters))])
    who = [name for name in names for _ in nobody.characters]
    return Group(who, whole.prompts, whole.read)


def _ceiling(config: Config, right: Traits, base: Group) -> Group:
    """Return renders of each character as its prompts ask, as the autoencoder gives them back."""
    wanted = [
        (name, prompt, _items(right.right[name]), _items(axes.asked_for(prompt, right.questions)))
        for name, prompt in dict.fromkeys(base.clusters())
        if name in config.evaluation.traits
    ]
    return _rendered(tuple(wanted))


Items = tuple[tuple[str, str], ...]


def _items(answers: Mapping[str, str]) -> Items:
    return tuple(answers.items())


@functools.lru_cache(maxsize=1)  # `choose` asks for the same as `evaluate` before it
def _rendered(wanted: tuple[tuple[str, str, Items, Items], ...]) -> Group:
    """Return what is read off renders; of each kind who it is, a prompt, traits, and what is asked."""
    from bunny_lora.world.asked import camera_of, render_as_asked

    each = [one for one in wanted for _ in range(N_RENDERS)]
    renders = [
        render_as_asked(
            dict(traits), dict(asked), camera=camera_of(prompt), number=number, size_px=SIZE_PX
        )
        for number, (_, prompt, traits, asked) in enumerate(each)
    ]
    vae = components.load_vae(components.BUNNY_WORLD, torch.device("cpu"))
    images = [components.reconstruct(vae, render) for render in renders]
    return Group([one[0] for one in each], [one[1] for one in each], _read(images))
