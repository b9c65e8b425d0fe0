"""Run files to figures and tables. Nothing here is computed that a file does not say.

Figures are drawn without pyplot, so there is no global state and nothing to close; in a notebook a
figure shows itself as the last expression of a cell.
"""

from __future__ import annotations

import base64
import html
import io
import json
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from bunny_lora import runs
from bunny_lora.config import load_config
from bunny_lora.dataset import known_images
from bunny_lora.errors import BunnyLoraError

# Okabe and Ito's palette, told apart by colour-blind readers, https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8A8A8A", "#222222"
TITLE_PT, LABEL_PT, SMALL_PT = 12, 9, 8
DPI = 110
WIDTH_IN = 10.0
LABEL_IN, GAP_IN = 1.75, 0.07  # a grid's column of row labels, and the space between its cells
CELL_MAX_IN = 1.9
THUMBNAIL_PX = 160
TABLE_WIDTH = 82

MEASURES = {
    "fidelity": ("Fidelity", "likeness to the training crops", "higher is better"),
    "consistency": ("Consistency", "likeness within a character", "higher is better"),
    "separation": ("Separation", "nearest to the own character", "higher is better"),
    "max_copy": ("Copying", "likeness to the nearest frame", "too high: learnt by heart"),
}


class Plot(Figure):
    """A figure that notebooks show without pyplot."""

    def __init__(self, height_in: float, title: str, subtitle: str = "") -> None:
        super().__init__(figsize=(WIDTH_IN, height_in), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self)
        self.label(0.12, 0.12, title, size=TITLE_PT, weight="bold")
        self.label(0.12, 0.38, subtitle, size=LABEL_PT, color="#555555")

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return axes at a place in inches from the upper left corner."""
        tall = self.get_figheight()
        place = (left / WIDTH_IN, 1 - (top + height) / tall, width / WIDTH_IN, height / tall)
        return self.add_axes(place)

    def label(self, left: float, top: float, text: str, **style: Any) -> None:
        """Write text at a place in inches from the upper left corner; "$" stays a dollar sign."""
        plain: dict[str, Any] = {"size": SMALL_PT, "color": INK, "ha": "left", "va": "top"}
        place = (left / WIDTH_IN, 1 - top / self.get_figheight())
        self.text(*place, text, parse_math=False, **plain | style)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, atomically, and return its path."""
    with runs.atomic_path(path) as part:
        figure.savefig(part, format="png")
    return path


def _clean(axes: Axes, title: str = "", *, grid: Literal["x", "y"] | None = None) -> Axes:
    """Take away what carries nothing, and set the one type size of axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.tick_params(labelsize=SMALL_PT, colors=INK, length=0)
    axes.set_title(title, size=LABEL_PT, loc="left", color=INK, parse_math=False)
    if grid:
        axes.grid(axis=grid, color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
    return axes


def _show(axes: Axes, picture: Path | Image.Image) -> None:
    """Put a picture into axes, or a note where its file is missing or damaged."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#DDDDDD")
    try:
        image = Image.open(picture).convert("RGB") if isinstance(picture, Path) else picture
    except (OSError, SyntaxError):
        axes.text(0.5, 0.5, "no picture", size=SMALL_PT, color=GREY, ha="center", va="center")
        return
    axes.imshow(ImageOps.contain(image, (512, 512)))


def _wrap(text: str, width: int, n_lines: int) -> str:
    """Return text on at most `n_lines` lines of `width` characters, cut with an ellipsis."""
    return "\n".join(textwrap.wrap(text, width, max_lines=n_lines, placeholder=" …"))


def _cut(text: str, n: int) -> str:
    """Return at most `n` characters of a text."""
    return text if len(text) <= n else text[: n - 1] + "…"


# ---------------------------------------------------------------------------- the data


def contact_sheet(data_dir: Path, n: int = 12, columns: int = 4) -> Figure:
    """Show `n` training frames, evenly spaced, with face boxes and the first words of the caption."""
    lines = (data_dir / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    captions = {item["file_name"]: item["text"] for item in map(json.loads, lines)}
    images = {i["file_name"]: i for i in known_images(data_dir)}
    names = list(captions)
    chosen = spread(names, n)
    cell, caption_in = (WIDTH_IN - 0.24) / columns - GAP_IN, 0.42
    row_in = cell * 9 / 16 + caption_in
    n_rows = -(-len(chosen) // columns)
    shown = "all" if len(chosen) == len(names) else f"{len(chosen)} of {len(names)}, evenly spaced"
    figure = Plot(
        0.72 + n_rows * row_in, "Training frames", f"{shown}; boxes: faces that stage 4 found"
    )
    for place, name in enumerate(chosen):
        left = 0.12 + (place % columns) * (cell + GAP_IN)
        top = 0.68 + (place // columns) * row_in
        _frame(figure.panel(left, top, cell, cell * 9 / 16), data_dir / name, images.get(name, {}))
        figure.label(left, top + cell * 9 / 16 + 0.04, _wrap(captions[name], 42, 2), size=7)
    return figure


def _frame(axes: Axes, path: Path, image: dict[str, Any]) -> None:
    with Image.open(path) as opened:
        picture, width = opened.convert("RGB"), opened.width
    small = ImageOps.contain(picture, (512, 512))
    _show(axes, small)
    axes.spines[:].set_visible(False)
    scale = small.width / width
    for x1, y1, x2, y2 in image.get("faces", []):
        size = ((x2 - x1) * scale, (y2 - y1) * scale)
        box = (x1 * scale - 0.5, y1 * scale - 0.5)
        axes.add_patch(Rectangle(box, *size, fill=False, color=ORANGE, linewidth=1.6))


def characters_chart(summary: dict[str, Any]) -> Figure:
    """Show frames a character, stage 4's confidence, and caption lengths against CLIP's limit."""
    counts = sorted(summary["characters"].items(), key=lambda item: (item[1], item[0]))
    tokens, images = summary["caption_tokens"], summary["images"]
    title = f"{summary['n_images']} of {summary['n_entries']} frames are usable"
    most = f"; most often {counts[-1][0]} ({counts[-1][1]})" if counts else "; no character is named"
    rescued = f"; {summary['n_rescued']} rescued from the scene description"
    figure = Plot(max(2.5, 1.5 + 0.28 * len(counts)), title + most, f"{_plural(counts)}{rescued}")
    height = figure.get_figheight() - 1.15
    left = _clean(figure.panel(1.2, 0.85, 2.5, height), "Frames a character")
    bars = left.barh([_cut(name, 16) for name, _ in counts], [n for _, n in counts], color=BLUE)
    left.bar_label(bars, padding=3, size=SMALL_PT, color=INK)
    left.set_xticks([])
    left.spines["bottom"].set_visible(False)
    left.margins(x=0.15)
    middle = _clean(figure.panel(4.3, 0.85, 2.4, height), "Confidence of the analysis", grid="y")
    known = [image["confidence"] for image in images if image["confidence"] is not None]
    middle.hist(known, bins=20, range=(0, 1), color=BLUE)
    limit, cut = tokens["limit"], tokens["n_truncated"]
    right = _clean(
        figure.panel(7.3, 0.85, 2.5, height), f"Caption tokens; {cut} cut at {limit}", grid="y"
    )
    lengths = [image["caption_tokens"] for image in images]
    right.hist(lengths, bins=20, range=(0, max([limit, *lengths])), color=BLUE)
    right.axvline(limit, color=ORANGE, linewidth=1.5)
    for axes in (middle, right):
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.set_ylabel("frames", size=SMALL_PT)
    return figure


def _plural(items: Sequence[Any]) -> str:
    return f"{len(items)} character{'' if len(items) == 1 else 's'}"


def dropped_text(summary: dict[str, Any]) -> str:
    """Return what was left out and why, as plain text: counts, then every frame."""
    dropped = summary["dropped"]
    lines = [f"{summary['n_images']} of {summary['n_entries']} frames kept, {len(dropped)} left out"]
    by_reason = sorted(summary["dropped_by_reason"].items(), key=lambda item: (-item[1], item[0]))
    lines += [f"  {count:>4}  {reason}" for reason, count in by_reason]
    wide = max((len(str(item["frame_id"])) for item in dropped), default=0)
    lines += [f"        {item['frame_id']!s:<{wide}}  {item['reason']}" for item in dropped]
    return "\n".join(lines)


def dropped_table(summary: dict[str, Any], origin_dir: Path | None = None) -> str:
    """Return what was left out and why as an HTML table, with thumbnails of frames that exist.

    Args:
        summary: of the data.
        origin_dir: where relative paths of frames start; None shows no thumbnail of them.
    """
    if not summary["dropped"]:
        return "<p>No frame was left out.</p>"
    head = "".join(
        f'<th style="text-align:left">{name}</th>' for name in ("", "frame", "left out because")
    )
    rows = []
    for item in summary["dropped"]:
        cells = [
            _thumbnail(item.get("path"), origin_dir),
            *map(_escape, (item["frame_id"], item["reason"])),
        ]
        rows.append("".join(f'<td style="text-align:left">{cell}</td>' for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in [head, *rows])
    return f"<table>{body}</table>"


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _thumbnail(path: str | None, origin_dir: Path | None) -> str:
    try:
        with Image.open((origin_dir or Path()) / (path or "")) as image:
            small = ImageOps.contain(image.convert("RGB"), (THUMBNAIL_PX, THUMBNAIL_PX))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "<i>no picture</i>"
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=75)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{small.width}" src="data:image/jpeg;base64,{data}">'


# ---------------------------------------------------------------------------- the training


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """Return one record a step; of a step logged twice the later one, a cut-off last line is ignored.

    Raises:
        BunnyLoraError: the run has no log, or nothing in it.
    """
    path, records = run_dir / "log.jsonl", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["step"]] = record
    if not records:
        raise BunnyLoraError(f"No training steps in {path}: train first.")
    return [records[step] for step in sorted(records)]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean of the last `window` values, of fewer at the beginning."""
    tails = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(tail) / len(tail) for tail in tails]


def loss_curve(run_dir: Path) -> Figure:
    """Show the loss of every step, its running mean, and the learning rate on a second axis."""
    log = read_log(run_dir)
    steps, losses = [r["step"] for r in log], [r["loss"] for r in log]
    window = max(1, len(log) // 10)
    part = max(1, len(log) // 5)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    steps_word = "step" if part == 1 else f"{part} steps"
    title = f"Loss {first:.4f} over the first {steps_word}, {last:.4f} over the last"
    note = "The loss of one step mostly shows how hard its noise levels are: judge by the pictures."
    figure = Plot(3.65, title, note)
    axes = _clean(figure.panel(0.75, 0.85, 8.4, 2.3), grid="y")
    marker = "o" if len(log) < 30 else None
    axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=1, marker=marker, ms=4, label="one step")
    label = f"mean of the last {window} steps"
    axes.plot(steps, smoothed(losses, window), color=BLUE, linewidth=2, label=label)
    axes.set_xlabel(f"optimiser step ({log[-1]['n_images']} images each)", size=LABEL_PT)
    axes.set_ylabel("loss", size=LABEL_PT, color=BLUE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate = axes.twinx()
    _clean(rate)
    rate.plot(steps, [r["learning_rate"] for r in log], color=ORANGE, ls="--", lw=1)
    rate.set_ylabel("learning rate", size=LABEL_PT, color=ORANGE)
    rate.set_ylim(0, 1.15 * max(r["learning_rate"] for r in log) or 1)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.yaxis.get_offset_text().set_fontsize(SMALL_PT)
    axes.legend(
        frameon=False,
        fontsize=SMALL_PT,
        loc="lower left",
        ncols=2,
        bbox_to_anchor=(0, 1),
        borderaxespad=0,
    )
    return figure


def _sample_prompt(run_dir: Path, name: str) -> str:
    prompts = load_config(run_dir / "config.yaml").training.validation_prompts
    index = int(name.split("-")[0])
    return prompts[index] if index < len(prompts) else name


def run_summary(run_dir: Path) -> str:
    """Return a few lines about a finished or broken-off training run."""
    config, log = load_config(run_dir / "config.yaml"), read_log(run_dir)
    last, planned = log[-1], config.training.max_train_steps
    seconds = statistics.median(record["seconds"] for record in log)
    parts = "UNet and text encoder" if config.lora.train_text_encoder else "UNet"
    saved = sorted((path.name for path in run_dir.glob("checkpoint-*")), key=lambda n: int(n[11:]))
    facts = {
        "run": runs.relative(run_dir),
        "base model": config.base_model,
        "LoRA": f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {parts}",
        "steps": f"{last['step']} of {planned}, {last['n_images']} images each",
        "time": f"{seconds:.2f} s a step, {seconds / last['n_images']:.2f} s an image",
        "memory": f"{max(record['peak_memory_gb'] for record in log):.1f} GB at most",
        "loss": f"{last['loss']:.4f} at the last step",
        "saved": ", ".join([*saved, *(["final"] if (run_dir / "final").is_dir() else [])]) or "nothing",
    }
    return "\n".join(f"{name:<11} {fact}" for name, fact in facts.items())


# ---------------------------------------------------------------------------- grids of pictures


def spread(items: Sequence[Any], n: int) -> list[Any]:
    """Return at most `n` items, evenly spaced, first and last among them."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def picture_grid(
    titles: tuple[str, str],
    labels: Sequence[str],
    groups: Sequence[tuple[str, Sequence[str]]],
    cells: Sequence[Sequence[Path | None]],
) -> Figure:
    """Show pictures in rows and columns.

    Args:
        titles: title and subtitle, one line each.
        labels: text beside each row.
        groups: for neighbouring columns their common heading and the heading of each.
        cells: for every row one picture a column, None where none belongs.
    """
    n_columns = sum(len(heads) for _, heads in groups)
    room = WIDTH_IN - LABEL_IN - 0.12 - 2 * GAP_IN * (len(groups) - 1)
    cell = min(CELL_MAX_IN, room / n_columns - GAP_IN)
    step, top = cell + GAP_IN, 1.08
    figure = Plot(top + len(labels) * step + 0.08, *titles)
    column, left = 0, LABEL_IN
    for heading, heads in groups:
        figure.label(left, top - 0.38, heading, size=LABEL_PT, weight="bold")
        for head in heads:
            figure.label(left, top - 0.18, head)
            for row, pictures in enumerate(cells):
                if (picture := pictures[column]) is not None:
                    _show(figure.panel(left, top + row * step, cell, cell), picture)
            column, left = column + 1, left + step
        left += 2 * GAP_IN
    for row, label in enumerate(labels):
        figure.label(0.12, top + row * step, _wrap(label, 26, max(2, int(cell * 6))))
    return figure


def samples_grid(run_dir: Path, max_columns: int = 6, max_rows: int = 8) -> Figure:
    """Show validation samples: a row for each prompt and seed, steps from left to right.

    Raises:
        BunnyLoraError: the run has no samples.
    """
    folders = sorted((run_dir / "samples").glob("step-*"))
    names = sorted({path.name for folder in folders for path in folder.glob("*.png")})
    if not names:
        raise BunnyLoraError(f"No samples in {run_dir}: set training.validation_prompt, then train.")
    folders, names = spread(folders, max_columns), spread(names, max_rows)
    steps = [int(folder.name.removeprefix("step-")) for folder in folders]
    labels = [_sample_prompt(run_dir, name) for name in names]
    cells = [[folder / name for folder in folders] for name in names]
    heads = [f"step {step}" for step in steps]
    titles = ("Validation samples during training", "each row: one prompt, always from the same seed")
    return picture_grid(titles, labels, [("with LoRA after", heads)], cells)


def read_result(run_dir: Path) -> dict[str, Any]:
    """Return `evaluation/eval.json` of a run."""
    return runs.read_json(run_dir / "evaluation" / "eval.json")


def before_after_grid(run_dir: Path, max_rows: int = 8, max_images: int = 2) -> Figure:
    """Show training crops, base and LoRA: a row a prompt, base and LoRA from the same seeds."""
    result, folder = read_result(run_dir), run_dir / "evaluation"
    drawn = _by_model(result, folder)
    rows = _rows(result, max_rows)
    n_seeds = min(result["settings"]["num_images_per_prompt"], max_images)
    cells = []
    for character, prompt in rows:
        crops = [folder / file for file in result["training_crops"].get(character, [])][:2]
        keys = [key for key in drawn["final"] if key[:2] == (character, prompt)][:n_seeds]
        drawings = [drawn[model].get(key) for model in ("base", "final") for key in keys]
        cells.append([*crops, *[None] * (2 - len(crops)), *drawings])
    heads = [f"seed {i + 1}" for i in range(n_seeds)]
    groups = [("training frames", ["", ""]), ("base model", heads), ("with LoRA", heads)]
    titles = ("Before and after: what the LoRA changed", _conditions(result))
    return picture_grid(titles, [prompt for _, prompt in rows], groups, cells)


def _rows(result: dict[str, Any], n: int) -> list[tuple[str, str]]:
    """Return at most `n` pairs of character and prompt: every character's first prompt comes first."""
    finals = [p for p in result["pictures"] if p["model"] == "final"]
    rows = list(dict.fromkeys((p["character"], p["prompt"]) for p in finals))
    by_prompt = sorted(finals, key=lambda p: p["prompt_index"])
    kept = list(dict.fromkeys((p["character"], p["prompt"]) for p in by_prompt))[:n]
    return [row for row in rows if row in kept]


def checkpoint_grid(run_dir: Path, max_columns: int = 7) -> Figure:
    """Show the same prompts and seeds drawn by the base, the checkpoints and the final weights."""
    result = read_result(run_dir)
    drawn = _by_model(result, run_dir / "evaluation")
    models = ["base", *(name for name in drawn if name not in ("base", "final")), "final"]
    keys = min(map(list, drawn.values()), key=len)
    if len(models) == 2:  # no checkpoint but final: one picture for each character will do
        keys = list({key[0]: key for key in reversed(keys)}.values())[::-1][:3]
    models = spread(models, max_columns)
    cells = [[drawn[model].get(key) for model in models] for key in keys]
    steps = [name.replace("checkpoint-", "step ") for name in models[1:-1]]
    groups = [("base model", [""]), ("checkpoints", steps), ("final", [""])]
    titles = ("How the characters came about", "each row: one prompt, always from the same seed")
    return picture_grid(titles, [key[1] for key in keys], [g for g in groups if g[1]], cells)


def _by_model(result: dict[str, Any], folder: Path) -> dict[str, dict[tuple, Path]]:
    """Return for each model its pictures by (character, prompt, seed), in the order of the protocol."""
    drawn: dict[str, dict[tuple, Path]] = {}
    for picture in result["pictures"]:
        key = (picture["character"], picture["prompt"], picture["seed"])
        drawn.setdefault(picture["model"], {})[key] = folder / picture["file"]
    return drawn


def _conditions(result: dict[str, Any]) -> str:
    s = result["settings"]
    text = f"{result['base_model']}, {s['resolution']} px, {s['num_inference_steps']} denoising steps"
    return f"{text}; {result['warning']}" if result["warning"] else text


# ---------------------------------------------------------------------------- scores


def scores_chart(result: dict[str, Any]) -> Figure:
    """Show every measure for base and LoRA, a row a character, with what the training data scores."""
    characters = list(result["models"]["final"]["characters"])[:10]
    rows = [*characters, *(["all"] if len(characters) > 1 else [])]
    height = 0.34 * len(rows) + 0.1
    figure = Plot(height + 2.0, _headline(result), _conditions(result))
    _legend(figure)
    for place, (measure, (name, meaning, direction)) in enumerate(MEASURES.items()):
        axes = figure.panel(1.1 + place * 2.2, 1.45, 2.0, height)
        _clean(axes, f"{name}\n{meaning}\n({direction})", grid="x")
        axes.title.set_fontsize(SMALL_PT)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [_cut(r, 14) for r in rows] if place == 0 else [])
        for y, row in enumerate(rows):
            _scores_of(axes, y, result, measure, row)
    return figure


def _scores_of(axes: Axes, y: float, result: dict[str, Any], measure: str, row: str) -> None:
    """Draw one row of a panel: base and LoRA with their intervals, and marks to read them against."""
    for model, colour, shift in (("base", GREY, -0.17), ("final", BLUE, 0.17)):
        if value := of_row(result["models"][model], row).get(measure):
            if value["low"] is not None:
                axes.plot([value["low"], value["high"]], [y + shift] * 2, color=colour, linewidth=1.5)
            axes.plot(value["mean"], y + shift, "o", color=colour, markersize=6)
    if (own := training_score(result, measure, row)) is not None:
        axes.plot([own, own], [y - 0.36, y + 0.36], color=GREEN, linewidth=2)
    if measure == "separation":
        axes.axvline(result["reference"]["chance_level"], color=ORANGE, linewidth=1, linestyle=":")
        axes.set_xlim(-0.05, 1.05)


def _legend(figure: Plot) -> None:
    entries = ((GREY, "base model"), (BLUE, "with LoRA"), (GREEN, "the training data itself"))
    left = 0.12
    for colour, text in (*entries, (ORANGE, "guessing")):
        figure.label(left, 0.62, "\u25a0", color=colour, size=LABEL_PT)
        figure.label(left + 0.16, 0.62, text)
        left += 0.36 + 0.062 * len(text)
    figure.label(left, 0.62, "lines: 95 % intervals")


def of_row(table: dict[str, Any], row: str) -> dict[str, Any]:
    """Return a table's measures for "all" images or for one character."""
    return table["all"] if row == "all" else table["characters"][row]


def training_score(result: dict[str, Any], measure: str, row: str) -> float | None:
    """Return what the training data itself scores, where that can be said."""
    reference = result["reference"]
    if measure in ("fidelity", "consistency"):
        value = reference["likeness_of_crops"].get(row)
    elif row != "all" and len(reference["n_crops"]) > 1:
        return None
    else:
        name = "separation_of_crops" if measure == "separation" else "nearest_other_frame"
        value = reference[name]
    return value["mean"] if value else None


def _headline(result: dict[str, Any]) -> str:
    """Say what happened to fidelity, and whether more than chance is behind it."""
    change = result["differences"]["all"]["fidelity"]
    if change["low"] is None:
        return f"Fidelity changed by {change['mean']:+.3f}; too few images to say more"
    span = f"{change['mean']:+.3f} (95 %: {change['low']:+.3f} to {change['high']:+.3f})"
    if change["low"] <= 0 <= change["high"]:
        return f"No clear change in fidelity: {span}"
    return f"The LoRA {'raised' if change['mean'] > 0 else 'lowered'} fidelity: {span}"


def scores_table(result: dict[str, Any]) -> str:
    """Return all scores as plain text, always 82 columns wide."""
    lines = [_wrap(_headline(result), TABLE_WIDTH, 3), _wrap(_conditions(result), TABLE_WIDTH, 3), ""]
    head = (
        f"{'':<15} {'measure':<12}{'base':>8}{'LoRA':>8}{'change':>9}{'95 % interval':>20}{'data':>9}"
    )
    lines += [head, "-" * TABLE_WIDTH]
    characters = list(result["models"]["final"]["characters"])
    for row in [*characters, *(["all"] if len(characters) > 1 else [])]:
        for place, measure in enumerate(MEASURES):
            lines.append(
                f"{_cut(row, 15) if place == 0 else '':<15} {_score_line(result, measure, row)}"
            )
    drift, reference = result["drift"], result["reference"]
    lines += [
        "-" * TABLE_WIDTH,
        f"drift of prompts without a name {drift['mean']:.3f} (0: nothing changed), n = {drift['n']}",
        f"separation by guessing {reference['chance_level']:.3f}",
        f"features: {result['settings']['features']}; {result['seconds_per_image']:.1f} s an image",
        "data: what the training images score among themselves",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _score_line(result: dict[str, Any], measure: str, row: str) -> str:
    base, final, change = (
        of_row(table, row).get(measure)
        for table in (result["models"]["base"], result["models"]["final"], result["differences"])
    )
    means = f"{_number(base and base['mean']):>8}{_number(final and final['mean']):>8}"
    span = (
        f"{change['low']:+.3f} to {change['high']:+.3f}"
        if change and change["low"] is not None
        else "-"
    )
    own = _number(training_score(result, measure, row))
    return f"{measure:<12}{means}{_number(change and change['mean'], '+'):>9}{span:>20}{own:>9}"


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"
