"""Several runs on one page: a leaderboard, what differs, and the same pictures side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bunny_lora
from bunny_lora.report.comparison import (
    AXES,
    BASE,
    N_PICTURED,
    Comparison,
    doubts,
    same_pictures,
    score_rows,
    settings_rows,
)
from bunny_lora.report.measures import columns
from bunny_lora.report.page_pictures import picture_of
from bunny_lora.report.web import Picture, Strip, ends_of, write_page


def write_comparison_page(found: Comparison, out: Path, title: str) -> Path:
    """Write runs side by side as one self-contained page and return its path.

    Raises:
        BunnyLoraError: the page cannot be written, or is too large.
    """
    folders = [run.folder for run in found.runs]
    return write_page(out, "compare.html", folders, **_content(found, title))


def _content(found: Comparison, title: str) -> dict[str, Any]:
    return {
        "title": title,
        "version": bunny_lora.__version__,
        "order": found.order,
        "warnings": doubts(found),
        "names": found.names,
        "board": _board(found),
        "scores": score_rows(found),
        "differences": _differences(found),
        "settings": settings_rows(found),
        "pictures": _strips(found),
        "more_pictures": max(0, len(found.runs) - N_PICTURED),
    }


def _board(found: Comparison) -> dict[str, Any]:
    """Return the axes, a column each with one scale for all runs, without those that no run has."""
    every = found.measures
    shown = {name: values for word in AXES for name, values in columns(every, word).items()}
    ends = [ends_of([m.final if m else None for m in values], (0.0, 1.0)) for values in shown.values()]
    heads = {name: next(m for m in values if m) for name, values in shown.items()}
    rows = [[values[place] for values in shown.values()] for place in range(len(found.runs))]
    return {"heads": heads, "ends": ends, "rows": rows}


def _differences(found: Comparison) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for of_run in found.differences for name in of_run)
    return {name: [of_run.get(name) for of_run in found.differences] for name in names}


def _strips(found: Comparison) -> list[Strip]:
    labels = [BASE, *found.names[:N_PICTURED]]
    strips = []
    for (_, prompt, seed), row in same_pictures(found).items():
        pictures = [
            picture_of(*one, label) if one else Picture(None, f"{label}: {prompt}", label, "not drawn")
            for one, label in zip(row, labels, strict=True)
        ]
        strips.append(Strip(prompt or "the empty prompt", pictures, f"seed {seed}"))
    return strips
