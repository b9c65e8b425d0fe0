"""Several runs beside each other: what differs in settings and scores, and the same pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from bunny_lora.config import by_key
from bunny_lora.core import paths
from bunny_lora.core.eval_result import ImageScores, Interval
from bunny_lora.report.choices import mark
from bunny_lora.report.grids import picture_grid
from bunny_lora.report.measures import Measure, columns, measures
from bunny_lora.report.plot import BLUE, SMALL_PT, Plot, clean, cut
from bunny_lora.report.runs import Run
from bunny_lora.report.scores import span

WHERE = ("output_dir", "data_dir", "resume")  # differ without making another LoRA
N_PICTURED, N_ROWS = 8, 8
ROW_IN = 0.34
BASE = "base model"
AXES = ("identity", "as asked", "drift", "fidelity")


Key = tuple[str, str, int]
Drawn = tuple[Run, ImageScores]


@dataclass(frozen=True)
class Comparison:
    """Runs, the first of which the others are compared with.

    Attributes:
        runs: as they were read.
        names: short and different, one a run.
        differences: of each run but the first what it scores more than that, by the same pictures.
        order: in words, why the runs stand in this order.
    """

    runs: Sequence[Run]
    names: Sequence[str]
    differences: Sequence[Mapping[str, Interval]]
    order: str = "in the order in which they were named"

    @property
    def measures(self) -> list[list[Measure]]:
        """Of each run all that was measured; nothing of one that was not evaluated."""
        return [measures(run.result) if run.result else [] for run in self.runs]


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return what runs are called: their folders' names, or what of their paths is not the same."""
    names = [folder.name for folder in folders]
    if len(set(names)) == len(names):
        return names
    parts = [paths.relative(folder).split("/") for folder in folders]
    first, last = (_n_alike(way) for way in (parts, [p[::-1] for p in parts]))
    return ["/".join(part[first : len(part) - last]) or "/".join(part) for part in parts]


def _n_alike(ways: list[list[str]]) -> int:
    """Return how many first parts are the same in all."""
    alike = [len(set(step)) == 1 for step in zip(*ways, strict=False)]
    return alike.index(False) if False in alike else len(alike)


def settings_rows(found: Comparison) -> dict[str, list[str]]:
    """Return the settings that are not the same in all runs: a value a run, by key.

    Where a run lies and where its data lie is left out. A run whose settings cannot be read has "?".
    """
    every = [by_key(run.config) if run.config else {} for run in found.runs]
    keys = dict.fromkeys(key for values in every for key in values)
    rows = {key: [str(values.get(key, "?")) for values in every] for key in keys if key not in WHERE}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def score_rows(found: Comparison) -> list[tuple[str, str, list[Measure | None]]]:
    """Return name, meaning and one value a run of every measure that some run has."""
    every = found.measures
    by_name = [{measure.name: measure for measure in of_run} for of_run in every]
    abouts = {measure.name: measure.about for of_run in reversed(every) for measure in of_run}
    names = dict.fromkeys(measure.name for of_run in every for measure in of_run)
    return [(name, abouts[name], [known.get(name) for known in by_name]) for name in names]


def doubts(found: Comparison) -> list[str]:
    """Return why the runs do not compare, or only in part; a sentence each."""
    lines = []
    for run, name in zip(found.runs, found.names, strict=True):
        lines += [f"{name}: {text}" for text in run.said.values()]
        if run.result is None and "evaluation" not in run.said:
            lines.append(f"{name} was not evaluated: `bunny-lora evaluate` draws and measures.")
    settings = [run.result.settings.model_dump() for run in found.runs if run.result]
    differ = [key for key in (settings or [{}])[0] if len({str(s[key]) for s in settings}) > 1]
    if differ:
        lines.append(
            f"The evaluations differ in {', '.join(differ)}: scores of these runs compare only as far"
            " as the same prompts, seeds and features go."
        )
    if len({(run.result.base_model, _base(run)) for run in found.runs if run.result}) > 1:
        lines.append("The runs have different base models.")
    if len({_data(run) for run in found.runs if _data(run)}) > 1:
        lines.append("The runs were trained on different data.")
    return lines


def _base(run: Run) -> str | None:
    return run.result.run_info.final.get("base_sha256") if run.result else None


def _data(run: Run) -> str | None:
    made = run.result.run_info.trained_by if run.result else None
    return (made or {}).get("data_sha256")


def same_pictures(
    found: Comparison,
) -> dict[tuple[str, str, int], list[tuple[Run, ImageScores] | None]]:
    """Return pictures of one prompt and seed: the base model's, then one a run; None where it lacks it.

    Those that most runs have come first, every character's first prompt before a second.
    """
    columns: list[dict[Key, Drawn]] = [{}]
    for run in found.runs[:N_PICTURED]:
        columns.append({})
        for image in run.result.images if run.result else []:
            key = (image.character, image.prompt, image.seed)
            if image.model == "base":
                columns[0].setdefault(key, (run, image))
            elif image.model == "final":
                columns[-1][key] = (run, image)
    places: dict[tuple[str, str], int] = {}
    ranked: list[tuple[int, int, int, int, Key]] = []
    for key in dict.fromkeys(key for column in columns for key in column):
        nth = places[key[:2]] = places.get(key[:2], -1) + 1
        image = next(column[key][1] for column in columns if key in column)
        lacking = sum(key not in column for column in columns)
        ranked.append((lacking, nth, image.prompt_index, len(ranked), key))
    chosen = [key for *_, key in sorted(ranked)[:N_ROWS]]
    return {key: [column.get(key) for column in columns] for key in chosen}


# ---------------------------------------------------------------------------- for notebooks


def comparison_table(found: Comparison) -> str:
    """Return in plain text what differs: settings, scores with intervals, the same pictures' scores."""
    wide = max(24, *(len(name) + 2 for name in found.names))
    head = f"{'':<40}" + "".join(f"{cut(name, wide - 2):>{wide}}" for name in found.names)
    lines = [*doubts(found), f"{len(found.runs)} runs, {found.order}", "", head, "", "settings"]
    rows = settings_rows(found)
    lines += [_line(key, [cut(v, wide - 2) for v in values], wide) for key, values in rows.items()]
    if not rows:
        lines.append("  the same in all of them")
    lines += ["", "scores of the LoRA, 95 % intervals"]
    for name, _, values in score_rows(found):
        lines.append(_line(name, [span(v.final).strip() if v else "-" for v in values], wide))
    if any(found.differences):
        lines += ["", f"more than {found.names[0]}, picture by picture"]
        for name in dict.fromkeys(name for of_run in found.differences for name in of_run):
            cells = [span(d[name]).strip() if name in d else "-" for d in found.differences]
            lines.append(_line(name, ["", *cells], wide))
    return "\n".join(line.rstrip() for line in lines)


def _line(name: str, cells: Sequence[str], wide: int) -> str:
    return f"  {cut(name, 38):<38}" + "".join(f"{cell:>{wide}}" for cell in cells)


def comparison_chart(found: Comparison) -> Figure:
    """Show identity, what was asked for, drift and fidelity of each run, with intervals."""
    every = found.measures
    panels = {name: values for word in AXES for name, values in columns(every, word).items()}
    if not panels:
        return Plot(0.7, "Nothing to compare: none of these runs was evaluated")
    height = ROW_IN * len(found.runs) + 0.1
    figure = Plot(height + 1.6, "Runs compared, with 95 % intervals", found.order)
    step = 7.6 / max(4, len(panels))
    for place, (named, values) in enumerate(panels.items()):
        axes = figure.panel(2.4 + step * place, 1.1, step - 0.25, height)
        clean(axes, cut(named, round(14 * step)), grid="x")
        axes.title.set_fontsize(SMALL_PT)
        axes.set_ylim(len(values) - 0.5, -0.5)
        labels = [cut(name, 28) for name in found.names] if not place else []
        axes.set_yticks(range(len(values)) if labels else [], labels)
        for row, measure in enumerate(values):
            mark(axes, row, measure.final if measure else None, BLUE)
    return figure


def comparison_grid(found: Comparison) -> Figure:
    """Show the same prompts and seeds drawn by the base model and by each run."""
    rows = same_pictures(found)
    if not rows:
        return Plot(0.7, "Nothing to show: none of these runs was evaluated")
    names = [BASE, *(cut(name, 16) for name in found.names[:N_PICTURED])]
    cells = [[_path(one) for one in row] for row in rows.values()]
    titles = ("The same prompts and seeds, run by run", _pictured(found))
    return picture_grid(titles, [key[1] or "the empty prompt" for key in rows], [("", names)], cells)


def _pictured(found: Comparison) -> str:
    more = len(found.runs) - N_PICTURED
    return f"the first {N_PICTURED} of {len(found.runs)} runs" if more > 0 else "each row: one seed"


def _path(one: Drawn | None) -> Path | None:
    return one[0].folder / "evaluation" / one[1].file if one else None
