"""Whether a run folder is begun, gone on with, or refused.

Going on is right only where the result is what an unbroken run would have given: so the old run and the
new one may differ in nothing that changes the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bunny_lora.config import RESUME_TAKES, Config, load_config
from bunny_lora.core import files, paths, provenance
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model.fast import choice
from bunny_lora.training import checkpoint, fingerprint, log
from bunny_lora.training.fingerprint import Fingerprint

WAY_OUT = "Set output_dir to a new folder, or resume: never to begin anew (the old run is kept)."


@dataclass(frozen=True)
class Start:
    """Where a run begins: after `step`, with the state in `folder`, or from nothing.

    `history` names each environment that the run was made in, and the step that it took over after.
    """

    step: int = 0
    folder: Path | None = None
    history: tuple[dict[str, Any], ...] = ()
    base_sha256: str | None = None
    class_sha256: str | None = None

    @property
    def fast_path(self) -> str | None:
        """What is computed on a fast path, see `choice.choose`; None before a run was opened."""
        return self.history[-1]["environment"].get("fast_path") if self.history else None

    def check_base(self, sha256: str, precision: str) -> None:
        """Raise BunnyLoraError if the base model's weights are others than the state was made with."""
        same_precision = self.history and self.history[-1]["environment"].get("precision") == precision
        if same_precision and self.base_sha256 not in (None, sha256):
            raise BunnyLoraError(
                f"{self.folder} was made with other weights of the base model than those that its name"
                f" stands for now. Bring the old ones back, or: {WAY_OUT}"
            )

    def check_class_images(self, sha256: str) -> None:
        """Raise BunnyLoraError if the class images are others than the state was made with."""
        if self.class_sha256 not in (None, sha256):  # Older runs tell of none.
            raise BunnyLoraError(
                f"{self.folder} was made with other class images than prior_preservation asks for now:"
                " pictures or captions in class_data_dir, or the sampling settings that draw them, have"
                f" changed. Set them back as they were to go on. {WAY_OUT}"
            )


def archive_old_run(run_dir: Path) -> None:
    """Rename a folder that holds a run to the first free `<name>.old-<n>`."""
    if not holds_run(run_dir):
        return
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
        number += 1
    run_dir.rename(aside)
    print(f"The run that was in {paths.relative(run_dir)} is now in {paths.relative(aside)}")


def holds_run(run_dir: Path) -> bool:
    """Whether there are weights in the folder, ours or another program's: something to lose."""
    return any(any(run_dir.glob(name)) for name in ("final", "checkpoint-*"))


def open_run(run_dir: Path, config: Config, now: Fingerprint) -> Start:
    """Make `run_dir` ready and return where to go on, or to begin.

    Args:
        run_dir: one folder is one run; nobody else writes into it.
        config: of the run that is about to start; written to `config.yaml`, and what
            the user set to `config.input.yaml`.
        now: of the run that is about to start; the hash of its data goes to `provenance.json`.

    Raises:
        BunnyLoraError: the folder holds another run, or something that is no run of ours; or the
            checkpoint that `resume` names is not there or damaged.
    """
    files.recover(run_dir)
    if holds_run(run_dir):
        _refuse_another_run(run_dir, now)
    named = None if config.resume in ("auto", "never") else _named(run_dir, str(config.resume))
    folder = named or _newest_good(run_dir, config.training.max_train_steps)
    start = _read(folder, now) if folder else _fresh(now)
    if named:
        _set_later_ones_aside(run_dir, start.step)
    _describe(run_dir, config, now)
    return start


def _refuse_another_run(run_dir: Path, now: Fingerprint) -> None:
    if not (run_dir / "config.yaml").is_file():
        raise BunnyLoraError(f"{run_dir} holds training that this program did not write. {WAY_OUT}")
    recorded = files.read_json(run_dir / "provenance.json")
    settings = fingerprint.settings_of(load_config(run_dir / "config.yaml"))
    before = Fingerprint(
        settings, recorded.get("data_sha256"), now.environment, recorded.get("base_commit")
    )
    _refuse(run_dir, before, now)


def _refuse(folder: Path, before: Fingerprint, now: Fingerprint) -> None:
    if found := fingerprint.mathematical_differences(before, now):
        lines = "\n".join(f"  - {line}" for line in found)
        raise BunnyLoraError(
            f"{folder} holds a run with other settings, and going on would mix the two:\n{lines}\n"
            f"Set them back as they were to go on. {WAY_OUT}"
        )


def _named(run_dir: Path, name: str) -> Path:
    """Return the checkpoint that the user named: a step, a folder of the run, or a path."""
    folders = [run_dir / f"checkpoint-{name}", run_dir / name, paths.resolve(name)]
    for folder in folders:
        if (folder / checkpoint.STATE).is_file():
            if damage := checkpoint.verify(folder):
                raise BunnyLoraError(f"The checkpoint {folder} is damaged: {damage}.")
            return folder
    there = ", ".join(map(str, checkpoint.list_checkpoints(run_dir))) or "none yet"
    raise BunnyLoraError(
        f"resume: {name} is no checkpoint. It {RESUME_TAKES}. Steps in"
        f" {paths.relative(run_dir)}: {there}."
    )


def _newest_good(run_dir: Path, last_step: int) -> Path | None:
    """Return the newest whole checkpoint; a damaged one is set aside, and the one before is taken."""
    for step, folder in reversed(checkpoint.list_checkpoints(run_dir).items()):
        if step > last_step:
            continue
        damage = checkpoint.verify(folder)
        if damage is None:
            return folder
        aside = checkpoint.quarantine(folder, "damaged")
        print(
            f"Warning: {folder.name} is damaged ({damage}); it is now in {paths.relative(aside)}, and"
            " the one before it is taken."
        )
    return None


def _set_later_ones_aside(run_dir: Path, step: int) -> None:
    for later, folder in checkpoint.list_checkpoints(run_dir).items():
        if later > step:
            aside = checkpoint.quarantine(folder, "later")
            print(f"{folder.name} is done again; the one from before is now {paths.relative(aside)}")


def _fresh(now: Fingerprint) -> Start:
    return Start(history=({"after_step": 0, "environment": now.environment},))


def _read(folder: Path, now: Fingerprint) -> Start:
    """Return the start that a checkpoint gives, after comparing its run with the one to come."""
    saved = files.read_json(folder / checkpoint.STATE)
    history = list(saved["history"])
    # Older runs tell of no other processes and paths.
    environment = {"processes": "1", "fast_path": choice.PLAIN} | history[-1]["environment"]
    commit = saved.get("base_commit")
    # A key that is younger than the checkpoint had its default, which keeps what was done before it.
    settings = fingerprint.settings_of(Config()) | saved["settings"]
    before = Fingerprint(settings, saved["data_sha256"], environment, commit)
    _refuse(folder, before, now)
    if found := fingerprint.environment_differences(before, now):
        lines = "\n".join(f"  - {line}" for line in found)
        print(
            "Warning: the run goes on in another environment than it was made in, so its numbers can"
            f" differ in their last bits from those of an unbroken run:\n{lines}"
        )
        history.append({"after_step": saved["step"], "environment": now.environment})
    return Start(
        saved["step"], folder, tuple(history), saved.get("base_sha256"), saved.get("class_sha256")
    )


def announce(run_dir: Path, start: Start) -> None:
    """Cut the log to the state it goes on with, and say what that is and what was lost."""
    source = start.folder.parent if start.folder else None
    n_lost, seconds = log.cut_after(run_dir, start.step, source)
    if start.folder is None and not n_lost:
        return
    place = (
        f"Going on after step {start.step} from {paths.relative(start.folder)}"
        if start.folder
        else ("Beginning again at step 1, for there was no checkpoint yet")
    )
    steps = "1 step" if n_lost == 1 else f"{n_lost} steps"
    lost = f"{steps} after it ({seconds:.0f} s of work) done again" if n_lost else "nothing was lost"
    print(f"{place}; {lost}")


def _describe(run_dir: Path, config: Config, now: Fingerprint) -> None:
    recorded = {"data_sha256": now.data_sha256, "base_commit": now.base_commit}
    files.write_json(run_dir / "provenance.json", provenance.provenance() | recorded)
    files.write_text(run_dir / "config.input.yaml", config.user_yaml())
    files.write_text(run_dir / "config.yaml", config.to_yaml())  # Last: it makes the folder a run.
