"""Every character in every scene with its traits below, ticked where they are right: for the eyes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from bunny_lora.core.eval_result import ImageScores, TraitScores
from bunny_lora.report.plot import BLUE, LABEL_PT, ORANGE, SMALL_PT, WIDTH_IN, Plot, cut, show, wrap
from bunny_lora.report.scores import conditions, read_result
from bunny_lora.report.trait_scores import NO_TRAITS

LABEL_IN, GAP_IN, LINE_IN = 1.0, 0.08, 0.145
CELL_MAX_IN = 1.7
RIGHT, WRONG = ("\u2713", BLUE), ("\u2717", ORANGE)


def trait_sheet(run_dir: Path, model: str = "final", max_columns: int = 6) -> Figure:
    """Show one image a character and prompt, and below each what of its traits the reader found.

    A run whose configuration names no traits has none; the figure then says so.

    Args:
        run_dir: an evaluated run.
        model: base, checkpoint-<step> or final.
        max_columns: prompts at most.
    """
    result = read_result(run_dir)
    if (traits := result.traits) is None:
        return Plot(0.7, NO_TRAITS)
    cells = _first_of_each(result.images, model)
    prompts = sorted({prompt for _, prompt in cells})[:max_columns]
    names, n_lines = list(traits.traits), max(map(len, traits.traits.values()))
    cell = min(CELL_MAX_IN, (WIDTH_IN - LABEL_IN) / len(prompts) - GAP_IN)
    step, top = cell + (n_lines + 0.5) * LINE_IN + GAP_IN, 1.1
    title = f"Who is it, and where: {model}"
    figure = Plot(top + len(names) * step, title, conditions(result))
    for row, name in enumerate(names):
        figure.label(0.12, top + row * step, cut(name, 14), size=LABEL_PT, weight="bold")
        for column, prompt in enumerate(prompts):
            left, y = LABEL_IN + column * (cell + GAP_IN), top + row * step
            if (image := cells.get((name, prompt))) is None:
                continue
            if not row:
                figure.label(left, top - 0.36, wrap(_scene(image, name), int(cell * 15), 2))
            show(figure.panel(left, y, cell, cell), run_dir / "evaluation" / image.file)
            _ticks(figure, (left, y + cell + 0.03), traits, name, image)
    return figure


def _first_of_each(images: list[ImageScores], model: str) -> dict[tuple[str, int], ImageScores]:
    """Return the image of the first seed of each character and prompt."""
    found: dict[tuple[str, int], ImageScores] = {}
    for image in images:
        if image.model == model:
            found.setdefault((image.character, image.prompt_index), image)
    return found


def _scene(image: ImageScores, name: str) -> str:
    return image.prompt.replace(name, "").strip(" ,")


def _ticks(
    figure: Plot, place: tuple[float, float], traits: TraitScores, name: str, image: ImageScores
) -> None:
    left, top = place
    for line, (trait, score) in enumerate(traits.traits[name].items()):
        seen = image.read.get(trait, "?")
        sign, colour = RIGHT if seen == score.answer else WRONG
        says = score.answer if seen == score.answer else f"{score.answer}: {seen}"
        figure.label(left, top + line * LINE_IN, f"{sign} {says}", size=SMALL_PT, color=colour)
