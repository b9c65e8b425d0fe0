"""Whether a run folder is begun, gone on with, or refused.

Going on is right only where the result is what an unbroken run would have given: so the old and the
new configuration may differ in nothing that changes the mathematics.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bunny_lora import runs
from bunny_lora.checkpoint import list_checkpoints
from bunny_lora.config import Config, load_config
from bunny_lora.errors import BunnyLoraError

# The data's identity is its hash, not its path; the rest changes when things are written, not what.
HARMLESS = {
    "output_dir", "data_dir", "source", "min_confidence", "resume", "num_workers", "pin_memory",
    "sampling", "evaluation", "training.save_steps", "training.logging_steps",
    "training.validation_prompt", "training.num_validation_images", "training.gradient_checkpointing",
    "prior_preservation.class_data_dir",
}  # fmt: skip


def open_run(run_dir: Path, config: Config, data_sha256: str) -> Path | None:
    """Make `run_dir` ready and return the checkpoint to go on from, or None to begin.

    Args:
        run_dir: one folder is one run.
        config: of the run that is about to start; written to `config.yaml`, and what
            the user set to `config.input.yaml`.
        data_sha256: of images and captions, recorded in `provenance.json`.

    Raises:
        BunnyLoraError: the folder holds another run, or something that is no run of ours.
    """
    checkpoints = list_checkpoints(run_dir)
    if holds_run(run_dir):
        if config.resume == "never":
            set_aside(run_dir)
            checkpoints = {}
        else:
            _refuse_differences(run_dir, config, data_sha256)
    _describe(run_dir, config, data_sha256)
    reachable = [step for step in checkpoints if step <= config.training.max_train_steps]
    return checkpoints[max(reachable)] if reachable else None


def holds_run(run_dir: Path) -> bool:
    """Whether there are weights in the folder, ours or another program's: something to lose."""
    return any(any(run_dir.glob(name)) for name in ("final", "checkpoint-*"))


def set_aside(run_dir: Path) -> Path:
    """Rename a run folder to the first free `<name>.old-<n>` and return that."""
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
        number += 1
    run_dir.rename(aside)
    print(f"The run that was in {runs.relative(run_dir)} is now in {runs.relative(aside)}")
    return aside


def differences(old: Config, new: Config) -> list[str]:
    """Return one line for each setting that differs and changes the mathematics."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    ignored = set(HARMLESS)
    if new.training.lr_scheduler.startswith("constant"):
        ignored.add("training.max_train_steps")
    return [
        f"{key}: {before.get(key)} before, {after.get(key)} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not {key, key.split(".")[0]} & ignored
    ]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _refuse_differences(run_dir: Path, config: Config, data_sha256: str) -> None:
    way_out = "Set output_dir to a new folder, or resume: never to begin anew (the old run is kept)."
    if not (run_dir / "config.yaml").is_file():
        raise BunnyLoraError(f"{run_dir} holds training that this program did not write. {way_out}")
    found = differences(load_config(run_dir / "config.yaml"), config)
    old_data = runs.read_json(run_dir / "provenance.json").get("data_sha256")
    if old_data != data_sha256:
        found.append("the training data: other images or captions now")
    if found:
        lines = "\n".join(f"  - {line}" for line in found)
        raise BunnyLoraError(
            f"{run_dir} holds a run with other settings, and going on would mix the two:\n{lines}\n"
            f"{way_out}"
        )


def _describe(run_dir: Path, config: Config, data_sha256: str) -> None:
    runs.write_text(run_dir / "config.yaml", config.to_yaml())
    runs.write_text(run_dir / "config.input.yaml", config.given_yaml())
    runs.write_json(run_dir / "provenance.json", runs.provenance() | {"data_sha256": data_sha256})


def keep_log_until(log: Path, step: int) -> None:
    """Drop the lines of steps after `step`: they were lost with the state, and are done again."""
    if log.is_file():
        lines = log.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        runs.write_text(log, "".join(line + "\n" for line in kept))
