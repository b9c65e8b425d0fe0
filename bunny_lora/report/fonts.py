"""Names in any script: fonts on this computer that have the letters which the usual one lacks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

BOXES = "Last Resort"  # matplotlib's own: it has a box for every letter


@contextmanager
def any_script(figure: Figure) -> Iterator[None]:
    """Give texts fonts that have their letters while a figure is drawn; say which will be boxes."""
    for text in figure.findobj(Text):
        if families := fallbacks("".join(sorted(set(text.get_text())))):
            text.set_fontfamily([*mpl.rcParams["font.family"], *families])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield


@lru_cache(maxsize=4096)
def fallbacks(letters: str) -> list[str]:
    """Return the families that have what of some letters the usual font lacks, said where none has."""
    usual = FT2Font(findfont(FontProperties())).get_charmap()
    lacking = {c for c in letters if ord(c) not in usual and c.isprintable()}
    families = []
    for family, path in _regular_fonts() if lacking else ():
        if found := _drawn_by(path, lacking):
            families.append(family)
            lacking -= found
    if lacking:
        _say("".join(sorted(lacking)))
    return families


@lru_cache(maxsize=256)
def _say(letters: str) -> None:
    print(f"No font on this computer has {letters}: boxes stand for them in figures.")


def _regular_fonts() -> list[tuple[str, str]]:
    return sorted(
        (font.name, font.fname)
        for font in fontManager.ttflist
        if font.style == "normal" and font.weight == 400 and not font.name.startswith(BOXES)
    )


def _drawn_by(path: str, letters: set[str]) -> set[str]:
    """Return the letters that a font has as outlines; emoji in colour mostly are pictures."""
    try:
        font = FT2Font(path)
        known = font.get_charmap() if font.scalable else {}
        return {c for c in letters if ord(c) in known and font.load_char(ord(c)).width}
    except (OSError, RuntimeError):
        return set()
