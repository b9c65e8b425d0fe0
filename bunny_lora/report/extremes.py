"""The pictures to look at first: the worst, as large as the best, and the likeliest copies."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from bunny_lora.core.eval_result import EvalResult, ImageScores
from bunny_lora.report.grids import picture_grid
from bunny_lora.report.plot import Plot
from bunny_lora.report.scores import conditions, number, read_result

N_SHOWN = 6
NO_COPIES = "No views were compared: all frames are of one shot, or the evaluation is an older one."


def extremes_grid(run_dir: Path) -> Figure:
    """Show the worst pictures of the LoRA, those in the middle and the best, all at one size."""
    result, folder = read_result(run_dir), run_dir / "evaluation"
    images = ranked(result)
    n = min(N_SHOWN, len(images))
    middle = (len(images) - n) // 2
    parts = {"worst": images[:n], "in the middle": images[middle : middle + n], "best": images[-n:]}
    labels = [
        f"{name}: {number(merit(result, part[0])[0])} to {number(merit(result, part[-1])[0])}"
        for name, part in parts.items()
    ]
    cells = [[folder / image.file for image in part] for part in parts.values()]
    titles = (f"Worst and best by {ruler(result)}", conditions(result))
    return picture_grid(titles, labels, [("with LoRA", [""] * n)], cells)


def merit(result: EvalResult, image: ImageScores) -> tuple[float, float]:
    """Return what images are ranked by: the share of traits that were read right, then fidelity."""
    right = result.traits.traits.get(image.character, {}) if result.traits else {}
    read = [image.read.get(trait) == score.answer for trait, score in right.items()]
    fidelity = image.fidelity or 0.0
    return (sum(read) / len(read) if read and image.read else fidelity, fidelity)


def ranked(result: EvalResult) -> list[ImageScores]:
    """Return the LoRA's pictures of characters, the worst first."""
    images = [i for i in result.images if i.model == "final" and i.fidelity is not None]
    return sorted(images, key=lambda image: merit(result, image))


def ruler(result: EvalResult) -> str:
    """Say what `merit` is."""
    if any(image.read for image in result.images):
        return "the share of traits that were read right"
    features = result.settings.features
    return f"fidelity ({features}{': sees colours only' * (features == 'palette')})"


def nearest_grid(run_dir: Path) -> Figure:
    """Show the pictures that are nearest to something that training saw, beside that."""
    result, folder = read_result(run_dir), run_dir / "evaluation"
    if result.copies is None or not result.copies.nearest:
        return Plot(0.7, "Copies: nothing to show", NO_COPIES)
    nearest, columns = result.copies.nearest, 3
    rows = [nearest[start : start + columns] for start in range(0, len(nearest), columns)]
    cells: list[list[Path | None]] = []
    for row in rows:
        shown = [folder / name for pair in row for name in (pair.file, pair.view)]
        cells.append([*shown, *[None] * (2 * columns - len(shown))])
    above, features = result.copies.above["final"], result.settings.features
    title = f"{above.mean:.0%} of the pictures are nearer to a training view than held-out frames are"
    note = f"5 % by chance; features: {features}{' (sees colours only)' * (features == 'palette')}"
    labels = ["cosine " + ", ".join(number(pair.similarity) for pair in row) for row in rows]
    heads = [("", ["picture", "training saw"]) for _ in range(columns)]
    return picture_grid((title, note), labels, heads, cells)
