"""Pixels of any kind to upright 8-bit sRGB on a plain ground, as a screen would show them.

A picture with a colour profile is converted by it, so that no training image has shifted colours.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps

GROUND = "white"
GREY = ("1", "L", "LA", "La")
# What a profile can describe of the modes that are left once transparency and palettes are gone.
PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
SAME_COLOUR = 2  # Levels of 256: less than what saving as JPEG changes.


def to_srgb(image: Image.Image) -> Image.Image:
    """Return an opened picture upright, in RGB with 8 bits a channel, and without its metadata.

    Raises:
        ValueError: pixels whose meaning is not agreed upon.
    """
    _refuse_unclear(image)
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 instead of scaling.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    grey, alpha = image.mode in GREY, None
    if image.has_transparency_data:
        image = image.convert("RGBA")  # Palettes too, whose colours may each be seen through.
        alpha = image.getchannel("A")
    opaque = _by_profile(image.convert("L") if grey else image, profile)
    if alpha is not None:
        opaque = Image.composite(opaque, Image.new("RGB", image.size, GROUND), alpha)
    opaque.info.clear()  # Else Pillow saves the old profile with the new colours.
    return opaque


def _refuse_unclear(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no agreed white")
    if "transparency" in image.info and (is_16_bit(image) or image.mode.startswith("I;16")):
        raise ValueError("a transparent colour in 16 bits is not supported")


def is_16_bit(image: Image.Image) -> bool:
    """Whether an opened, not yet decoded picture has 16 bits a channel in its file."""
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def is_srgb(profile: bytes | None) -> bool:
    """Whether a profile changes no colour that anybody could see; none at all means sRGB."""
    return not profile or _is_neutral(profile)


def _by_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert by a profile that fits; one that is broken or of another space counts as none."""
    if image.mode not in PROFILE_SPACES:
        image = image.convert("RGB")
    if not profile or (image.mode == "RGB" and _is_neutral(profile)):
        return image.convert("RGB")
    try:
        icc_profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if icc_profile.profile.xcolor_space.strip() != PROFILE_SPACES[image.mode]:
            return image.convert("RGB")
        return _convert(image, icc_profile)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB")


def _convert(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    transform = ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        image.mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    return transform.apply(image)


@lru_cache(maxsize=64)
def _is_neutral(profile: bytes) -> bool:
    """Whether a cube of colours comes out as it went in; so do profiles that cannot be applied."""
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    try:
        icc_profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = np.asarray(_convert(Image.fromarray(cube), icc_profile), np.int16)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return False
    return bool(np.abs(converted - cube).max() <= SAME_COLOUR)
