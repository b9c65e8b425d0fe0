"""Grids of pictures: validation samples, before and after, checkpoint by checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

from matplotlib.figure import Figure
from PIL import Image

from bunny_lora.config import load_config
from bunny_lora.core.eval_result import EvalResult
from bunny_lora.report.plot import LABEL_PT, WIDTH_IN, Plot, show, spread, wrap
from bunny_lora.report.scores import conditions, read_result

LABEL_IN, GAP_IN = 1.75, 0.07  # the column of row labels, and the space between cells
NO_SAMPLES = "training.validation_prompt draws some at every save"
CELL_MAX_IN, ROWS_MAX_IN = 2.6, 10.0  # few columns grow, as long as the grid does not tower


def picture_grid(
    titles: tuple[str, str],
    labels: Sequence[str],
    groups: Sequence[tuple[str, Sequence[str]]],
    cells: Sequence[Sequence[Path | Image.Image | None]],
) -> Plot:
    """Show pictures in rows and columns.

    Args:
        titles: title and subtitle, one line each.
        labels: text beside each row.
        groups: for neighbouring columns their common heading and the heading of each.
        cells: for every row one picture a column, None where none belongs.
    """
    n_columns = sum(len(heads) for _, heads in groups)
    room = WIDTH_IN - LABEL_IN - 0.12 - 2 * GAP_IN * (len(groups) - 1)
    cell = min(CELL_MAX_IN, room / n_columns - GAP_IN, max(1.9, ROWS_MAX_IN / len(labels) - GAP_IN))
    step, top = cell + GAP_IN, 1.08
    figure = Plot(top + len(labels) * step + 0.08, *titles)
    column, left = 0, LABEL_IN
    for heading, heads in groups:
        figure.label(left, top - 0.38, heading, size=LABEL_PT, weight="bold")
        for head in heads:
            figure.label(left, top - 0.18, head)
            for row, images in enumerate(cells):
                if (image := images[column]) is not None:
                    show(figure.panel(left, top + row * step, cell, cell), image)
            column, left = column + 1, left + step
        left += 2 * GAP_IN
    for row, label in enumerate(labels):
        figure.label(0.12, top + row * step, wrap(label, 26, max(2, int(cell * 6))))
    return figure


def samples_grid(run_dir: Path, max_columns: int = 6, max_rows: int = 8) -> Figure:
    """Show validation samples: a row for each prompt and seed, steps from left to right.

    A run without validation prompts has none; the figure then says how to get some.
    """
    names, folders = sample_cells(run_dir, max_columns, max_rows)
    if not names:
        return Plot(0.7, "No validation samples", NO_SAMPLES)
    steps = [int(folder.name.removeprefix("step-")) for folder in folders]
    cells = [[folder / name for folder in folders] for name in names]
    heads = [f"step {step}" for step in steps]
    titles = ("Validation samples during training", "each row: one prompt and one seed")
    return picture_grid(titles, list(names.values()), [("with LoRA after", heads)], cells)


def sample_cells(run_dir: Path, max_columns: int, max_rows: int) -> tuple[dict[str, str], list[Path]]:
    """Return the files of validation samples with their prompts, and the folders, by step."""
    folders = sorted((run_dir / "samples").glob("step-*"))
    names = sorted({path.name for folder in folders for path in folder.glob("*.png")})
    shown = {name: _sample_prompt(run_dir, name) for name in spread(names, max_rows)}
    return shown, spread(folders, max_columns)


def _sample_prompt(run_dir: Path, name: str) -> str:
    prompts = load_config(run_dir / "config.yaml").training.validation_prompts
    index = int(name.split("-")[0])
    return prompts[index] if index < len(prompts) else name


def before_after_grid(run_dir: Path, max_rows: int = 8, max_images: int = 2) -> Figure:
    """Show training crops, base and LoRA: a row a prompt, base and LoRA from the same seeds."""
    result, folder = read_result(run_dir), run_dir / "evaluation"
    generated = _by_model(result, folder)
    rows = rows_of(result, max_rows)
    n_seeds = min(result.settings.num_images_per_prompt, max_images)
    crops = {name: [folder / f for f in files] for name, files in result.training_crops.items()}
    cells, labels = [], []
    for character, prompt in rows:
        shown = crops.get(character, [])[:2]
        if shown:  # other crops for the character's next prompt
            crops[character] = [*crops[character][2:], *shown]
        named = prompt or "the empty prompt"
        labels.append(prompt if shown else f"{named} (names nobody: should not change)")
        keys = [key for key in generated["final"] if key[:2] == (character, prompt)][:n_seeds]
        images = [generated[model].get(key) for model in ("base", "final") for key in keys]
        cells.append([*shown, *[None] * (2 - len(shown)), *images])
    heads = [f"seed {letter}" for letter in ascii_uppercase[:n_seeds]]
    groups = [("training frames", ["", ""]), ("base model", heads), ("with LoRA", heads)]
    titles = ("Before and after: what the LoRA changed", conditions(result))
    return picture_grid(titles, labels, groups, cells)


def rows_of(result: EvalResult, n: int) -> list[tuple[str, str]]:
    """Return at most `n` pairs of character and prompt: every character's first prompt comes first."""
    finals = [image for image in result.images if image.model == "final"]
    rows = list(dict.fromkeys((image.character, image.prompt) for image in finals))
    by_prompt = sorted(finals, key=lambda image: image.prompt_index)
    kept = list(dict.fromkeys((image.character, image.prompt) for image in by_prompt))[:n]
    return [row for row in rows if row in kept]


def checkpoint_grid(run_dir: Path, max_columns: int = 7) -> Figure:
    """Show the same prompts and seeds drawn by the base, the checkpoints and the final weights."""
    result = read_result(run_dir)
    generated = _by_model(result, run_dir / "evaluation")
    models = ["base", *(name for name in generated if name not in ("base", "final")), "final"]
    keys = min(map(list, generated.values()), key=len)
    if len(models) == 2:  # no checkpoint but final: one picture for each character will do
        keys = list({key[0]: key for key in reversed(keys)}.values())[::-1][:3]
    models = spread(models, max_columns)
    cells = [[generated[model].get(key) for model in models] for key in keys]
    steps = [name.replace("checkpoint-", "step ") for name in models[1:-1]]
    groups = [("base model", [""]), ("checkpoints", steps), ("final", [""])]
    note = f"each row: one prompt and one seed; {conditions(result)}"
    titles = ("From the base model to the final weights", note)
    return picture_grid(titles, [key[1] for key in keys], [g for g in groups if g[1]], cells)


def _by_model(result: EvalResult, folder: Path) -> dict[str, dict[tuple, Path]]:
    """Return for each model its images by (character, prompt, seed), in the order of the protocol."""
    generated: dict[str, dict[tuple, Path]] = {}
    for image in result.images:
        key = (image.character, image.prompt, image.seed)
        generated.setdefault(image.model, {})[key] = folder / image.file
    return generated
