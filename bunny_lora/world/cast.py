"""A cast of regulars, whose names tell all of a look.

In a real Stable Diffusion the name of a known cartoon character stands for fur, eyes and clothes at
once. A denoiser that never met such a name has no use for one, and a LoRA has nothing to tie a hero to.
So a cast goes through its pictures, each member with one look for good; heroes are none of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from bunny_lora.world.attributes import (
    BARE_CHEST,
    EYES,
    HERO_MARKS,
    NAMES,
    REGULARS,
    Picture,
    Traits,
    generator,
    pick,
    random_moment,
    random_picture,
    random_scene,
    random_traits,
    stage,
)

N_MEMBERS = 120
_CAMERAS = ("close-up",) * 4 + ("medium",) * 5 + ("wide",)
_ALONE = 0.8


def made_up_name(rng: np.random.Generator) -> str:
    """Return a word that is in no list, such as "tabiko"."""
    n_syllables = int(rng.integers(2, 4))
    return "".join(
        "bdfghjklmnprstvwz"[rng.integers(17)] + "aeiou"[rng.integers(5)] for _ in range(n_syllables)
    )


@cache
def cast() -> dict[str, Traits]:
    """Return the looks of `N_MEMBERS` members by name.

    The first bear the names in `REGULARS`, with the species and fur that go with them; the others' are
    made up. All but a few have a bare chest, and most of them a mark on it.
    """
    rng = generator(0, "cast")
    members = {name: _look(rng, *look) for look, name in REGULARS.items()}
    while len(members) < N_MEMBERS:
        name, traits = made_up_name(rng), random_traits(rng)
        if name not in NAMES:
            members[name] = _look(rng, traits.species, traits.fur)
    return members


def _look(rng: np.random.Generator, species: str, fur: str) -> Traits:
    """Return a random look of a species and fur, more often one with a mark than `random_traits`."""
    while True:
        traits = replace(random_traits(rng), species=species, fur=fur)
        bare = traits.outfit in BARE_CHEST
        clash = fur in (traits.outfit_colour, traits.mark_colour)
        if not clash and (bare or rng.random() < 0.3) and _may_wear(traits):
            break
    return replace(traits, eyes=pick(rng, EYES))


def _may_wear(traits: Traits) -> bool:
    return traits.mark == "none" or traits.mark != HERO_MARKS.get(traits.species)


def cast_picture(seed: int, index: int) -> Picture:
    """Return the picture at `index` of the stream of the cast: one member, now and then two."""
    rng = generator(seed, "cast picture", index)
    n_members = 1 if rng.random() < _ALONE else 2
    camera = pick(rng, _CAMERAS if n_members == 1 else ("medium", "wide"))
    scene = random_scene(rng, camera=camera)
    names = [str(name) for name in rng.choice(list(cast()), n_members, replace=False)]
    moments = [random_moment(rng, name, cast()[name], camera) for name in names]
    return Picture(scene, stage(rng, moments, camera, 1.0), 1.0)


def lesson_picture(seed: int, index: int) -> Picture:
    """Return what the denoiser learns from: random pictures and those of the cast, in turns."""
    half, of_cast = divmod(index, 2)
    return cast_picture(seed, half) if of_cast else random_picture(seed, half)
