"""What a picture shows: the truth that renderer and captions share, and how it is drawn by lot.

Everything is a frozen dataclass of words and numbers, so a picture can be compared, saved as JSON
and drawn again. Lengths are fractions of the picture's height; x runs from 0 to `aspect` (width
over height), y from 0 at the top to 1 at the bottom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bunny_lora.core.seeding import derive_seed

SPECIES = ("bunny", "cat", "bear", "fox", "mouse")
FURS = ("white", "grey", "brown", "orange", "cream", "black", "pink")
HERO_FURS = ("lilac", "sky", "crimson", "emerald")
EYES = ("brown", "blue", "green", "amber")
OUTFITS = ("none", "scarf", "shirt", "sweater", "dress", "overalls", "bow", "hat", "cape")
OUTFIT_COLOURS = ("red", "blue", "green", "yellow", "purple", "pink", "orange")
MARKS = ("none", "heart", "star", "moon", "bolt", "spot")
MARK_COLOURS = ("red", "white", "yellow", "blue")
EARS = ("plain", "bent", "bandaged", "dipped", "ringed")
EARS_OF = {
    "bunny": ("bent",),
    "cat": ("dipped", "ringed"),
    "bear": ("bandaged",),
    "fox": ("dipped", "ringed"),
}
"""The peculiar ears that a species can have."""
EXPRESSIONS = ("happy", "laughing", "sad", "surprised", "angry", "sleepy")
POSES = ("standing", "waving", "sitting", "running", "jumping", "sleeping", "cheering")
FACINGS = ("front", "left", "right")
PLACES = ("forest", "meadow", "beach", "snow", "city", "bedroom", "desert")
LIGHTS = ("day", "sunset", "night")
CAMERAS = ("close-up", "medium", "wide")
DETAILS = {
    "forest": ("mushrooms", "ferns", "logs"),
    "meadow": ("flowers", "fence", "butterflies"),
    "beach": ("palm", "umbrella", "sailboat"),
    "snow": ("snowman", "snowfall", "cabin"),
    "city": ("lamps", "stars", "billboard"),
    "bedroom": ("books", "plant", "balloons"),
    "desert": ("cacti", "rocks", "pyramids"),
}
_NAMES = """
    ellie phil rex victoria alma bobo chip dara enzo fern gus hazel iggy juno kiki lola milo nora
    otto pip quinn rosie sami tilly ugo vera wanda xena yara zeno bram cleo dodo elmo fritz gigi
    hugo ida jojo kai luna momo nils olga pepe ruby suki toto una vito
"""
NAMES = tuple(_NAMES.split())
"""Names for anybody: a random character may be called `ellie`, which keeps the word empty."""
BARE_CHEST = ("none", "scarf", "bow", "hat", "cape")
"""Outfits that leave the chest, and so a mark on it, in view."""


@dataclass(frozen=True)
class Traits:
    """What makes a character the same character in every picture."""

    species: str
    fur: str
    eyes: str
    outfit: str
    outfit_colour: str
    mark: str = "none"
    mark_colour: str = "white"
    ear: str = "plain"


@dataclass(frozen=True)
class Character:
    """A character at one moment: who, doing what, and where.

    `x`, `y` is the point on the ground between the feet, `height` the length from the ground to the
    top of the skull when standing (ears and species differences come on top), all in picture
    heights. `seed` settles small freedoms such as the exact place of a hand.
    """

    name: str
    traits: Traits
    expression: str
    pose: str
    facing: str
    x: float
    y: float
    height: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """Where it happens; `seed` settles the place of every tree."""

    place: str
    light: str
    camera: str
    details: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Picture:
    """The whole truth about one picture; the same picture can be drawn at any size of `aspect`."""

    scene: Scene
    characters: tuple[Character, ...]
    aspect: float

    def as_dict(self) -> dict[str, Any]:
        """Return the truth as nested dicts and lists, ready for JSON."""
        return asdict(self)


HEROES = {
    "ellie": Traits("bunny", "lilac", "green", "bow", "yellow", "heart", "red", "bent"),
    "phil": Traits("bear", "sky", "brown", "scarf", "red", "star", "yellow", "bandaged"),
    "rex": Traits("fox", "crimson", "amber", "hat", "green", "bolt", "white", "dipped"),
    "victoria": Traits("cat", "emerald", "blue", "cape", "purple", "moon", "yellow", "ringed"),
}
"""The cast to be learned. Their furs and their ears never occur in random sampling, nor does any
random character of a hero's species carry the hero's mark."""

REGULARS = {
    (species, fur): name
    for (species, fur), name in zip(
        [(species, fur) for species in SPECIES for fur in FURS],
        [name for name in NAMES if name not in HEROES],
        strict=False,
    )
}
"""Who is always called the same where the denoiser is taught, by species and fur: from them it learns
that a name can tell who is meant, though it never learns who the heroes are."""

_LIKE = {"lilac": ("purple", "pink"), "sky": ("blue",), "crimson": ("red",), "emerald": ("green",)}
"""The colours of things that can hardly be told from a hero's fur."""

HERO_MARKS = {traits.species: traits.mark for traits in HEROES.values()}


NEW_NAMES = tuple(name for name in NAMES if name not in HEROES and name not in REGULARS.values())
"""Names that the denoiser was never taught, as the heroes' own."""


def generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """Return a numpy generator for one purpose at one position."""
    return np.random.default_rng(derive_seed(seed, f"world {purpose}", *position))


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Return one of `options`, all equally likely."""
    return options[int(rng.integers(len(options)))]


def _regular_looks() -> dict[str, Traits]:
    looks = {}
    for (species, fur), name in REGULARS.items():
        rng = generator(0, f"regular {name}")
        outfit = pick(rng, OUTFITS[1:])
        bare = outfit in BARE_CHEST
        marks = [mark for mark in MARKS[1:] if mark != HERO_MARKS.get(species)]
        looks[name] = Traits(
            species=species,
            fur=fur,
            eyes=pick(rng, EYES),
            outfit=outfit,
            outfit_colour=pick(rng, [colour for colour in OUTFIT_COLOURS if colour != fur]),
            mark=pick(rng, marks) if bare else "none",
            mark_colour=pick(rng, [colour for colour in MARK_COLOURS if colour != fur]),
        )
    return looks


REGULAR_LOOKS = _regular_looks()
"""The whole look of each regular: what the denoiser may be shown when it is told the name alone."""


def random_name(rng: np.random.Generator) -> str:
    """Return a name that says nothing about who bears it, or "" for a nameless character."""
    return pick(rng, NAMES) if rng.random() < 0.65 else ""


def random_traits(rng: np.random.Generator) -> Traits:
    """Return a random character; never a hero, see `HEROES`."""
    species, outfit = pick(rng, SPECIES), pick(rng, OUTFITS)
    mark = "none"
    if outfit in BARE_CHEST and rng.random() < 0.4:
        mark = pick(rng, [m for m in MARKS[1:] if m != HERO_MARKS.get(species)])
    fur = pick(rng, FURS)
    colours = [colour for colour in OUTFIT_COLOURS if colour != fur]
    mark_colours = [colour for colour in MARK_COLOURS if colour != fur]
    return Traits(
        species=species,
        fur=fur,
        eyes=pick(rng, EYES),
        outfit=outfit,
        outfit_colour=pick(rng, colours),
        mark=mark,
        mark_colour=pick(rng, mark_colours),
    )


def any_traits(rng: np.random.Generator) -> Traits:
    """Return a character with any traits at all, furs and ears of heroes among them."""
    species, outfit = pick(rng, SPECIES), pick(rng, OUTFITS + BARE_CHEST)
    fur = pick(rng, FURS + HERO_FURS)
    ear = "plain"
    if species in EARS_OF and rng.random() < 0.6:
        ear = pick(rng, EARS_OF[species])
    if ear == "dipped" and fur in ("white", "cream"):  # nobody could tell
        ear = "plain"
    return Traits(
        species=species,
        fur=fur,
        eyes=pick(rng, EYES),
        outfit=outfit,
        outfit_colour=pick(rng, [colour for colour in OUTFIT_COLOURS if colour != fur]),
        mark=pick(rng, MARKS) if outfit in BARE_CHEST else "none",
        mark_colour=pick(rng, [colour for colour in MARK_COLOURS if colour != fur]),
        ear=ear,
    )


def fresh_heroes(seed: int) -> dict[str, Traits]:
    """Return four heroes by name, as new to the models as `HEROES` are and unlike them.

    Furs and ears are those that no random picture has, in other combinations; names are `NEW_NAMES`.
    No two share a species, a fur, eyes, an outfit or a mark, and no colour lies on its like.
    """
    rng = generator(seed, "fresh heroes")
    taken = {(traits.species, traits.fur) for traits in HEROES.values()}
    species = rng.permutation(list(EARS_OF))
    furs = rng.permutation(HERO_FURS)
    while any(pair in taken for pair in zip(species, furs, strict=True)):
        furs = rng.permutation(HERO_FURS)
    columns = (
        rng.permutation(NEW_NAMES),
        rng.permutation(EYES),
        rng.permutation([outfit for outfit in BARE_CHEST if outfit != "none"]),
        rng.permutation(MARKS[1:]),
    )
    cast = {}
    for kind, fur, name, eyes, outfit, mark in zip(species, furs, *columns, strict=False):
        cast[str(name)] = Traits(
            species=str(kind),
            fur=str(fur),
            eyes=str(eyes),
            outfit=str(outfit),
            outfit_colour=pick(rng, [c for c in OUTFIT_COLOURS if c not in _LIKE[fur]]),
            mark=str(mark),
            mark_colour=pick(rng, [c for c in MARK_COLOURS if c not in _LIKE[fur]]),
            ear=pick(rng, EARS_OF[str(kind)]),
        )
    return cast


def random_scene(rng: np.random.Generator, *, camera: str | None = None) -> Scene:
    """Return a random scene; the city is always at night."""
    place = pick(rng, PLACES)
    light = "night" if place == "city" else pick(rng, ("day", "day", "sunset", "night"))
    shown = tuple(detail for detail in DETAILS[place] if rng.random() < 0.5)
    camera = camera or pick(rng, ("close-up", "medium", "medium", "wide"))
    return Scene(place, light, camera, shown, int(rng.integers(2**31)))


def random_moment(rng: np.random.Generator, name: str, traits: Traits, camera: str) -> Character:
    """Return `traits` doing something that suits the camera, not yet placed (see `stage`)."""
    poses = ("standing", "waving", "sleeping", "cheering") if camera == "close-up" else POSES
    pose = pick(rng, poses)
    facing = pick(rng, FACINGS)
    if pose in ("running", "sleeping") and facing == "front":
        facing = pick(rng, ("left", "right"))
    return Character(
        name=name,
        traits=traits,
        expression="sleepy" if pose == "sleeping" else pick(rng, EXPRESSIONS),
        pose=pose,
        facing=facing,
        x=0.0,
        y=0.0,
        height=0.0,
        seed=int(rng.integers(2**31)),
    )


_HEIGHTS = {"close-up": (0.86, 1.0), "medium": (0.52, 0.62), "wide": (0.27, 0.36)}
_GROUNDS = {"close-up": (1.24, 1.30), "medium": (0.90, 0.96), "wide": (0.80, 0.93)}


def stage(
    rng: np.random.Generator, moments: Sequence[Character], camera: str, aspect: float
) -> tuple[Character, ...]:
    """Give each character its place and size, side by side and from the back to the front."""
    slots = rng.permutation(len(moments))
    margin = 0.3 if camera == "close-up" else 0.22
    span = aspect - 2 * margin
    placed = []
    for character, slot in zip(moments, slots, strict=True):
        height = rng.uniform(*_HEIGHTS[camera]) * (1.0 if len(moments) == 1 else 0.88)
        y = rng.uniform(*_GROUNDS[camera])
        if camera == "close-up":  # the head goes to the middle, whatever the pose does to it
            y = rng.uniform(0.56, 0.62) + height * (0.22 if character.pose == "sleeping" else 0.72)
        shift = 0.0
        if camera == "close-up" and character.pose == "sleeping":
            shift = 0.3 * height * (1 if character.facing == "left" else -1)
        if character.pose == "jumping":
            y = max(y, 0.9)
        centre = margin + span * (slot + 0.5) / len(moments)
        x = centre + shift + rng.uniform(-0.25, 0.25) * span / len(moments)
        placed.append(replace(character, x=float(x), y=float(y), height=float(height)))
    return tuple(sorted(placed, key=lambda character: character.y))


def random_picture(seed: int, index: int, *, aspect: float = 1.0) -> Picture:
    """Return the random picture at `index` of the stream that `seed` names.

    Three in four show one character, the rest two (never in a close-up). No hero ever appears.
    """
    rng = generator(seed, "picture", index)
    n_characters = 1 if rng.random() < 0.75 else 2
    scene = random_scene(rng, camera=None if n_characters == 1 else pick(rng, ("medium", "wide")))
    moments = [
        random_moment(rng, random_name(rng), random_traits(rng), scene.camera)
        for _ in range(n_characters)
    ]
    return Picture(scene, stage(rng, moments, scene.camera, aspect), aspect)


def hero_picture(
    names: Sequence[str],
    seed: int,
    index: int,
    *,
    aspect: float = 1.0,
    camera: str | None = None,
    heroes: Mapping[str, Traits] = HEROES,
) -> Picture:
    """Return a random scene with the named of `heroes` in it, at `index` of the stream of `seed`."""
    rng = generator(seed, "hero " + " ".join(names), index)
    scene = random_scene(rng, camera=camera or (None if len(names) == 1 else "wide"))
    moments = [random_moment(rng, name, heroes[name], scene.camera) for name in names]
    return Picture(scene, stage(rng, moments, scene.camera, aspect), aspect)
