"""Runs beside each other: found, read, and compared on the pictures that they share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bunny_lora import report
from bunny_lora.core import paths
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation.pairs import differences
from bunny_lora.report.comparison import Comparison, short_names
from bunny_lora.report.measures import columns, measures
from bunny_lora.report.runs import Run

PAGE = "compare.html"


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """Return the folders of runs: those named, and for a folder of runs those in it, but old ones.

    Raises:
        BunnyLoraError: there is no such folder, or no run in one of them.
    """
    found: list[Path] = []
    for name in folders:
        folder = paths.typed(name)
        inside = [folder] if _is_run(folder) else _runs_in(folder)
        if not inside:
            raise BunnyLoraError(
                f"{folder} is no run, and there is none in it: name folders with a config.yaml, such as"
                " outputs/lora_weights, or the folder of a sweep."
            )
        found += inside
    return list(dict.fromkeys(found))


def _runs_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if _is_run(path) and ".old-" not in path.name)


def _is_run(folder: Path) -> bool:
    made = any((folder / name).exists() for name in ("provenance.json", "log.jsonl", "final"))
    return made and (folder / "config.yaml").is_file()


def compare(folders: Sequence[str | Path], *, is_sorted: bool = False) -> Comparison:
    """Return runs, with what each scores more than the first on the same pictures.

    Args:
        folders: as `find_runs` takes them.
        is_sorted: the best first, see `best_first`.

    Raises:
        BunnyLoraError: one of them is no run.
    """
    runs = [Run.read(folder) for folder in find_runs(folders)]
    order = "in the order in which they were named"
    if is_sorted:
        runs, order = best_first(runs)
    first, *others = (run.result for run in runs)
    changes = [differences(first, other) if first and other else {} for other in others]
    return Comparison(runs, short_names([run.folder for run in runs]), changes, order)


def best_first(runs: list[Run]) -> tuple[list[Run], str]:
    """Return runs in order, and that order in words.

    By identity where all that were evaluated tell it by the same judge, else by fidelity, which sees
    whole pictures; those that were not evaluated come last.
    """
    found = {run.folder: measures(run.result) for run in runs if run.result}
    for word in ("identity", "fidelity"):
        told = columns(list(found.values()), word)
        if len(told) == 1 and None not in (values := next(iter(told.values()))):
            name = next(iter(told))
            known = {f: value.final.mean for f, value in zip(found, values, strict=True) if value}
            best = sorted(known, key=lambda folder: -known[folder])
            rank = {folder: place for place, folder in enumerate(best)}
            runs = sorted(runs, key=lambda run: rank.get(run.folder, len(runs)))
            return runs, f"best first by {name}; the other axis beside it"
    return runs, "in no order: no measure is told of all of them by the same judge"


def write_comparison(
    folders: Sequence[str | Path], out: Path | None = None, *, title: str = "Runs compared"
) -> Path:
    """Write runs side by side, the best first, as one page; None is beside the runs.

    Raises:
        BunnyLoraError: one of them is no run, or the page cannot be written.
    """
    found = compare(folders, is_sorted=True)
    beside = Path(found.runs[0].folder).parent / PAGE
    return report.write_comparison_page(found, out or beside, title)
