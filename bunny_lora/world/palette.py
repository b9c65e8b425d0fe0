"""The colours behind the colour words, and what the light does to them."""

from __future__ import annotations

from bunny_lora.world.drawing import Colour

FUR: dict[str, Colour] = {
    "white": (244, 240, 234),
    "grey": (158, 163, 174),
    "brown": (158, 103, 66),
    "orange": (240, 146, 60),
    "cream": (244, 220, 168),
    "black": (76, 70, 84),
    "pink": (245, 170, 188),
    "lilac": (186, 150, 232),
    "sky": (106, 178, 238),
    "crimson": (200, 56, 76),
    "emerald": (74, 178, 100),
}
CLOTH: dict[str, Colour] = {
    "red": (222, 62, 62),
    "blue": (64, 112, 214),
    "green": (70, 160, 84),
    "yellow": (250, 206, 56),
    "purple": (142, 84, 190),
    "pink": (244, 134, 172),
    "orange": (244, 144, 52),
    "white": (250, 248, 242),
}
IRIS: dict[str, Colour] = {
    "brown": (120, 72, 40),
    "blue": (58, 128, 220),
    "green": (66, 164, 84),
    "amber": (232, 164, 40),
}
TINT: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.93, 0.87),
    "night": (0.86, 0.87, 0.94),
}
"""Factors on everything near the camera; gentle, so that colour words stay true at night."""

SKY: dict[str, tuple[Colour, Colour, Colour]] = {
    "day": ((84, 172, 240), (150, 210, 250), (222, 242, 252)),
    "sunset": ((108, 88, 168), (240, 130, 120), (255, 206, 130)),
    "night": (((20, 26, 66)), (38, 50, 104), (78, 92, 148)),
}
"""Zenith, middle and horizon."""

CREAM: Colour = (255, 246, 228)
INK: Colour = (52, 34, 48)
NOSE_PINK: Colour = (240, 128, 142)
BLUSH: Colour = (250, 128, 128)


def ink_on(fur: Colour) -> Colour:
    """Return the colour of fine lines that shows on that fur."""
    return INK if sum(fur) > 300 else (232, 214, 224)
