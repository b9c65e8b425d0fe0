"""The scores of an evaluation, `eval.json`, as a chart and as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bunny_lora.core import eval_result
from bunny_lora.core.eval_result import EvalResult, Interval, ScoreTable, sees
from bunny_lora.report.plot import BLUE, GREEN, GREY, ORANGE, SMALL_PT, WIDTH_IN, Plot, clean, cut, wrap

TABLE_WIDTH = 82
MIN_SPAN = 0.1

MEASURES = {
    "fidelity": ("Fidelity", "likeness to the training crops", "higher is better"),
    "consistency": ("Consistency", "likeness within a character", "above the data: too alike"),
    "separation": ("Separation", "nearest to the own character", "higher is better"),
    "memorisation": ("Copying", "likeness to the nearest frame", "too high: learnt by heart"),
}


def read_result(run_dir: Path) -> EvalResult:
    """Return `evaluation/eval.json` of a run."""
    return eval_result.read(run_dir)


def conditions(result: EvalResult) -> str:
    """Say in one line what drew the pictures, and a warning where they mean nothing."""
    settings = result.settings
    size, steps = settings.resolution, settings.num_inference_steps
    text = f"{result.base_model}, {size} px, {steps} denoising steps"
    if (features := sees(settings.features)) != settings.features:
        text += f"; {features}"
    return f"{text}; {result.warning}" if result.warning else text


def scores_chart(result: EvalResult) -> Figure:
    """Show every measure for base and LoRA, a row a character, with what the training data scores."""
    characters = list(result.models["final"].characters)[:10]
    rows = [*characters, *(["all"] if len(characters) > 1 else [])]
    height = 0.34 * len(rows) + 0.1
    figure = Plot(height + 2.0, _headline(result), conditions(result))
    _legend(figure)
    for place, (measure, (name, meaning, direction)) in enumerate(MEASURES.items()):
        axes = figure.panel(1.1 + place * 2.2, 1.45, 2.0, height)
        clean(axes, f"{name}\n{meaning}\n({direction})", grid="x")
        axes.title.set_fontsize(SMALL_PT)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [cut(r, 14) for r in rows] if place == 0 else [])
        for y, row in enumerate(rows):
            _scores_of(axes, y, result, measure, row)
        low, high = axes.get_xlim()
        if (lacking := MIN_SPAN - (high - low)) > 0:  # else differences of nothing fill the panel
            axes.set_xlim(low - lacking / 2, high + lacking / 2)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    return figure


def _scores_of(axes: Axes, y: float, result: EvalResult, measure: str, row: str) -> None:
    """Draw one row of a panel: base and LoRA with their intervals, and marks to read them against."""
    for model, colour, shift in (("base", GREY, -0.17), ("final", BLUE, 0.17)):
        if value := score_of(result.models[model], row, measure):
            if value.low is not None and value.high is not None:
                axes.plot([value.low, value.high], [y + shift] * 2, color=colour, linewidth=1.5)
            axes.plot(value.mean, y + shift, "o", color=colour, markersize=6)
    if (of_data := training_score(result, measure, row)) is not None:
        axes.plot([of_data, of_data], [y - 0.36, y + 0.36], color=GREEN, linewidth=2)
    if measure == "separation":
        axes.axvline(result.reference.chance_level, color=ORANGE, linewidth=1, linestyle=":")
        axes.set_xlim(-0.05, 1.05)


def _legend(figure: Plot) -> None:
    dot: dict[str, Any] = {"marker": "o", "markersize": 6}
    bar: dict[str, Any] = {"marker": "|", "markersize": 10, "markeredgewidth": 2}
    marks = [
        Line2D([], [], color=GREY, lw=1.5, label="base model, 95 % interval", **dot),
        Line2D([], [], color=BLUE, lw=1.5, label="with LoRA, 95 % interval", **dot),
        Line2D([], [], color=GREEN, lw=0, label="the training data itself", **bar),
        Line2D([], [], color=ORANGE, lw=1, ls=":", label="guessing"),
    ]
    place = (0.12 / WIDTH_IN, 1 - 0.6 / figure.get_figheight())
    style: dict[str, Any] = {"frameon": False, "fontsize": SMALL_PT, "borderpad": 0, "borderaxespad": 0}
    figure.legend(handles=marks, loc="upper left", bbox_to_anchor=place, ncols=len(marks), **style)


def score_of(table: ScoreTable, row: str, measure: str) -> Interval | None:
    """Return a measure over "all" images or over those of one character."""
    return getattr(table.all if row == "all" else table.characters[row], measure)


def training_score(result: EvalResult, measure: str, row: str) -> float | None:
    """Return what the training data itself scores, where that can be said."""
    reference = result.reference
    if measure in ("fidelity", "consistency"):
        value = reference.similarity_of_crops.get(row)
    elif row != "all" and len(reference.n_crops) > 1:
        return None
    elif measure == "separation":
        value = reference.separation_of_crops
    else:
        value = reference.nearest_other_frame
    return _mean(value)


def _headline(result: EvalResult) -> str:
    """Say what happened to fidelity, and whether more than chance is behind it."""
    change = result.differences.all.fidelity
    mean = number(change.mean, "+")
    if change.low is None or change.high is None:
        return f"Fidelity changed by {mean}; too few images to say more"
    span = f"{mean} (95 %: {number(change.low, '+')} to {number(change.high, '+')})"
    if change.low <= 0 <= change.high:
        return f"No clear change in fidelity: {span}"
    return f"The LoRA {'raised' if change.mean > 0 else 'lowered'} fidelity: {span}"


DRIFTS = {"templates": "without the name", "others": "other subjects", "empty": "the empty prompt"}


def drift_lines(result: EvalResult) -> list[str]:
    """Return a line for each kind of prompts that name nobody; fewer for older files."""
    return [
        f"{f'drift, {DRIFTS.get(kind, kind)}':<26}{span(score.ratio)}   1: as another seed"
        for kind, score in result.drifts.items()
        if score.ratio
    ]


def _copy_lines(result: EvalResult) -> list[str]:
    if result.copies is None:
        return []
    above = result.copies.above
    held_out = f"base {number(above['base'].mean)}, held-out frames 0.050"
    return [f"{'copies of what it saw':<26}{span(above['final'])}   {held_out}"]


def span(value: Interval) -> str:
    """Return a mean with its interval, where it has one."""
    if value.low is None or value.high is None:
        return f"{number(value.mean):>6}"
    return f"{number(value.mean):>6} ({number(value.low)} to {number(value.high)})"


def scores_table(result: EvalResult) -> str:
    """Return all scores as plain text, always 82 columns wide."""
    lines = [wrap(_headline(result), TABLE_WIDTH, 3), wrap(conditions(result), TABLE_WIDTH, 3), ""]
    head = (
        f"{'':<15} {'measure':<12}{'base':>8}{'LoRA':>8}{'change':>9}{'95 % interval':>20}{'data':>9}"
    )
    lines += [head, "-" * TABLE_WIDTH]
    characters = list(result.models["final"].characters)
    for row in [*characters, *(["all"] if len(characters) > 1 else [])]:
        for place, measure in enumerate(MEASURES):
            lines.append(
                f"{cut(row, 15) if place == 0 else '':<15} {_score_line(result, measure, row)}"
            )
    drift = result.drift
    lines += [
        "-" * TABLE_WIDTH,
        f"drift of prompts without a name {number(drift.mean)} (0: nothing changed), n = {drift.n}",
        *drift_lines(result),
        *_copy_lines(result),
        f"separation by guessing {result.reference.chance_level:.3f}",
        f"features: {sees(result.settings.features)}; {result.seconds_per_image:.1f} s an image",
        "data: what the training images score among themselves",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _score_line(result: EvalResult, measure: str, row: str) -> str:
    base, final, change = (
        score_of(table, row, measure)
        for table in (result.models["base"], result.models["final"], result.differences)
    )
    means = f"{number(_mean(base)):>8}{number(_mean(final)):>8}"
    span = (
        f"{number(change.low, '+')} to {number(change.high, '+')}"
        if change and change.low is not None
        else "-"
    )
    of_data = number(training_score(result, measure, row))
    return f"{measure:<12}{means}{number(_mean(change), '+'):>9}{span:>20}{of_data:>9}"


def _mean(value: Interval | None) -> float | None:
    return value.mean if value else None


def number(value: float | None, sign: str = "") -> str:
    """Return a number with three decimals, "-" for none, and never a negative zero."""
    if value is None:
        return "-"
    text = f"{value:{sign}.3f}"
    return text if float(text) else "0.000"  # neither -0.000 nor +0.000
