"""A run as one page that can be sent to a colleague: all that its files say, and what they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bunny_lora
from bunny_lora.config import Config, by_key
from bunny_lora.core import files, paths
from bunny_lora.core.eval_result import EvalResult
from bunny_lora.report import page_parts, page_pictures
from bunny_lora.report.axes import verdict
from bunny_lora.report.measures import Measure, axis, measures
from bunny_lora.report.runs import Run
from bunny_lora.report.scores import number
from bunny_lora.report.web import spread_of, write_page
from bunny_lora.training.checkpoint import list_checkpoints, recorded_environment
from bunny_lora.training.handover import HANDOVER, read_handover
from bunny_lora.training.log import LOG, read_lines

REPORT = "report.html"
NOT_EVALUATED = "Nothing was evaluated yet: `bunny-lora evaluate` draws and measures."
NOT_CHOSEN = "Nothing was chosen: `bunny-lora choose` draws with several checkpoints and scales."


def write_report(run_dir: str | Path, out: Path | None = None) -> Path:
    """Write a run as one self-contained page and return its path.

    Args:
        run_dir: the run's folder.
        out: the file; None is `report.html` in the run's folder.

    Raises:
        BunnyLoraError: the folder is no run, or the page cannot be written.
    """
    run = Run.read(paths.resolve(run_dir))
    folders = [run.folder, *([run.config.data_path] if run.config else [])]
    return write_page(out or run.folder / REPORT, "run.html", folders, **content(run))


def content(run: Run) -> dict[str, Any]:
    """Return all that the page shows."""
    config, result = run.config, run.result
    said = run.said
    judgement = page_pictures.judgement(run) if result else None
    trained_on = (_trained_by(run) or {}).get("data_sha256")
    data = run.attempt("data", lambda: page_parts.data(config, trained_on)) if config else None
    training = run.attempt("training", lambda: page_parts.training(run.folder))
    name = paths.relative(run.folder)
    return {
        "title": f"{name}: report",
        "name": name,
        "version": bunny_lora.__version__,
        "headline": _headline(result),
        "warnings": warnings(run),
        "facts": _facts(run),
        "judgement": judgement,
        "judgement_missing": said.get("evaluation", NOT_EVALUATED),
        "choice": page_parts.choice(run.choice) if run.choice else None,
        "choice_missing": said.get("choice", NOT_CHOSEN),
        "data": data,
        "data_missing": said.get("data") or _no_settings(run),
        "training": training,
        "training_missing": said.get("training", ""),
        "settings": _settings(config) if config else None,
        "settings_missing": _no_settings(run),
        "provenance": _provenance(run),
    }


def _no_settings(run: Run) -> str:
    return run.said.get("config", "")


def _headline(result: EvalResult | None) -> str:
    if result is None:
        return "Not evaluated yet."
    found = measures(result)
    identity, asked = axis(found, "identity"), axis(found, "as asked")
    if result.traits and identity and asked:
        return f"{_told(identity)}; {_told(asked)}.".replace("identity", "Identity", 1)
    return f"{verdict(result)}."


def _told(measure: Measure) -> str:
    before = f"base model {number(measure.base.mean)}" if measure.base else ""
    ends = f"; 95 % interval {spread_of(measure.final)}" if spread_of(measure.final) else ""
    return f"{measure.name}: {number(measure.final.mean)} ({before}{ends})"


def warnings(run: Run) -> list[str]:
    """Return what is unfinished, stale, damaged or means little, a sentence each."""
    lines = [text for what, text in run.said.items() if what in ("evaluation", "choice", "config")]
    lines += _about_training(run)
    if (result := run.result) is None:
        return lines
    if result.warning:
        lines.append(f"This run has {result.warning}.")
    drawn, now = result.run_info.final.get("weights_sha256"), run.digest("final")
    if now and drawn and now != drawn:
        lines.append(
            "The evaluation is stale: its pictures and numbers are of other weights than final/ holds"
            " now. Run `bunny-lora evaluate` again."
        )
    if (chosen := run.choice) and run.digest(chosen.best.model) != chosen.weights_sha256:
        lines.append(
            f"The choice is stale: {chosen.best.model} is not what was chosen any more. Run `bunny-lora"
            " choose` again."
        )
    if result.settings.features == "palette":
        lines.append("Fidelity and what is beside it rest on palettes, which see colours only.")
    return lines


def _about_training(run: Run) -> list[str]:
    if run.config is None:
        return []
    steps = [record["step"] for record in read_lines(run.folder / LOG) if "step" in record]
    last, planned = max(steps, default=0), run.config.training.max_train_steps
    if not last:
        return ["There is no log of the training: it has not begun, or the log did not come along."]
    if last < planned:
        return [f"Training has come to step {last} of {planned}: this run is not finished."]
    return []


def _facts(run: Run) -> list[dict[str, str]]:
    """Return the few numbers at the top."""
    facts = []
    if run.result:
        found = measures(run.result)
        for word in ("identity", "as asked", "drift", "copies"):
            if measure := axis(found, word):
                base = f"base {number(measure.base.mean)}; " if measure.base else ""
                facts.append(_fact(measure.name, number(measure.final.mean), base + measure.about))
        names = ", ".join(run.result.settings.characters[:6])
        facts.append(_fact("characters", str(len(run.result.settings.characters)), names))
    if run.config:
        lora, training = run.config.lora, run.config.training
        facts.append(_fact("LoRA", f"rank {lora.rank}", f"alpha {lora.alpha:g}"))
        images = training.batch_size * training.gradient_accumulation_steps
        facts.append(_fact("steps", str(training.max_train_steps), f"{images} images each"))
        facts.append(_fact("base model", run.config.base_model, f"{run.config.resolution} px"))
    return facts


def _fact(name: str, value: str, about: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "about": about}


def _settings(config: Config) -> dict[str, Any]:
    values, defaults = by_key(config), by_key(Config())
    changed = {key: str(value) for key, value in values.items() if value != defaults[key]}
    return {"changed": changed, "yaml": config.to_yaml()}


def _provenance(run: Run) -> dict[str, str]:
    """Return what made the run and its evaluation, flat, without what nobody recorded."""
    facts: dict[str, Any] = _flat("trained by", _trained_by(run) or {})
    newest = list(list_checkpoints(run.folder).values())[-1:]
    facts |= _flat("environment", recorded_environment(newest[0]) if newest else {})
    if run.result:
        facts |= _flat("evaluated by", run.result.run_info.evaluated_by)
        facts |= _flat("drawn with", run.result.run_info.final)
    if files.is_file(run.folder / HANDOVER):
        handed = run.attempt("handover", lambda: read_handover(run.folder))
        if handed:
            facts["handed on"] = f"{handed.weights}, {handed.recommended.settings()}"
    return {name: str(fact) for name, fact in facts.items() if fact is not None}


def _trained_by(run: Run) -> dict[str, Any] | None:
    record = run.folder / "provenance.json"
    if not files.is_file(record):
        return None
    found = run.attempt("provenance", lambda: files.read_json(record))
    return found if isinstance(found, dict) else None


def _flat(name: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        return {name: found}
    flat: dict[str, Any] = {}
    for key, value in found.items():
        flat |= _flat(f"{name}: {str(key).replace('_', ' ')}", value)
    return flat
