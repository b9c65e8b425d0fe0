"""The two axes of a run, identity and what was asked for, always together; and colour, as a third."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bunny_lora.core.eval_parts import Pairs
from bunny_lora.core.eval_result import EvalResult, IdentityScores, Interval
from bunny_lora.report.plot import (
    BLUE,
    GREEN,
    GREY,
    LABEL_PT,
    ORANGE,
    SMALL_PT,
    Plot,
    clean,
    cut,
    wrap,
)
from bunny_lora.report.scores import TABLE_WIDTH, conditions, number

NO_AXES = "This evaluation is of an older version, which told neither identity nor what was asked for."


def axes_table(result: EvalResult) -> str:
    """Return identity, what was asked for and colour side by side, and what identity stands between."""
    identity, following, colour = result.identity, result.following, result.colour
    if not (identity or following or colour):
        return NO_AXES
    lines = [wrap(verdict(result), TABLE_WIDTH, 3), wrap(conditions(result), TABLE_WIDTH, 3), ""]
    lines += [f"{'':<12}{'base':>8}{'LoRA':>8}{'change':>9}{'95 % interval':>20}   to read it against"]
    lines += ["-" * TABLE_WIDTH]
    if identity and identity.change:
        base, final = (identity.models[name]["all"] for name in ("base", "final"))
        lines.append(_row("identity", base, final, identity.change, "0: floor, 1: ceiling"))
    if following:
        base, final = (following.models[name] for name in ("base", "final"))
        against = f"other prompts: {number(following.reference)}"
        lines.append(_row("as asked", base, final, following.change, against))
    if colour:
        base, final = (colour.models[name] for name in ("base", "final"))
        lines.append(
            _row("colour", base, final, colour.change, f"the film: {number(colour.reference)}")
        )
    if identity:
        lines += ["", *_anchor_lines(identity)]
    if result.pairs:
        lines += ["", *_pair_lines(result.pairs)]
    asked = following.features if following else "evaluation.prompt_features names nothing"
    lines += ["", wrap(f"as asked: {asked}; colour: palette, sees colours only", TABLE_WIDTH, 3)]
    return "\n".join(line.rstrip() for line in lines)


def axes_chart(result: EvalResult) -> Figure:
    """Show base model, checkpoints and LoRA as points: identity to the right, as asked upwards."""
    identity, following = result.identity, result.following
    if not (identity and identity.change and following):
        return Plot(0.7, "Two axes need evaluation.ceiling_shots and evaluation.prompt_features")
    figure = Plot(4.4, verdict(result), conditions(result))
    axes = figure.panel(1.1, 0.9, 5.2, 2.9)
    clean(axes, grid="x")
    axes.set_xlabel(f"identity by {identity.features} (0: floor, 1: ceiling)", fontsize=LABEL_PT)
    axes.set_ylabel(f"as asked, by {cut(following.features, 24)}", fontsize=LABEL_PT)
    for line in (0, 1):
        axes.axvline(line, color=GREEN, linewidth=1, linestyle=":")
    colours = {"base": GREY, "final": BLUE}
    for model in following.models:
        if "all" not in identity.models.get(model, {}):
            continue
        right, up = identity.models[model]["all"], following.models[model]
        colour = colours.get(model, ORANGE)
        _cross(axes, right, up, colour)
        name = {"base": "base model", "final": "LoRA"}.get(model, model.replace("checkpoint-", "step "))
        axes.annotate(
            name, (right.mean, up.mean), (5, 5), textcoords="offset points", color=colour, size=SMALL_PT
        )
    return figure


def _cross(axes: Axes, right: Interval, up: Interval, colour: str) -> None:
    """Draw a point with both its intervals, where it has them."""
    axes.plot(right.mean, up.mean, "o", color=colour, markersize=6)
    if right.low is not None and right.high is not None:
        axes.plot([right.low, right.high], [up.mean] * 2, color=colour, linewidth=1.5)
    if up.low is not None and up.high is not None:
        axes.plot([right.mean] * 2, [up.low, up.high], color=colour, linewidth=1.5)


def verdict(result: EvalResult) -> str:
    """Say what is gained and what is lost, where more than chance is behind it."""
    identity = _moved(result.identity.change if result.identity else None)
    following = _moved(result.following.change if result.following else None)
    if identity == "gained" and following == "lost":
        return "Identity is gained and what was asked for is lost: it has learnt too much"
    said = {"gained": "gained", "lost": "lost", "": "not clearly changed", None: "not told"}
    return f"Identity is {said[identity]}, what was asked for is {said[following]}"


def _moved(change: Interval | None) -> str | None:
    """Return which way something went; "" where that is not sure, None where nothing was measured."""
    if change is None:
        return None
    if change.low is None or change.high is None or change.low <= 0 <= change.high:
        return ""
    return "gained" if change.mean > 0 else "lost"


def _row(name: str, base: Interval, final: Interval, change: Interval, against: str) -> str:
    span = "-"
    if change.low is not None:
        span = f"{number(change.low, '+')} to {number(change.high, '+')}"
    means = f"{number(base.mean):>8}{number(final.mean):>8}{number(change.mean, '+'):>9}"
    return f"{name:<12}{means}{span:>20}   {against}"


def _anchor_lines(found: IdentityScores) -> list[str]:
    """Return the floors, the ceiling and the identity between them, a line a character."""
    lines = [f"{'identity of':<20}{'base':>8}{'others':>8}{'ceiling':>9}{'LoRA':>8}  95 % interval"]
    for name, anchors in found.anchors.items():
        floors = f"{number(anchors.base.mean):>8}{number(_mean(anchors.wrong)):>8}"
        score = found.models["final"].get(name)
        places = f"{number(_mean(anchors.ceiling)):>9}{number(_mean(score)):>8}"
        if score and score.low is not None:
            places += f"  {number(score.low)} to {number(score.high)}"
        lines.append(f"{cut(name, 20):<20}{floors}{places}")
    lines += [wrap(f"{name}: {reason}", TABLE_WIDTH, 3) for name, reason in found.blind.items()]
    note = f"likeness by {found.features}; base and others: floors; ceiling: shots held out"
    return [*lines, wrap(note, TABLE_WIDTH, 3)]


def _pair_lines(pairs: Pairs) -> list[str]:
    """Return how often two who were asked for are both there, and which two are least."""
    lines = [f"{'two in one image':<20}{'base':>8}{'LoRA':>8}"]
    for label, shares in (("both are there", pairs.both), ("one of them", pairs.one)):
        base, final = (number(shares[model].mean) for model in ("base", "final"))
        lines.append(f"{label:<20}{base:>8}{final:>8}")
    drawn: dict[str, list[int]] = {}
    for image in pairs.images:
        if image.model == "final":
            drawn.setdefault(" and ".join(image.names), []).append(image.n_there == 2)
    worst = min(drawn, key=lambda two: sum(drawn[two]) / len(drawn[two]))
    note = f"least often both: {worst}, in {sum(drawn[worst])} of {len(drawn[worst])} images"
    return [*lines, wrap(note, TABLE_WIDTH, 3)]


def _mean(value: Interval | None) -> float | None:
    return value.mean if value else None
