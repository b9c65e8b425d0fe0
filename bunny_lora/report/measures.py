"""All that an evaluation measured of a run, in one order, for the pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bunny_lora.core.eval_result import EvalResult, Interval
from bunny_lora.report.scores import DRIFTS, MEASURES, number
from bunny_lora.report.web import ends_of

BY_TRAITS = "by traits"


@dataclass(frozen=True)
class Measure:
    """One measure of one run.

    Attributes:
        name: unique among those of a run, and the same for what compares between runs.
        about: its scale, and which way is better.
        base: of the base model; None where it has none.
        final: of the LoRA.
        change: of the LoRA over the base model, paired by prompt and seed; None where nobody told it.
    """

    name: str
    about: str
    base: Interval | None
    final: Interval
    change: Interval | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of a scale for both, 0 and 1 on it."""
        return ends_of([self.base, self.final], (0.0, 1.0))


def measures(result: EvalResult) -> list[Measure]:
    """Return all measures of a run, the two axes first: those by traits where these were read."""
    return [*_by_traits(result), *_axes(result), *_drifts(result), *_plain(result)]


def axis(found: list[Measure], word: str) -> Measure | None:
    """Return the first measure of an axis, "identity" or "as asked"; None where nothing tells it."""
    return next((measure for measure in found if measure.name.startswith(word)), None)


def columns(every: Sequence[Sequence[Measure]], word: str) -> dict[str, list[Measure | None]]:
    """Return an axis of several runs, a value a run: what different judges tell stands apart.

    By name: the first measure of that axis that all have who have any; else the first of each.
    """
    known = [{m.name: m for m in of_run if m.name.startswith(word)} for of_run in every]
    told = [names for names in known if names]
    shared = [name for name in (told[0] if told else {}) if all(name in names for names in told)]
    names = shared[:1] or list(dict.fromkeys(next(iter(names)) for names in told))
    return {name: [of_run.get(name) for of_run in known] for name in names}


def _by_traits(result: EvalResult) -> Iterator[Measure]:
    if (found := result.traits) is None:
        return
    base, final = found.identity["base"]["all"], found.identity["final"]["all"]
    yield Measure(
        f"identity {BY_TRAITS}", "0: the base model, 1: renders of the character", base, final
    )
    rows = (
        ("as asked", found.asked, "share of place, light and pose as asked; higher is better"),
        ("another one mixed in", found.another, "share of pictures; lower is better"),
        ("heroes on nobody", found.nobody, "share of pictures of nobody; lower is better"),
    )
    for name, values, about in rows:
        if "final" in values:
            ceiling = values.get("ceiling")
            beside = f"; renders {number(ceiling.mean)}" if ceiling else ""
            yield Measure(f"{name} {BY_TRAITS}", about + beside, values["base"], values["final"])


def _axes(result: EvalResult) -> Iterator[Measure]:
    if (placed := result.identity) and placed.change:
        base, final = (placed.models[name]["all"] for name in ("base", "final"))
        about = "0: floor, 1: the character itself in shots held out"
        yield Measure(f"identity by {placed.features}", about, base, final, placed.change)
    if found := result.following:
        about = f"cosine to the prompt; other prompts {number(found.reference)}"
        name = f"as asked by {found.features}"
        yield Measure(name, about, found.models["base"], found.models["final"], found.change)
    if found := result.colour:
        about = f"cosine of palettes, sees colours only; the film {number(found.reference)}"
        yield Measure("colour", about, found.models["base"], found.models["final"], found.change)


def _drifts(result: EvalResult) -> Iterator[Measure]:
    for kind, score in result.drifts.items():
        if score.ratio:
            about = "what training changed; 0: nothing, 1: as much as another seed"
            yield Measure(f"drift, {DRIFTS.get(kind, kind)}", about, None, score.ratio)
    if result.copies:
        about = "share nearer to what training saw than held-out frames are, which have 0.05"
        above = result.copies.above
        yield Measure("copies of what it saw", about, above["base"], above["final"])


def _plain(result: EvalResult) -> Iterator[Measure]:
    base, final, change = (
        table.all for table in (result.models["base"], result.models["final"], result.differences)
    )
    for name, (title, meaning, direction) in MEASURES.items():
        if (value := getattr(final, name)) is not None:
            about = f"{meaning}; {direction}"
            full = f"{title.lower()} by {result.settings.features}"
            yield Measure(full, about, getattr(base, name), value, getattr(change, name))
