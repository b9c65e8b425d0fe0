"""Experiment trackers that people use already, through Accelerate's own interface to them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState, tracking
from PIL import Image

from bunny_lora.config import Config
from bunny_lora.core import files, paths
from bunny_lora.errors import BunnyLoraError
from bunny_lora.training.fingerprint import flat

if TYPE_CHECKING:
    from bunny_lora.training.loop import StepRecord

PROJECT = "bunny_lora"
IDENTITY = "trackers.json"


def check(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not there.

    Raises:
        BunnyLoraError: says which, and what to install.
    """
    known = [str(name) for name in tracking.get_available_trackers()]
    if missing := [name for name in names if name not in known]:
        raise BunnyLoraError(
            f"training.trackers: {', '.join(missing)} cannot be imported here. Run pip install"
            f" {' '.join(missing)}, or take the name out of training.trackers."
        )


class Trackers:
    """Those that `training.trackers` names, told of every step; none in processes that write nothing.

    One that fails is said so once and told nothing more: a run of days does not end with its network.

    Args:
        config: of the run.
        step: the last step that is done.
    """

    def __init__(self, config: Config, step: int, *, writes: bool = True) -> None:
        names = config.training.trackers if writes else []
        if names:  # Accelerate's trackers ask it who is the main process.
            PartialState(cpu=config.device == "cpu")
        self.open: dict[str, Any] = {}
        for name in names:
            self._guarded(name, partial(self._start, name, config, step))

    def _start(self, name: str, config: Config, step: int) -> None:
        kind = tracking.LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(**_arguments(name, config.run_dir, step, _identity(config.run_dir, step)))
        tracker.start()
        tracker.store_init_configuration(_settings(config))
        self.open[name] = tracker

    def log_step(self, record: StepRecord) -> None:
        """Tell of a step."""
        if not self.open:
            return
        values = {
            "train/loss": record.loss,
            "train/learning_rate": record.learning_rate,
            "train/grad_norm": record.grad_norm,
            "time/seconds_an_image": record.seconds / record.n_images,
            "time/peak_memory_gb": record.peak_memory_gb,
        }
        self._tell(lambda tracker: tracker.log(values, step=record.step))

    def log_validation(self, step: int, record: dict[str, Any]) -> None:
        """Tell of the loss on held-out frames after a step."""
        values = {"validation/loss": record["loss"]}
        values |= {f"validation/{name}": loss for name, loss in record["characters"].items()}
        self._tell(lambda tracker: tracker.log(values, step=step))

    def log_samples(self, step: int, images: Sequence[Path]) -> None:
        """Show pictures that belong to a step."""
        if images and self.open:
            self._tell(lambda tracker: _show(tracker, step, images))

    def close(self) -> None:
        """End them all."""
        self._tell(lambda tracker: tracker.finish())

    def _tell(self, what: Callable[[Any], None]) -> None:
        for name, tracker in list(self.open.items()):
            self._guarded(name, partial(what, tracker))

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # Whatever another program's server does.
            self.open.pop(name, None)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            print(f"Warning: {name} fails and is told no more of this run: {reason}")


def _identity(run_dir: Path, step: int) -> str:
    """Return what a run is known by among those whose folders are called alike: kept as it goes on."""
    path = run_dir / IDENTITY
    if step and files.is_file(path):
        return str(files.read_json(path)["id"])
    identity = uuid.uuid4().hex[:8]
    files.write_json(path, {"id": identity})
    return identity


def _arguments(name: str, run_dir: Path, step: int, identity: str) -> dict[str, Any]:
    """Return what names the run to a tracker: each time the same, so that one that goes on does so."""
    run_name = paths.relative(run_dir).replace("/", "-")
    match name:
        case "tensorboard":  # Steps that are done again replace those from before.
            return {"run_name": "tensorboard", "logging_dir": str(run_dir), "purge_step": step + 1}
        case "wandb":
            about = {"name": run_name, "id": identity, "resume": "allow", "dir": str(run_dir)}
            return {"run_name": PROJECT} | about
        case "mlflow":
            return {"experiment_name": PROJECT, "run_name": run_name}
        case _:
            return {"run_name": PROJECT, "name": f"{run_name}-{identity}", "resume": "allow"}


def _settings(config: Config) -> dict[str, Any]:
    """Return every setting by its dotted key, as plain values."""
    settings = flat(config.model_dump(mode="json"))
    plain = (bool, int, float, str)
    return {key: value if isinstance(value, plain) else str(value) for key, value in settings.items()}


def _show(tracker: Any, step: int, paths: Sequence[Path]) -> None:
    images = [Image.open(path).convert("RGB") for path in paths]
    match tracker.name:
        case "tensorboard":
            for path, image in zip(paths, images, strict=True):
                tracker.log_images(
                    {f"samples/{path.stem}": np.asarray(image)[None]}, step=step, dataformats="NHWC"
                )
        case "mlflow":
            for path in paths:
                tracker.log_artifact(str(path), f"samples/{path.parent.name}")
        case "trackio":
            import trackio

            found = {path.stem: trackio.Image(image) for path, image in zip(paths, images, strict=True)}
            tracker.log({f"samples/{name}": image for name, image in found.items()}, step=step)
        case _:
            tracker.log_images({"samples": images}, step=step)
