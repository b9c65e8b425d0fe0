"""The two axes of a run, identity and what was asked for, trait by trait: as a table and as a chart."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bunny_lora.core.eval_result import EvalResult, TraitScore, TraitScores
from bunny_lora.report.plot import LABEL_PT, SMALL_PT, Plot, clean, cut
from bunny_lora.report.scores import conditions, drift_lines, number, span

NO_TRAITS = "No traits were read: evaluation.traits names none."
CELL_IN = 0.42


def traits_table(result: EvalResult) -> str:
    """Return identity and what was asked for, side by side, and every trait."""
    if (found := result.traits) is None:
        return NO_TRAITS
    final, names = found.identity["final"], list(found.traits)
    lines = [
        f"{'identity':<26}{span(final['all'])}   {_zero(found)}, 1: the character itself",
        f"{'as asked':<26}{span(found.asked['final'])}   base {number(found.asked['base'].mean)},"
        f" renders {number(found.asked['ceiling'].mean)}",
        f"{'another one mixed in':<26}{span(found.another['final'])}   base"
        f" {number(found.another['base'].mean)}, renders {number(found.another['ceiling'].mean)}",
    ]
    if nobody := found.nobody.get("final"):
        base = number(found.nobody["base"].mean)
        lines.append(f"{'heroes on nobody':<26}{span(nobody)}   base {base}")
    lines += [
        *drift_lines(result),
        "",
        _counting(found),
        "",
        f"{'':<26}" + "".join(f"{cut(trait, 13):>14}" for trait in found.counted),
    ]
    for name in names:
        cells = [found.traits[name].get(trait) for trait in found.counted]
        shown = [f"{number(place(cell)):>14}" if cell else f"{'-':>14}" for cell in cells]
        label = f"{cut(name, 14)} {number(final[name].mean)}" if name in final else cut(name, 20)
        lines.append(f"{label:<26}" + "".join(shown))
    return "\n".join(line.rstrip() for line in lines)


def _zero(found: TraitScores) -> str:
    """Return what 0 is; with looks in its prompts, the base model has a place of its own."""
    base = found.identity["base"]["all"].mean
    by_words = any(s.floor is not None for of in found.traits.values() for s in of.values())
    return f"0: nobody, {number(base)}: the base model by words" if by_words else "0: the base model"


def _counting(found: TraitScores) -> str:
    return f"traits that the reader reads well enough to count: {', '.join(found.counted)}"


def place(score: TraitScore) -> float | None:
    """Return where the LoRA stands with a trait between base model, 0, and renders, 1."""
    base, final = score.models.get("base"), score.models.get("final")
    base = base if score.floor is None else score.floor
    if base is None or final is None or score.ceiling - base < 0.05:  # nothing to learn
        return None
    return (final - base) / (score.ceiling - base)


def traits_chart(result: EvalResult) -> Figure:
    """Show identity trait by trait, and whose fur was drawn on whom; both axes in the title."""
    found = result.traits
    if found is None:
        return Plot(0.7, NO_TRAITS)
    names, n_traits = list(found.traits), len(found.counted)
    height = CELL_IN * (len(names) + 1)
    counting = f"{conditions(result)}; {_counting(found)}"
    figure = Plot(height + 2.1, _both_axes(found), counting)
    places = np.full((len(names), n_traits), np.nan)
    for row, name in enumerate(names):
        for column, trait in enumerate(found.counted):
            score = found.traits[name].get(trait)
            found_at = place(score) if score else None
            places[row, column] = np.nan if found_at is None else found_at
    axes = figure.panel(1.1, 1.5, CELL_IN * 1.3 * n_traits, CELL_IN * len(names))
    _cells(axes, places, names, found.counted, "trait by trait (0 base, 1 right)")
    shares = np.array(found.confusion, dtype=float)
    left = 1.1 + CELL_IN * 1.3 * n_traits + 1.3
    axes = figure.panel(left, 1.5, CELL_IN * 1.3 * (len(names) + 1), CELL_IN * (len(names) + 1))
    _cells(axes, shares, [*names, "nobody"], [*names, "nobody"], "asked for, and whose fur is seen")
    return figure


def _both_axes(found: TraitScores) -> str:
    identity, asked = found.identity["final"]["all"], found.asked["final"]
    return f"Identity {number(identity.mean)}, as asked {number(asked.mean)}"


def _cells(axes: Axes, values: np.ndarray, rows: list[str], columns: list[str], title: str) -> None:
    """Draw a table of shares; the number in each cell says what its shade does."""
    clean(axes, title)
    axes.title.set_fontsize(LABEL_PT)
    axes.imshow(np.clip(values, 0, 1), cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    axes.set_xticks(range(len(columns)), [cut(c, 13) for c in columns], rotation=30, ha="left")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(rows)), [cut(row, 14) for row in rows])
    for (row, column), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else f"{value:.2f}"
        colour = "white" if value > 0.7 else "#222222"
        axes.text(column, row, text, ha="center", va="center", size=SMALL_PT, color=colour)
