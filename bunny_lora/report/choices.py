"""What was chosen for a run, out of what: as a table, as a chart, and as the pictures themselves."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bunny_lora.core import choice as choice_file
from bunny_lora.core.choice import Candidate, Choice
from bunny_lora.core.eval_parts import Interval
from bunny_lora.core.image_file import read_metadata
from bunny_lora.report.grids import picture_grid
from bunny_lora.report.plot import BLUE, GREY, ORANGE, SMALL_PT, Plot, clean, spread, wrap
from bunny_lora.report.scores import number, span

NOT_CHOSEN = "Nothing was chosen: `bunny-lora choose` draws with several checkpoints and scales."
AXES = {
    "asked": "as asked (higher is better)",
    "identity": "identity (1: the character itself)",
    "drift": "drift (0: nothing changed)",
}
ROW_IN = 0.3


def choice_table(choice: Choice) -> str:
    """Return the loss of every checkpoint, and how every candidate was judged."""
    lines = _loss_lines(choice) if choice.losses else ["chosen by hand; nothing was judged"]
    width = max(len(candidate.label) for candidate in choice.candidates)
    lines += ["", f"{'':<{width + 2}}{'as asked':>24}{'identity':>24}{'drift':>24}"]
    for place, candidate in enumerate(choice.candidates):
        mark = "*" if place == choice.chosen else "=" if place in choice.tied else " "
        spans = [_cell(getattr(candidate, axis)) for axis in AXES]
        lines.append(f"{mark} {candidate.label:<{width}}" + "".join(f"{text:>24}" for text in spans))
    lines += ["", "* chosen, = tied with it", "", *_chosen_lines(choice)]
    return "\n".join(line.rstrip() for line in lines)


def _loss_lines(choice: Choice) -> list[str]:
    frames = "held-out frames" if choice.held_out else "the training's own frames"
    lines = [f"loss on {choice.n_frames} of {frames}, and what it is more than the lowest", ""]
    lines += [
        f"  {loss.model:<18}{number(loss.loss.mean):>7}  {span(loss.above_lowest)}"
        for loss in choice.losses
    ]
    if not choice.held_out:
        lines += ["", "It falls for whatever is learnt by heart, too: held_out: 0.1 keeps shots aside."]
    return lines


def _cell(value: Interval | None) -> str:
    return span(value) if value else "-"


def _chosen_lines(choice: Choice) -> list[str]:
    best = choice.best
    judge = f"{choice.judged_by} (colours only)" if choice.judged_by == "palette" else choice.judged_by
    judged = "" if choice.by_hand else f", judged by {judge}"
    text = f"{best.label}{judged}: {choice.why}. handover.json says so to whoever draws."
    return wrap(text, 100, 4).splitlines()


def read_choice(run_dir: Path) -> Choice | None:
    """Return `evaluation/choice.json` of a run, None where nobody has chosen."""
    return choice_file.find(run_dir)


def choice_chart(choice: Choice | None) -> Figure:
    """Show every candidate on both axes and its drift, with intervals; the chosen one in orange."""
    if choice is None:
        return Plot(0.7, NOT_CHOSEN)
    candidates = choice.candidates
    height = ROW_IN * len(candidates)
    figure = Plot(height + 1.4, f"Chosen: {choice.best.label}", wrap(choice.why, 150, 1))
    for column, (axis, title) in enumerate(AXES.items()):
        axes = figure.panel(2.9 + 2.35 * column, 1.1, 2.1, height)
        clean(axes, title, grid="x")
        axes.title.set_fontsize(SMALL_PT)
        axes.set_ylim(len(candidates) - 0.5, -0.5)
        labels = [candidate.label for candidate in candidates] if column == 0 else []
        axes.set_yticks(range(len(candidates)) if labels else [], labels)
        for place, candidate in enumerate(candidates):
            mark(axes, place, getattr(candidate, axis), _colour(choice, place))
        if not any(getattr(candidate, axis) for candidate in candidates):
            axes.set_xticks([])
            axes.text(0.5, 0.5, "not told", transform=axes.transAxes, size=SMALL_PT, ha="center")
    return figure


def _colour(choice: Choice, place: int) -> str:
    if place == choice.chosen:
        return ORANGE
    return BLUE if place in choice.tied else GREY


def mark(axes: Axes, y: float, value: Interval | None, colour: str) -> None:
    """Draw a mean as a dot at a height, with its interval; nothing for None."""
    if value is None:
        return
    if value.low is not None and value.high is not None:
        axes.plot([value.low, value.high], [y, y], color=colour, linewidth=1.5)
    axes.plot(value.mean, y, "o", color=colour, markersize=5)


def choice_grid(run_dir: Path, choice: Choice | None, max_rows: int = 8) -> Figure:
    """Show candidates' pictures, a column each, a row a prompt: checkpoint, scale, guidance."""
    if choice is None:
        return Plot(0.7, NOT_CHOSEN)
    drawn = [candidate for candidate in choice.candidates if candidate.files]
    if not drawn:
        return Plot(
            0.7, f"Chosen by hand: {choice.best.label}", "no pictures were drawn to choose among"
        )
    shown = spread(drawn, 7)
    if choice.best in drawn and choice.best not in shown:
        shown[-1] = choice.best
    rows = spread(range(len(drawn[0].files)), max_rows)
    folder = choice_file.path_of(run_dir).parent
    cells = [[folder / candidate.files[row] for candidate in shown] for row in rows]
    labels = [str((read_metadata(row[0]) or {}).get("prompt", "")) for row in cells]
    groups = [(_short(choice, candidate), [_how(candidate)]) for candidate in shown]
    titles = (f"Chosen: {choice.best.label}", "each row: one prompt and one seed; * chosen")
    return picture_grid(titles, labels, groups, cells)


def _short(choice: Choice, candidate: Candidate) -> str:
    name = "final" if candidate.model == "final" else f"step {candidate.step}"
    return f"{name} *" if candidate == choice.best else name


def _how(candidate: Candidate) -> str:
    return f"x {candidate.lora_scale:g}, g {candidate.guidance_scale:g}"
