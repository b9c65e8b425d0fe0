"""What makes a run that run, and what can only make its last bits differ.

Going on is right where the result is what an unbroken run would have given. So two runs are the same
where their mathematics agree: settings and data. With another thread count, library or processor the
same sums are added up in another order, which is told, not refused.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bunny_lora.config import Config
from bunny_lora.core import provenance
from bunny_lora.core.values import split_revision
from bunny_lora.model import components, devices
from bunny_lora.model.fast import choice
from bunny_lora.training import checkpoint
from bunny_lora.training.optim import unused_keys

# Data and class images are told by their hash, not by their path; the rest changes when things are
# written, not what.
HARMLESS = {
    "output_dir", "data_dir", "source", "min_confidence", "allow_outside_paths", "resume",
    "num_workers", "pin_memory",
    "sampling", "evaluation", "training.save_steps", "training.save_minutes",
    "training.keep_checkpoints", "training.logging_steps", "training.validation_prompt",
    "training.num_validation_images", "training.trackers", "training.low_memory",
    "prior_preservation.class_data_dir",
}  # fmt: skip

# Told by what they come to on this machine, in the environment below.
IN_ENVIRONMENT = {
    "device", "training.mixed_precision", "training.gradient_checkpointing", "training.fast_path",
}  # fmt: skip


@dataclass(frozen=True)
class Fingerprint:
    """Recorded in every checkpoint. Plain values, as JSON gives them back."""

    settings: dict[str, Any]
    data_sha256: str
    environment: dict[str, str]
    base_commit: str | None = None  # `components.base_identity`; older runs tell of none.

    @classmethod
    def of(
        cls, config: Config, data_sha256: str, n_processes: int = 1, base_commit: str | None = None
    ) -> Fingerprint:
        """Return the identity of a run that is about to start here, in so many processes."""
        environment = environment_of(config) | {"processes": str(n_processes)}
        return cls(settings_of(config), data_sha256, environment, base_commit)

    def as_dict(self) -> dict[str, Any]:
        """Return settings and data as JSON takes them, with one hash over the settings."""
        digest = hashlib.sha256(repr(sorted(self.settings.items())).encode()).hexdigest()
        settings = {"settings": self.settings, "settings_sha256": digest}
        return settings | {"data_sha256": self.data_sha256, "base_commit": self.base_commit}


def settings_of(config: Config) -> dict[str, Any]:
    """Return every setting that changes the mathematics, by its dotted key."""
    ignored = HARMLESS | IN_ENVIRONMENT
    if config.training.lr_scheduler.startswith("constant"):
        ignored = ignored | {"training.max_train_steps"}
    if not config.naming.share:
        ignored = ignored | {"looks"}  # Then they are the evaluation's alone.
    settings = flat(config.model_dump(mode="json"))
    settings["base_model"], _ = split_revision(config.base_model)  # Its commit tells more.
    return {key: v for key, v in settings.items() if not {key, key.split(".")[0]} & ignored}


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def environment_of(config: Config) -> dict[str, str]:
    """Return what the last bits of a result hang on, beside its mathematics."""
    device, dtype = _place(config)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    made_by = provenance.provenance()
    return {
        "threads": str(torch.get_num_threads()),
        "device": f"{device.type}, {where}",
        "precision": str(dtype).removeprefix("torch."),
        "gradient_checkpointing": str(config.training.gradient_checkpointing).lower(),
        "fast_path": fast_path_of(config),
        "python": made_by["python"],
        "platform": made_by["platform"],
        "bunny_lora": made_by["bunny_lora"],
        **made_by["libraries"],
    }


def fast_path_of(config: Config) -> str:
    """Return what is computed on a fast path: what `auto` chose at a run's beginning holds to its end.

    Raises:
        BunnyLoraError: training.fast_path: on, where there is none.
    """
    setting = config.training.fast_path
    if setting == "off":
        return choice.PLAIN
    if setting == "auto" and (begun := list(checkpoint.list_checkpoints(config.run_dir).values())):
        recorded = checkpoint.recorded_environment(begun[-1]).get("fast_path", choice.PLAIN)
        if recorded == choice.PLAIN or choice.why_not(*_place(config)) is None:
            return recorded
    return choice.choose(*about_fast_path(config))


def about_fast_path(config: Config) -> tuple[str, Path, int, torch.device, torch.dtype, int]:
    """Return what `choice.choose` and `choice.explain` take."""
    folder = Path(components.resolve_base_model(config.base_model))
    training, factor = config.training, config.training.pooled_attention or 1
    return training.fast_path, folder, config.resolution, *_place(config), factor


def _place(config: Config) -> tuple[torch.device, torch.dtype]:
    device = devices.resolve_device(config.device)
    return device, devices.resolve_dtype(config.training.mixed_precision, device)


def _processor() -> str:
    return f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"


def mathematical_differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Return one line for each difference that makes it another run."""
    unused = {f"training.{key}" for key in unused_keys(now.settings.get("training.lr_scheduler", ""))}
    # Of a file that has moved, the digest tells that it is the same.
    same_base = before.base_commit is not None and before.base_commit == now.base_commit
    found = _compare(before.settings, now.settings, unused | ({"base_model"} if same_base else set()))
    if before.data_sha256 != now.data_sha256:
        found.append("the training data: other images or captions now")
    if None not in (before.base_commit, now.base_commit) and before.base_commit != now.base_commit:
        found.append(_other_base(before.base_commit, now.base_commit))
    return found


def _other_base(before: str | None, now: str | None) -> str:
    if f"{before}{now}".count("sha256:"):
        return f"the base model: {before} before, {now} now; name in base_model what it was"
    return (
        f"the base model's commit: {before} before, {now} now; `@` and the commit after its name, in"
        " base_model, bring one back"
    )


def environment_differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Return one line for each difference that may show in the last bits."""
    return _compare(before.environment, now.environment)


def _compare(before: dict[str, Any], now: dict[str, Any], ignored: Collection[str] = ()) -> list[str]:
    return [
        f"{key}: {before.get(key)} before, {now.get(key)} now"
        for key in sorted((before.keys() | now.keys()) - set(ignored))
        if before.get(key) != now.get(key)
    ]


def model_sha256(parts: components.Components) -> str:
    """Return one digest over the frozen weights and their precision."""
    digest = hashlib.sha256()
    for name in ("unet", "text_encoder", "vae"):
        for key, tensor in getattr(parts, name).state_dict().items():
            digest.update(f"{name}.{key} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
