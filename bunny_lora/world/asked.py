"""A character as a prompt asks for it: what a perfect model would draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from PIL import Image

from bunny_lora.world.attributes import (
    Character,
    Picture,
    generator,
    random_moment,
    random_scene,
    random_traits,
    stage,
)
from bunny_lora.world.renderer import render

_CAMERAS = {"close-up": "close-up", "portrait": "close-up", "wide": "wide"}


def camera_of(prompt: str) -> str:
    """Return the camera that a prompt names, medium where it names none."""
    return next((camera for word, camera in _CAMERAS.items() if word in prompt.lower()), "medium")


def render_as_asked(
    traits: Mapping[str, str], asked: Mapping[str, str], *, camera: str, number: int, size_px: int
) -> Image.Image:
    """Return a render, size_px x size_px, that no film shows.

    Args:
        traits: of the character; those left out, and all else that nobody asks for, are drawn by lot.
        asked: any of place, light and pose.
        camera: close-up, medium or wide.
        number: another one gives another picture of the same.
    """
    rng = generator(0, "as asked", number)
    whole = replace(random_traits(rng), **traits)
    scene = random_scene(rng, camera=camera)
    scene = replace(scene, place=asked.get("place", scene.place), details=())
    light = "night" if scene.place == "city" else asked.get("light", scene.light)
    moment = _posed(random_moment(rng, "", whole, camera), asked.get("pose"))
    picture = Picture(replace(scene, light=light), stage(rng, [moment], camera, 1.0), 1.0)
    return render(picture, (size_px, size_px)).image


def _posed(character: Character, pose: str | None) -> Character:
    """Return a character in another pose, asleep only in the one, from the side where it must be."""
    pose = pose or character.pose
    expression, facing = character.expression, character.facing
    if (pose == "sleeping") != (expression == "sleepy"):
        expression = "sleepy" if pose == "sleeping" else "happy"
    if pose in ("running", "sleeping") and facing == "front":
        facing = "left"
    return replace(character, pose=pose, expression=expression, facing=facing)
