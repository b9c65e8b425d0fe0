"""What the denoiser learns from: pictures, where in them it matters, and what they are called.

Half of the pictures show regulars in their whole look (`attributes.REGULAR_LOOKS`), whose looks may go
unsaid: so a name can come to stand for clothes, eyes and a mark, which is what a LoRA later asks of a
hero's. Everybody else is described, whatever the name.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from bunny_lora.world import attributes
from bunny_lora.world.attributes import (
    EYES,
    MARK_COLOURS,
    REGULAR_LOOKS,
    REGULARS,
    Character,
    Picture,
    hero_picture,
    pick,
    random_picture,
)
from bunny_lora.world.captions import caption
from bunny_lora.world.pretraining.data import as_rows
from bunny_lora.world.renderer import render_array

_REGULARS, _PAIRS = 0.5, 0.2
_CHARACTER, _DETAIL = 4.0, 24.0
_NO_CAPTION, _NEW_NAME = 0.1, 0.15
_EYES_SAID = 0.7
_DETAIL_VALUE = 4


def lesson_picture(seed: int, index: int) -> Picture:
    """Return the picture at `index` of the denoiser's stream: regulars, or anybody but heroes."""
    rng = attributes.generator(seed, "lesson", index)
    if rng.random() >= _REGULARS:
        return random_picture(seed, index)
    n_characters = 2 if rng.random() < _PAIRS else 1
    names = [str(name) for name in rng.choice(list(REGULAR_LOOKS), n_characters, replace=False)]
    camera = pick(rng, ("medium", "wide")) if n_characters > 1 else None
    return hero_picture(names, seed, index, camera=camera, heroes=REGULAR_LOOKS)


def lesson_rows(seed: int, index: int, size: int) -> np.ndarray:
    """Return a picture of the stream as `as_rows` does, its map being 4 where eyes and marks are.

    They are what changes in a drawing of the same picture with other eyes and marks of other colours.
    """
    picture = lesson_picture(seed, index)
    rows = as_rows(picture, size)
    others = replace(
        picture,
        characters=tuple(
            replace(
                character,
                traits=replace(
                    character.traits,
                    eyes=_next(EYES, character.traits.eyes),
                    mark_colour=_next(MARK_COLOURS, character.traits.mark_colour),
                ),
            )
            for character in picture.characters
        ),
    )
    changed = (render_array(others, (size, size)) != rows[:3].transpose(1, 2, 0)).any(axis=-1)
    rows[3][changed] = _DETAIL_VALUE
    return rows


def _next(options: tuple[str, ...], option: str) -> str:
    return options[(options.index(option) + len(options) // 2) % len(options)]


def importance(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Return how much each place of the latents counts, float32 [N, side, side], of maps [N, H, W].

    A character counts `_CHARACTER` times the background: it is small, and most of what a prompt asks
    for is about it. Eyes and marks, a few places at most, would not be learnt if they counted no more.
    """
    there = F.adaptive_avg_pool2d((maps > 1).float(), side)
    details = F.adaptive_max_pool2d((maps == _DETAIL_VALUE).float(), side)
    return 1 + (_CHARACTER - 1) * there + (_DETAIL - _CHARACTER) * details


def training_caption(picture: Picture, seed: int, *position: int) -> str:
    """Return what the model is told about a picture at one position of training.

    A new caption each time, now and then nothing, for guidance. Whoever has a name, and is not in a
    regular's whole look, is called by the regulars' for such a fur or, to no purpose, by a name made up
    of syllables.
    """
    rng = attributes.generator(seed, "training caption", *position)
    if rng.random() < _NO_CAPTION:
        return ""
    people = [replace(c, name=_name(rng, c)) if c.name else c for c in picture.characters]
    picture = replace(picture, characters=tuple(people))
    return caption(picture, int(rng.integers(2**31)), eyes_said=_EYES_SAID)


def _name(rng: np.random.Generator, character: Character) -> str:
    if REGULAR_LOOKS.get(character.name) == character.traits:
        return character.name
    if rng.random() < _NEW_NAME:
        return made_up_name(rng)
    return REGULARS[character.traits.species, character.traits.fur]


def made_up_name(rng: np.random.Generator) -> str:
    """Return a word that is in no list, such as "tabiko"."""
    n_syllables = int(rng.integers(2, 4))
    return "".join(
        "bdfghjklmnprstvwz"[rng.integers(17)] + "aeiou"[rng.integers(5)] for _ in range(n_syllables)
    )
