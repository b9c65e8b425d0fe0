"""Open pictures from anywhere and get upright RGB, or a reason why not.

The one place that decides which files count as pictures, so that the reader of a source, the writer of
training data and the data set agree on every one of them.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PureWindowsPath

from PIL import ExifTags, Image, UnidentifiedImageError, features

from bunny_lora.core.files import is_file, is_inside
from bunny_lora.data.colours import is_16_bit, is_srgb, to_srgb
from bunny_lora.data.png import without_large_chunks
from bunny_lora.errors import LeftOutError

# Only decoders that are pure and common: others call programs (EPS) or open further files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *["AVIF"] * bool(features.check("avif")))
JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo")
OTHER_SUFFIXES = (".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
SUFFIXES = frozenset((*JPEG_SUFFIXES, *OTHER_SUFFIXES, *[".avif"] * ("AVIF" in FORMATS)))
PLAIN_SUFFIXES = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",)}

# Pictures that somebody else has to convert: their decoders are large, or not free of surprises.
UNREAD = {
    suffix: kind
    for kind, suffixes in {
        "HEIC": ".heic .heif .hif",
        "AVIF": ".avif .avifs",
        "JPEG XL": ".jxl",
        "JPEG 2000": ".jp2 .j2k .jpx .jpf",
        "a drawing program's": ".psd .psb .xcf .kra .clip .ora .svg .ai .eps .pdf",
        "a camera's raw data": ".dng .cr2 .cr3 .nef .arw .raf .orf .rw2",
        "of a rare format": ".exr .hdr .tga .dds .ppm .pgm .pnm .qoi .pcx .ico .jxr",
        "a video": ".mp4 .mov .m4v .mkv .webm .avi",
    }.items()
    for suffix in suffixes.split()
    if suffix not in SUFFIXES
}
# How files begin, whatever they are called.
BEGINNINGS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "HEIC": rb"....ftyp(hei|hev|mif1|msf1)",
    "AVIF": rb"....ftypavi[fs]",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
}

MIN_SIDE_PX = 32  # VAE and U-Net divide by 32 at least: anything smaller is a single point to them.
MAX_SIDE_PX = 20_000
MAX_ASPECT = 4  # A square crop of anything longer shows less than a quarter of the picture.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # Pillow's own bound against decompression bombs.

# The side of a square over that of the face in it.
FACE_TO_HEAD = 2.5  # face, ears and shoulders: enough to tell whose face it is
FACE_TO_MEDIUM = 2.25  # what a medium shot shows of a cartoon character; Bunny World's have 2.1 to 2.4
FACE_TO_BODY = 4.0  # all of a cartoon body with what it wears, and some of what is around it

OUTSIDE = "outside the project and the run folder"
HOW_TO_ALLOW = "copy it there, or set allow_outside_paths: true"
MAX_SHOWN = 120  # Characters of a path in a reason.
MAX_TAIL_PARTS = 16  # How much of a recorded path is looked for under other folders.


def open_rgb(path: Path) -> Image.Image:
    """Return the picture upright, in 8-bit sRGB, transparency on white, the first frame of many.

    Raises:
        OSError, ValueError or another of Pillow's: the file is no picture or a broken one.
    """
    with _opened(path) as image:
        return to_srgb(image)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture with any amount of text beside its pixels."""
    lighter, profile = without_large_chunks(path)
    with Image.open(lighter or path, formats=FORMATS) as image:
        if profile:
            image.info["icc_profile"] = profile
        yield image


def inspect(path: Path) -> tuple[int, int]:
    """Decode the whole picture once and return its upright (width, height) in pixels.

    Raises:
        LeftOutError: it is broken, or of a size that nobody trains on.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _opened(path) as image:
                _check_size(path.name, *image.size)  # From the header, before any pixel is decoded.
                image.verify()
            return open_rgb(path).size
    except LeftOutError:
        raise
    except UnidentifiedImageError:
        if (kind := kind_of(path)) and kind not in FORMATS:
            raise LeftOutError(f"{unread(path.name, kind)}, whatever its ending says") from None
        what = "is not a picture in a known format" if path.stat().st_size else "is an empty file"
        raise LeftOutError(f"broken image: {path.name} {what}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{MAX_PIXELS / 1e6:.0f} million pixels"
        raise LeftOutError(f"absurd image: {path.name} has more than {limit}") from None
    except Exception as error:  # Pillow's decoders raise whatever they trip over.
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        detail = detail.replace(str(path), path.name)
        raise LeftOutError(f"broken image: {path.name}: {detail}") from None


def kind_of(path: Path) -> str:
    """Return the format that a file's first bytes tell of, empty for what is no picture we know."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError:
        return ""
    found = (kind for kind, begin in BEGINNINGS.items() if re.match(begin, start, re.DOTALL))
    return next(found, "")


def unread(name: str, kind: str) -> str:
    """Return the reason for a picture of a format that is not read."""
    return f"format not read: {name} is {kind}; save it as PNG or JPEG"


def _check_size(name: str, width: int, height: int) -> None:
    short, long = sorted((width, height))
    limits = {
        f"a side under {MIN_SIDE_PX} px": short < MIN_SIDE_PX,
        f"a side over {MAX_SIDE_PX} px": long > MAX_SIDE_PX,
        f"one side over {MAX_ASPECT} times the other": long > MAX_ASPECT * short,
    }
    for limit, broken in limits.items():
        if broken:
            raise LeftOutError(f"absurd image: {name} is {width} x {height} px, {limit}")


def plain_suffix(path: Path) -> str | None:
    """Return the ending of a copy if the bytes can be used as they are, else None."""
    if without_large_chunks(path)[0]:
        return None
    with Image.open(path, formats=FORMATS) as image:
        deep = is_16_bit(image)  # Asked first: reading the EXIF may decode the pixels.
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) in (0, 1)
        opaque = image.mode == "RGB" and not image.has_transparency_data
        usual = is_srgb(image.info.get("icc_profile")) and not deep
        still = not getattr(image, "is_animated", False)
        suffix = path.suffix.lower()
        if image.format == "JPEG" and suffix in JPEG_SUFFIXES[2:]:
            suffix = JPEG_SUFFIXES[0]
        honest = suffix in PLAIN_SUFFIXES.get(image.format or "", ())
        return suffix if upright and opaque and usual and still and honest else None


def plain_bytes(path: Path) -> bytes:
    """Return a file that every reader shows alike: as it is if it is one already, else RGB PNG."""
    if plain_suffix(path):
        return path.read_bytes()
    buffer = io.BytesIO()
    open_rgb(path).save(buffer, "PNG")
    return buffer.getvalue()


class Finder:
    """Looks for recorded pictures, also of a moved run; outside the allowed folders only if told to."""

    def __init__(self, base: Path, allowed: Sequence[Path], *, anywhere: bool = False) -> None:
        """`base` is the run folder or the folder of pictures; it is always allowed."""
        self.base = base.resolve()
        self.anywhere = anywhere
        self.allowed = [self.base, *(folder.resolve() for folder in allowed)]

    def find(self, recorded: str) -> Path:
        """Return the resolved path of the picture that was recorded as `recorded`.

        Raises:
            LeftOutError: it is nowhere, or only where we must not read.
        """
        tail = _tail(recorded)
        shown = "/".join(tail[-2:])[-MAX_SHOWN:]  # Never the whole path: it may be somebody's home.
        outside = False
        for candidate in self._candidates(recorded, tail):
            if not is_file(candidate):
                continue
            if self.permits(candidate):
                return candidate.resolve()
            outside = True
        if outside:
            raise LeftOutError(f"{OUTSIDE}: {shown} ({HOW_TO_ALLOW})")
        raise LeftOutError(f"missing frame: {shown or 'no path recorded'}")

    def permits(self, path: Path) -> bool:
        """Whether `path` may be read, wherever links take it."""
        return self.anywhere or is_inside(path, self.allowed)

    def _candidates(self, recorded: str, tail: list[str]) -> Iterator[Path]:
        """As given; from the run folder and the folders above it that are ours; by ever less of it."""
        yield from (base / recorded for base in self._bases)
        for start in range(len(tail)):
            yield from (base.joinpath(*tail[start:]) for base in self._bases)
        if tail:
            yield from self._by_tail(tail)

    def _by_tail(self, tail: list[str]) -> list[Path]:
        """The one file anywhere under the run folder that ends most alike; none if two do."""

        def alike(path: Path) -> tuple[int, int]:
            ours, theirs = list(path.parts[::-1]), tail[::-1]
            return n_equal(map(name_key, ours), map(name_key, theirs)), n_equal(ours, theirs)

        ranked = sorted(self._index.get(name_key(tail[-1]), []), key=alike, reverse=True)
        unique = len(ranked) == 1 or (len(ranked) > 1 and alike(ranked[0]) > alike(ranked[1]))
        return ranked[:1] if unique else []

    @cached_property
    def _bases(self) -> list[Path]:
        above = [folder for folder in self.base.parents if is_inside(folder, self.allowed)]
        return [self.base, *above]

    @cached_property
    def _index(self) -> dict[str, list[Path]]:
        index: dict[str, list[Path]] = {}
        for folder, _, names in os.walk(self.base):
            for name in names:
                index.setdefault(name_key(name), []).append(Path(folder) / name)
        return index


def name_key(name: str) -> str:
    """Return what names have in common that only some systems tell apart: Unicode's forms, and case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def n_equal(ours: Iterable[str], theirs: Iterable[str]) -> int:
    """Return how many pairs at the start are equal."""
    pairs = zip(ours, theirs, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _tail(recorded: str) -> list[str]:
    """Split a path of any system into its last parts; drive, root and `..` are left out."""
    path = PureWindowsPath(recorded)  # Takes both kinds of slash.
    parts = path.parts[1:] if path.anchor else path.parts
    return [part for part in parts if part != ".."][-MAX_TAIL_PARTS:]


def crop_around(image: Image.Image, box: Sequence[float], scale: float) -> Image.Image:
    """Return the square around a box's middle, `scale` times its longer side, moved into the image.

    Args:
        image: any size, W x H pixels.
        box: x1, y1, x2, y2 in pixels of the image.
        scale: how much more than the box is seen; the square never exceeds the image's shorter side.
    """
    left, top, side = square_around(image.size, box, scale)
    return image.crop((round(left), round(top), round(left + side), round(top + side)))


def square_around(
    size: Sequence[int], box: Sequence[float], scale: float
) -> tuple[float, float, float]:
    """Return left, top and side of what `crop_around` cuts from an image of `size`, in its pixels."""
    width, height = size
    x1, y1, x2, y2 = box
    side = min(scale * max(x2 - x1, y2 - y1), width, height)
    left = min(max((x1 + x2 - side) / 2, 0), width - side)
    top = min(max((y1 + y2 - side) / 2, 0), height - side)
    return left, top, side
