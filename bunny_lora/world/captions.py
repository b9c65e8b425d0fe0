"""Captions in the manner of stage 4's `sd_caption`, from a small closed vocabulary.

What is said, in which words and in which order is drawn by lot; what is drawn is never misnamed.
Names say nothing about who bears them, but for the regulars', whose looks may go unsaid. Of the heroes
a caption tells the species, sometimes clothes and a rough colour, never the ear: as with a language
model that looks at a frame, most of what makes them themselves goes unsaid.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from bunny_lora.world.attributes import (
    DETAILS,
    NAMES,
    OUTFIT_COLOURS,
    REGULAR_LOOKS,
    Character,
    Picture,
    generator,
    pick,
)

Table = Mapping[str, tuple[str, ...]]
MAX_WORDS = 30
"""Words and commas of a caption; with start and end they fill the 32 tokens of the text encoder."""

_SPECIES = {
    "bunny": ("bunny", "bunny", "rabbit", "hare"),
    "cat": ("cat", "cat", "kitten"),
    "bear": ("bear", "bear", "cub"),
    "fox": ("fox",),
    "mouse": ("mouse",),
}
_FUR = {
    "white": ("white",),
    "grey": ("grey", "gray"),
    "brown": ("brown",),
    "orange": ("orange", "ginger"),
    "cream": ("cream", "beige"),
    "black": ("black", "dark"),
    "pink": ("pink",),
    "lilac": ("purple",),
    "sky": ("blue",),
    "crimson": ("red",),
    "emerald": ("green",),
}
_OUTFITS = {
    "scarf": ("a {} scarf",),
    "shirt": ("a {} shirt",),
    "sweater": ("a {} sweater", "a striped {} sweater"),
    "dress": ("a {} dress",),
    "overalls": ("{} overalls",),
    "bow": ("a {} bow",),
    "hat": ("a {} hat",),
    "cape": ("a {} cape",),
}
_WEARING = ("wearing", "with", "in")
_MARKS = {
    "heart": ("heart",),
    "star": ("star",),
    "moon": ("moon", "crescent"),
    "bolt": ("bolt", "lightning"),
    "spot": ("spot",),
}
_EXPRESSIONS = {
    "happy": ("happy", "smiling"),
    "laughing": ("laughing", "laughing out loud"),
    "sad": ("sad", "unhappy"),
    "surprised": ("surprised", "astonished"),
    "angry": ("angry", "cross"),
    "sleepy": ("sleepy", "tired"),
}
_POSES = {
    "standing": ("standing", "standing still"),
    "waving": ("waving", "waving a paw"),
    "sitting": ("sitting", "sitting down"),
    "running": ("running", "running fast"),
    "jumping": ("jumping", "jumping high"),
    "sleeping": ("sleeping", "lying asleep"),
    "cheering": ("cheering", "both arms up"),
}
_FACINGS = {
    "front": ("facing the viewer", "looking ahead"),
    "left": ("facing left", "looking left"),
    "right": ("facing right", "looking right"),
}
_PLACES = {
    "forest": ("forest", "in the forest", "in the woods"),
    "meadow": ("meadow", "in a meadow", "in a green meadow"),
    "beach": ("beach", "on the beach", "by the sea"),
    "snow": ("snow", "in the snow", "winter snow"),
    "city": ("city", "in the city at night", "city at night"),
    "bedroom": ("bedroom", "in a bedroom", "in the bedroom"),
    "desert": ("desert", "in the desert", "sandy desert"),
}
_LIGHTS = {
    "day": ("day", "sunny day"),
    "sunset": ("sunset", "at sunset", "evening"),
    "night": ("night", "at night", "moonlight"),
}
_CAMERAS = {
    "close-up": ("closeup", "portrait"),
    "medium": ("medium shot",),
    "wide": ("wide shot", "from far away"),
}
_DETAILS = {detail: (detail,) for details in DETAILS.values() for detail in details}
_STYLE = ("cartoon", "cartoon style", "detailed cartoon")
_KINDS = ("animated character", "cartoon character", "animated character")
_FRAME_WORDS = "and a an is are eyes on the chest of in at animated characters scene no one with"


class _Teller:
    """Says things about one picture with the luck of one generator."""

    def __init__(self, rng: np.random.Generator, eyes_said: float = 0.35) -> None:
        self.rng, self.eyes_said = rng, eyes_said

    def say(self, table: Table, key: str) -> str:
        return pick(self.rng, table[key])

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def looks(self, character: Character, *, brief: bool) -> str:
        """Return e.g. "grey rabbit with blue eyes in a red scarf"."""
        traits, hero = character.traits, character.traits.ear != "plain"
        words = []
        if self.chance(0.5 if hero else 0.96):
            words.append(self.say(_FUR, traits.fur))
        words.append(self.say(_SPECIES, traits.species))
        eyes = not brief and self.chance(0.1 if hero else self.eyes_said)
        if eyes:
            words.append(f"with {traits.eyes} eyes")
        if traits.outfit != "none" and self.chance(0.5 if hero else 0.9):
            joint = pick(self.rng, ("and", "wearing") if eyes else _WEARING)
            words.append(f"{joint} {self.outfit(character)}")
        return " ".join(words)

    def outfit(self, character: Character) -> str:
        traits = character.traits
        phrase = self.say(_OUTFITS, traits.outfit).format(traits.outfit_colour)
        return phrase.replace("a orange", "an orange")

    def mark(self, character: Character) -> str:
        traits = character.traits
        return f"a {traits.mark_colour} {self.say(_MARKS, traits.mark)} on the chest"


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|,", text.lower())


def _fit(head: list[str], extras: list[tuple[float, str]], order: Iterable[int]) -> str:
    """Join head and extras, leaving out the least important extras until `MAX_WORDS` hold them."""
    kept = sorted(extras, reverse=True)
    while kept and len(_words(", ".join([*head, *(text for _, text in kept)]))) > MAX_WORDS:
        kept.pop()
    texts = {text for _, text in kept}
    shuffled = [extras[i][1] for i in order if extras[i][1] in texts]
    return ", ".join([*head, *shuffled])


def _surroundings(teller: _Teller, picture: Picture) -> list[tuple[float, str]]:
    scene = picture.scene
    extras = []
    if teller.chance(0.96):
        extras.append((9.0, teller.say(_PLACES, scene.place)))
    if scene.place != "city" and teller.chance(0.3 if scene.light == "day" else 0.8):
        extras.append((6.0, teller.say(_LIGHTS, scene.light)))
    if teller.chance(0.3 if scene.camera == "medium" else 0.7):
        extras.append((4.0, teller.say(_CAMERAS, scene.camera)))
    for detail in scene.details:
        if teller.chance(0.35):
            extras.append((2.0, teller.say(_DETAILS, detail)))
    if teller.chance(0.4):
        extras.append((1.0, pick(teller.rng, _STYLE)))
    return extras


def _deeds(teller: _Teller, character: Character, camera: str) -> list[tuple[float, str]]:
    extras = []
    hidden = camera == "close-up" and character.pose == "standing"
    if not hidden and teller.chance(0.92):
        extras.append((8.0, teller.say(_POSES, character.pose)))
    if character.pose != "sleeping":
        if teller.chance(0.7):
            extras.append((7.0, teller.say(_EXPRESSIONS, character.expression)))
        hero = character.traits.ear != "plain"
        if character.traits.mark != "none" and teller.chance(0.15 if hero else 0.7):
            extras.append((5.0, teller.mark(character)))
    if teller.chance(0.25 if character.facing == "front" else 0.5):
        extras.append((3.0, teller.say(_FACINGS, character.facing)))
    return extras


def caption(picture: Picture, seed: int, *, eyes_said: float = 0.35) -> str:
    """Return a caption of at most `MAX_WORDS` words and commas, all from `vocabulary()`.

    The same picture and seed give the same words. A picture without characters is called a scene.
    `eyes_said` is the share of looks of others than heroes that name the eyes.
    """
    teller = _Teller(generator(seed, "caption", picture.scene.seed), eyes_said)
    extras = _surroundings(teller, picture)
    if not picture.characters:
        return _fit(["animated scene"], extras, teller.rng.permutation(len(extras)))
    if len(picture.characters) > 1:
        return _fit(_company(teller, picture), extras, teller.rng.permutation(len(extras)))
    (character,) = picture.characters
    head = [character.name] if character.name else []
    if teller.chance(0.8 if head else 0.4):
        head.append(pick(teller.rng, _KINDS))
    if REGULAR_LOOKS.get(character.name) != character.traits or teller.chance(0.5):
        head.append(teller.looks(character, brief=False))
    extras = _deeds(teller, character, picture.scene.camera) + extras
    return _fit(head, extras, teller.rng.permutation(len(extras)))


def plain_caption(picture: Picture) -> str:
    """Return all that can be asked for of a picture of one character, in plain words."""
    (character,) = picture.characters
    traits, scene = character.traits, picture.scene
    looks = f"{_FUR[traits.fur][0]} {_SPECIES[traits.species][0]} with {traits.eyes} eyes"
    if traits.outfit != "none":
        looks += " and " + _OUTFITS[traits.outfit][0].format(traits.outfit_colour)
    deeds = [_POSES[character.pose][0]]
    if character.pose != "sleeping":
        deeds.insert(0, _EXPRESSIONS[character.expression][0])
    place = _PLACES[scene.place][0]
    light = [_LIGHTS[scene.light][0]] if scene.place != "city" else []
    return ", ".join([looks, *deeds, place, *light, _CAMERAS[scene.camera][0]])


def _company(teller: _Teller, picture: Picture) -> list[str]:
    """Return the head of a caption of several: the names, then a few words on each."""
    people = sorted(picture.characters, key=lambda character: (not character.name, character.x))
    names = [character.name for character in people if character.name]
    head = [" and ".join(names)] if names else []
    if teller.chance(0.5):
        head.append("animated characters")
    described = people if len(people) <= 2 else [c for c in people if c.name][:4]
    for character in described:
        if len(people) <= 2:
            looks = teller.looks(character, brief=True)
        else:
            looks = teller.say(_SPECIES, character.traits.species)
        head.append(_article(f"{looks} {_POSES[character.pose][0]}"))
    while len(_words(", ".join(head))) > MAX_WORDS - 4:
        head.pop()
    return head


def scene_description(picture: Picture, seed: int) -> str:
    """Return one sentence on the picture, as a person would say it; capitalised, no full stop."""
    teller = _Teller(generator(seed, "description", picture.scene.seed))
    place = _PLACES[picture.scene.place][1]
    at = {"day": "", "sunset": " at sunset", "night": " at night"}[picture.scene.light]
    if picture.scene.place == "city":
        at = ""
    if not picture.characters:
        return f"No one {place}{at}"
    parts = []
    for character in picture.characters:
        looks = _article(teller.looks(character, brief=True))
        who = f"{character.name.capitalize()}, {looks}," if character.name else looks
        parts.append(f"{who} {character.pose}")
    sentence = " and ".join(parts) + f" {place}{at}"
    return sentence[0].upper() + sentence[1:]


def vocabulary() -> list[str]:
    """Return every word (lower case) and mark that captions and descriptions can hold, sorted."""
    tables: tuple[Table, ...] = (_SPECIES, _FUR, _OUTFITS, _MARKS, _EXPRESSIONS, _POSES, _FACINGS)
    tables += (_PLACES, _LIGHTS, _CAMERAS, _DETAILS)
    texts = [text for table in tables for row in table.values() for text in row]
    texts += [*_STYLE, *_KINDS, *_WEARING, *NAMES, *OUTFIT_COLOURS, *_POSES, _FRAME_WORDS]
    texts += ["brown blue green amber white red yellow", ","]
    return sorted({word for text in texts for word in _words(text)})
