"""Runs over a grid of settings, one after another or as jobs of a SLURM cluster, and a leaderboard.

    config: params/demo.yaml
    output_dir: outputs/sweeps/rank
    grid:
      lora.rank: [4, 8, 16]
      training.learning_rate: [1.0e-3, 2.0e-3]

Every run is an ordinary run folder below `output_dir`, trained and evaluated; the same command goes on
where it stopped. Points that prepare their data differently have data of their own, in `data/`.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from bunny_lora import compare, prepare
from bunny_lora.config import Config, load_config, set_key
from bunny_lora.core import eval_result, files, paths
from bunny_lora.core.sections import Section
from bunny_lora.core.values import OwnFolder
from bunny_lora.core.yaml_file import parse_yaml
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import evaluate
from bunny_lora.report.measures import axis, measures
from bunny_lora.report.runs import Run as ReadRun
from bunny_lora.trainer import LoRATrainer

LEADERBOARD, LEADERBOARD_PAGE = "leaderboard.csv", "leaderboard.html"
# Columns, and the measures that they hold.
AXES = {
    "identity": "identity",
    "as_asked": "as asked",
    "drift": "drift",
    "fidelity": "fidelity",
    "consistency": "consistency",
    "separation": "separation",
    "memorisation": "copying",
}


class _File(Section):
    config: str | None = None
    output_dir: OwnFolder
    grid: dict[str, list[Any]] = Field(min_length=1)


@dataclass(frozen=True)
class Run:
    """One point of the grid: the settings that make it, by dotted key, and the whole configuration."""

    settings: dict[str, Any]
    config: Config

    @property
    def folder(self) -> Path:
        """Where it is trained and evaluated."""
        return self.config.run_dir

    @property
    def done(self) -> bool:
        """Whether it was trained and evaluated with exactly this configuration."""
        result = eval_result.find(self.folder)
        return result is not None and result.run_info.config == self.config.model_dump(mode="json")


def read_sweep(path: Path) -> tuple[Path, list[Run]]:
    """Return the sweep's folder and its runs, all checked before the first one starts.

    Raises:
        BunnyLoraError: no such file, something else in it, or a combination that is no configuration.
    """
    try:
        sweep = _File.model_validate(parse_yaml(files.decoded(path.read_bytes())))
    except (OSError, ValueError) as error:  # pydantic's errors are ValueErrors
        reason = "; ".join(_reasons(error)) if isinstance(error, ValidationError) else error
        raise BunnyLoraError(
            f"{path} is no sweep: {reason}. It takes config, output_dir and grid, as in"
            " params/sweeps/rank.yaml."
        ) from None
    if empty := [key for key, values in sweep.grid.items() if not values]:
        raise BunnyLoraError(f"{path}: grid.{empty[0]} has no values to try.")
    found: dict[str, Run] = {}
    for values in itertools.product(*sweep.grid.values()):
        settings = dict(zip(sweep.grid, values, strict=True))
        name = _name(settings)
        overrides: dict[str, Any] = {"output_dir": f"{sweep.output_dir}/{name}"}
        if data := {key: value for key, value in settings.items() if key in prepare.SETTINGS}:
            overrides["data_dir"] = f"{sweep.output_dir}/data/{_name(data)}/instance_images"
        for key, value in settings.items():
            set_key(overrides, key, value)
        base = paths.resolve(sweep.config) if sweep.config else None
        if name in found:
            raise BunnyLoraError(f"{path}: the grid names {name} twice.")
        found[name] = Run(settings, load_config(base, overrides))
    return paths.resolve(sweep.output_dir), list(found.values())


def _reasons(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]


def _name(settings: Mapping[str, Any]) -> str:
    parts = (f"{key.rpartition('.')[2]}-{value}" for key, value in settings.items())
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "_".join(parts))


def work(config: Config) -> None:
    """Train and evaluate one run, or go on with it."""
    run_dir = config.run_dir
    LoRATrainer(config=config).train()
    evaluate(run_dir, config=config)


def sweep_here(todo: list[Run], report: Callable[[str], None] = print) -> list[str]:
    """Do the runs one after another; a setting that cannot be trained is told and left behind.

    Returns:
        One line for every run that failed.
    """
    failures = []
    for number, run in enumerate(todo, start=1):
        report(f"--- run {number} of {len(todo)}: {_told_settings(run)}")
        try:
            work(run.config)
        except BunnyLoraError as error:
            failures.append(f"{_told_settings(run)}: {error}")
    return failures


def sweep_on_cluster(
    todo: list[Run], folder: Path, options: Mapping[str, Any], cluster: str = "slurm"
) -> list[str]:
    """Do the runs as jobs of a cluster, and wait for all of them.

    Args:
        todo: what is left to do; the training data are prepared here first, since runs share them.
        folder: on a disk that every machine of the cluster sees; logs of the jobs go to `jobs/` in it.
        options: what submitit's `AutoExecutor.update_parameters` takes: `timeout_min`, `cpus_per_task`,
            `slurm_partition`, ….
        cluster: "slurm", or "local" for processes on this machine.

    Returns:
        One line for every run that failed.

    Raises:
        BunnyLoraError: submitit is not installed, there is no SLURM here, it takes no jobs, or it does
            not know an option.
    """
    try:
        import submitit
    except ImportError:
        raise BunnyLoraError(
            "Jobs on a SLURM cluster need the submitit package: `pip install submitit`."
        ) from None
    for config in {run.config.data_dir: run.config for run in todo}.values():
        prepare.prepare_data(config)
    try:
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=cluster)
        executor.update_parameters(name="bunny_lora", **options)
    except (NameError, RuntimeError, TypeError, ValueError) as error:
        raise BunnyLoraError(f"The cluster cannot be used: {error}") from error
    try:
        with executor.batch():
            jobs = [executor.submit(work, run.config) for run in todo]
    except submitit.core.utils.FailedJobError as error:
        raise BunnyLoraError(f"The cluster took no jobs: {str(error).strip()}") from error
    failures = []
    for run, job in zip(todo, jobs, strict=True):
        if (failure := job.exception()) is not None:
            last_line = str(failure).strip().splitlines()[-1]
            failures.append(f"{_told_settings(run)}: {last_line} ({job.paths.stderr})")
    return failures


def _told_settings(run: Run) -> str:
    return ", ".join(f"{key}={value}" for key, value in run.settings.items())


def leaderboard(folder: Path, sweep: list[Run]) -> tuple[list[dict[str, Any]], str]:
    """Write a row for every run that is done as CSV; return them, and in words their order.

    The two axes come first, empty where nothing tells them. Each is the mean over characters and
    pictures, with its 95 % interval; the same prompts and seeds for every run.
    """
    done = {run.folder: run for run in sweep if run.done}
    rows = []
    ranked, order = compare.best_first([ReadRun.read(path) for path in done])
    for found in ranked:
        assert found.result is not None
        told = measures(found.result)
        values = {column: axis(told, word) for column, word in AXES.items()}
        row: dict[str, Any] = dict(done[found.folder].settings)
        row |= {"identity_by": values["identity"] and values["identity"].name}
        for name, value in values.items():
            for column, end in ((name, "mean"), (f"{name}_low", "low"), (f"{name}_high", "high")):
                row[column] = value and getattr(value.final, end)
        rows.append(row | {"run": paths.relative(found.folder)})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / LEADERBOARD, text.getvalue())
    return rows, order


def leaderboard_page(folder: Path, sweep: list[Run]) -> Path | None:
    """Write the leaderboard as a page, with settings and pictures side by side; None of no run."""
    done = [run.folder for run in sweep if run.done]
    if not done:
        return None
    title = f"Leaderboard of {paths.relative(folder)}"
    return compare.write_comparison(done, folder / LEADERBOARD_PAGE, title=title)


def leaderboard_text(rows: list[dict[str, Any]], order: str) -> str:
    """Return `leaderboard` for a terminal: the settings, and mean and interval of each measure."""
    if not rows:
        return "No run is done yet."
    shown = [name for name in AXES if any(row[name] is not None for row in rows)]
    keys = [
        key for key in rows[0] if key not in ("run", "identity_by") and not key.startswith(tuple(AXES))
    ]
    table = [[*keys, *shown]]
    for row in rows:
        cells = [str(row[key]) for key in keys]
        for name in shown:
            mean, *interval = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
            cells.append("-" if mean is None else f"{mean:.3f}")
            if None not in interval:
                cells[-1] += " ({:.3f} to {:.3f})".format(*interval)
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    return "\n".join([f"{len(rows)} runs, {order}", *lines])
