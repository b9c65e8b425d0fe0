"""Samples that learn from the model itself instead of from their picture, so without its noise.

Two kinds: what the LoRA is not to change is learnt of the model without it (`preservation`), and what
a name means of the model that is told its bearer's looks (`naming`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch

from bunny_lora.config import Config
from bunny_lora.core.seeding import generator
from bunny_lora.data.captions import caption_parts, find_name, names_any, without_names
from bunny_lora.model import diffusion
from bunny_lora.training.batch import Batch

# Of preserved samples: half of guidance is the empty prompt, and a class stands for other subjects.
EMPTY, CLASS = 0.25, 0.25
# Parts of a caption that stay beside a name: many of them tell looks, and a name that is always told
# with its looks need not mean any.
KEPT_PARTS = 0.3
N_TIMESTEPS = 1000
# Below it, a noisy picture shows who is in it, and words say nothing new.
LEAST_TIMESTEP = 350


@dataclass(frozen=True)
class Lesson:
    """What a sample learns: the model's prediction of `caption` with its LoRA at `lora_scale`.

    It learns it at that scale, too; what the model predicts without its LoRA, at 1.
    """

    caption: str
    weight: float
    lora_scale: float = 0.0

    @property
    def learnt_at(self) -> float:
        """The LoRA scale at which the sample learns."""
        return self.lora_scale or 1.0


def preserved_rows(config: Config, position: int) -> list[int]:
    """Return which samples of a micro-batch are preserved: spread evenly over the positions."""
    share = config.preservation.share
    rows = range(config.training.batch_size)
    return [row for row in rows if _begins(position + row, share)]


def naming_rows(config: Config, position: int) -> list[int]:
    """Return which samples teach names: spread evenly over the positions that are not preserved."""
    preserved = config.preservation.share
    share = config.naming.share / (1 - preserved)
    places = [position + row for row in range(config.training.batch_size)]
    return [
        row
        for row, place in enumerate(places)
        if not _begins(place, preserved) and _begins(place - math.floor(place * preserved), share)
    ]


def _begins(place: int, share: float) -> bool:
    """Whether one more of so many in a row is due at this place."""
    return math.floor((place + 1) * share) > math.floor(place * share)


def with_lessons(
    batch: Batch,
    position: int,
    config: Config,
    names: Collection[str],
    fits: Callable[[str], bool],
) -> tuple[Batch, dict[int, Lesson]]:
    """Return a micro-batch with the captions of its lessons, and the lessons by their rows.

    The timesteps of all others are drawn as `training.timestep_bias_multiplier` says.

    Args:
        batch: as it is drawn.
        position: of its first sample in the stream.
        config: says how many samples learn what.
        names: everybody in the data set.
        fits: whether the text encoder takes a caption in as a whole.
    """
    training, preservation, naming = config.training, config.preservation, config.naming
    seed, looks = training.seed, config.looks if naming.share else {}
    captions, timesteps = list(batch.captions), batch.timesteps.clone()
    begin, end = training.timestep_bias_begin, training.timestep_bias_end
    biased = diffusion.biased_timesteps(
        timesteps, (begin, end, training.timestep_bias_multiplier), N_TIMESTEPS
    )
    lessons: dict[int, Lesson] = {}
    for row in preserved_rows(config, position):
        random = generator(seed, "preservation", position + row)
        class_prompt = config.prior_preservation.class_prompt
        captions[row] = _preserved_caption(captions[row], names, class_prompt, random)
        lessons[row] = Lesson(captions[row], preservation.weight)
    for row in naming_rows(config, position):
        random = generator(seed, "naming", position + row)
        captions[row], told = _told(_of_one(captions[row], looks, random), looks, fits)
        lessons[row] = Lesson(told, naming.weight, naming.lora_scale)
        timesteps[row] = LEAST_TIMESTEP + timesteps[row] * (N_TIMESTEPS - LEAST_TIMESTEP) // N_TIMESTEPS
    for row in set(range(len(captions))) - lessons.keys():
        timesteps[row] = biased[row]
    for row in noisy_rows(config, timesteps):
        if row not in lessons:
            captions[row], told = _told(captions[row], looks, fits)
            lessons[row] = Lesson(told, preservation.weight)
    return replace(batch, captions=captions, timesteps=timesteps), lessons


def noisy_rows(config: Config, timesteps: torch.Tensor) -> list[int]:
    """Return which samples are so noisy that they are preserved, names and all.

    Few pictures are learnt by heart there first, which https://arxiv.org/abs/2507.05964 answers with a
    lower rank.
    """
    least = config.preservation.from_timestep
    return [] if least is None else (timesteps >= least).nonzero().flatten().tolist()


def _preserved_caption(
    caption: str, names: Collection[str], class_prompt: str, random: torch.Generator
) -> str:
    """Return a caption of preservation; without known names nobody could be taken out of it."""
    chance = float(torch.rand((), generator=random))
    if chance < EMPTY:
        return ""
    if chance < EMPTY + CLASS or not names:
        return class_prompt
    return without_names(caption, names)


def _of_one(caption: str, looks: Mapping[str, str], random: torch.Generator) -> str:
    """Return a name, by lot, and few of a caption's parts that name nobody.

    Of all names, not of those in the caption: who is rare, and never alone, is taught as often. Most of
    what words decide is decided before the noisy picture shows who was in it.
    """
    name = list(looks)[int(torch.randint(len(looks), (), generator=random))]
    parts = caption_parts(caption)[1:]
    draws = torch.rand(len(parts), generator=random)
    kept = [part for part, draw in zip(parts, draws, strict=True) if draw < KEPT_PARTS]
    return name + "".join(part for part in kept if not names_any(part, looks))


def _told(caption: str, looks: Mapping[str, str], fits: Callable[[str], bool]) -> tuple[str, str]:
    """Return a caption, and the same with the looks of all whom it names; the same if it names nobody.

    The last parts without a name are left out of both until the longer one fits.
    """
    parts = caption_parts(caption)
    while (longer := with_looks_told("".join(parts), looks)) != "".join(parts) and not fits(longer):
        free = [place for place, part in enumerate(parts) if place and not names_any(part, looks)]
        if not free:
            break
        del parts[free[-1]]
    return "".join(parts), longer


def with_looks_told(caption: str, looks: Mapping[str, str]) -> str:
    """Return a caption that says after each name, where it first comes, what its bearer looks like."""
    found = {match.end(): looks[name] for name in looks if (match := find_name(caption, name))}
    for end in sorted(found, reverse=True):
        caption = f"{caption[:end]}, {found[end]}{caption[end:]}"
    return caption
