"""The two axes of a run, identity and what was asked for, always together; and colour, as a third."""

from __future__ import annotations

from bunny_lora.core.eval_result import EvalResult, IdentityScores, Interval
from bunny_lora.report.plot import cut, wrap
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
        means = (identity.models[name]["all"] for name in ("base", "final"))
        lines.append(_row("identity", *means, identity.change, "0: floor, 1: ceiling"))
    if following:
        means = (following.models[name] for name in ("base", "final"))
        against = f"other prompts: {number(following.reference)}"
        lines.append(_row("as asked", *means, following.change, against))
    if colour:
        means = (colour.models[name] for name in ("base", "final"))
        lines.append(_row("colour", *means, colour.change, f"the film: {number(colour.reference)}"))
    if identity:
        lines += ["", *_anchor_lines(identity)]
    asked = following.features if following else "evaluation.prompt_features names nothing"
    lines += ["", wrap(f"as asked: {asked}; colour: palette, sees colours only", TABLE_WIDTH, 3)]
    return "\n".join(line.rstrip() for line in lines)


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


def _mean(value: Interval | None) -> float | None:
    return value.mean if value else None
