"""What a run is about to do, in a few lines, with an estimate from a trial of the real work."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from bunny_lora.core import paths
from bunny_lora.model import adapters, devices
from bunny_lora.model.devices import peak_memory_gb
from bunny_lora.model.fast import choice
from bunny_lora.model.random_models import RANDOM_MODELS
from bunny_lora.training import fingerprint, optim
from bunny_lora.training.objective import Learner

if TYPE_CHECKING:
    from bunny_lora.training.setup import Setup

LONG_SEC = 2
RANDOM = " (random weights: its pictures are noise)"


@dataclass(frozen=True)
class Trial:
    """Seconds for one micro-batch forwards and backwards, and for the forward pass alone."""

    micro_batch_sec: float
    forward_sec: float


def time_trial(learner: Learner, optimizer: Optimizer) -> Trial:
    """Time the run's first micro-batch, whose gradients are thrown away.

    Twice, since the first pass also pays for allocating memory and choosing kernels; but where it is
    long, that is a small part of it, and a user waits for the second.
    """
    device, micro_batch_sec = learner.components.device, 0.0
    for _ in range(2):
        if micro_batch_sec > LONG_SEC:
            break
        devices.synchronize(device)
        started = time.perf_counter()
        loss = learner.loss(0)
        devices.synchronize(device)
        forward_sec = time.perf_counter() - started
        loss.backward()
        devices.synchronize(device)
        micro_batch_sec = time.perf_counter() - started
        optimizer.zero_grad()
    return Trial(micro_batch_sec, forward_sec)


def estimate_sec(setup: Setup, trial: Trial, n_steps: int) -> float:
    """Return the seconds that `n_steps` and their validation pictures are expected to take.

    A picture costs a forward pass per inference step on two samples (with and without the prompt).
    """
    training, sampling = setup.config.training, setup.config.sampling
    n_pictures = len(training.validation_prompts) * training.num_validation_images
    n_pictures *= -(-n_steps // training.save_steps)
    picture_sec = sampling.num_inference_steps * 2 * trial.forward_sec / training.batch_size
    count = setup.group.count
    return n_steps * _step_sec(setup, trial) + -(-n_pictures // count) * picture_sec


def _step_sec(setup: Setup, trial: Trial) -> float:
    """Return what the process with the most micro-batches of a step needs for them."""
    n_own = -(-setup.config.training.gradient_accumulation_steps // setup.group.count)
    return n_own * trial.micro_batch_sec


def duration(seconds: float) -> str:
    """Return seconds as a person says them: "45 s", "12 min", "1 h 20 min", "2 d 3 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def run_summary(setup: Setup, trial: Trial, n_steps: int) -> str:
    """Return the opening banner, one fact a line."""
    config, training, parts = setup.config, setup.config.training, setup.parts
    counts = {part: _count(getattr(parts, part)) for part in adapters.PARTS}
    step_sec, count = _step_sec(setup, trial), setup.group.count
    shared = f", {count} processes" if count > 1 else ""
    per_step = f"{training.batch_size} x {training.gradient_accumulation_steps}"
    precision = str(parts.dtype).removeprefix("torch.")
    lines = {
        "device": f"{parts.device}, {precision}, {torch.get_num_threads()} threads{shared}",
        "base model": config.base_model + (RANDOM if config.base_model in RANDOM_MODELS else ""),
        "LoRA": f"rank {config.lora.rank}, alpha {config.lora.alpha:g}",
        "trainable": f"UNet {counts['unet']}; text encoder {counts['text_encoder']}",
        "fast path": setup.fast_path + _why(setup),
        "learning rate": optim.describe_schedule(training),
        "images": f"{len(setup.learner.images.captions)} at {config.resolution} px",
        "steps": f"{n_steps} of {per_step} images, checkpoint every {training.save_steps}",
        "estimate": f"{duration(estimate_sec(setup, trial, n_steps))} ({step_sec:.2f} s a step)",
        "memory": f"{peak_memory_gb(parts.device):.1f} GB at most in a trial step",
        "run folder": paths.relative(setup.config.run_dir),
    }
    return "\n".join(f"{name:<15}{text}" for name, text in lines.items())


def _why(setup: Setup) -> str:
    """Trials of `auto` are told where they were made."""
    if setup.config.training.fast_path != "auto":
        return ""
    if setup.state.step:
        return " (as the run began)"
    return f" ({choice.explain(*fingerprint.about_fast_path(setup.config)[1:])})"


def _count(model: torch.nn.Module) -> str:
    trainable = sum(p.numel() for p in adapters.trainable_parameters(model).values())
    total = sum(p.numel() for p in model.parameters()) - trainable
    return f"{trainable:,} on {total:,} frozen" if trainable else f"none, {total:,} frozen"
