"""What no features can be trusted with: a sheet on which a person ticks what is right of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bunny_lora.core import files
from bunny_lora.core.eval_result import ImageScores

FILE = "checklist.md"
BOX = "\N{BALLOT BOX}"


def write_checklist(
    run_dir: Path, asked: Mapping[str, Sequence[str]], images: Sequence[ImageScores]
) -> None:
    """Write `evaluation/checklist.md`, a row an image of the LoRA, and say who in it nobody is.

    Without anything to tick there is no sheet, and an older one goes.

    Args:
        run_dir: the run's folder.
        asked: of each character what is to be ticked, `evaluation.checklist`.
        images: all that were drawn.
    """
    path = run_dir / "evaluation" / FILE
    drawn = {name: _of(name, images) for name in asked}
    if unknown := [name for name, found in drawn.items() if not found]:
        known = dict.fromkeys(image.character for image in images if image.fidelity is not None)
        nobody, called = ", ".join(unknown), ", ".join(known)
        print(f"evaluation.checklist: no character is called {nobody}; {called} are")
    sheets = [_sheet(name, asked[name], found) for name, found in drawn.items() if found]
    if not sheets:
        path.unlink(missing_ok=True)
        return
    text = "# Checklist\n\nTick what is right. The images that were judged the worst come first.\n\n"
    files.write_text(path, text + "\n".join(sheets))


def _of(name: str, images: Sequence[ImageScores]) -> list[ImageScores]:
    """Return a character's images by the LoRA, the worst first."""
    found = [image for image in images if image.model == "final" and image.character == name]
    return sorted(found, key=lambda image: _score(image) or 0.0)


def _score(image: ImageScores) -> float | None:
    return image.fidelity if image.identity is None else image.identity


def _sheet(name: str, asked: Sequence[str], images: Sequence[ImageScores]) -> str:
    heads = ["image", "prompt", "score", *asked]
    rows = [
        [f"![]({image.file})", image.prompt, f"{_score(image) or 0.0:.2f}", *[BOX] * len(asked)]
        for image in images
    ]
    table = [heads, ["---"] * len(heads), *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return f"## {name}\n\n" + "\n".join(lines) + "\n"
