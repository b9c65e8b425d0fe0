"""The training loop itself, which yields a record after each step, and its optimiser."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bunny_lora.core import interrupts
from bunny_lora.model import devices
from bunny_lora.training.distributed import ProcessGroup
from bunny_lora.training.objective import Learner


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step. `loss` is the mean over its `n_images` images.

    `characters` counts, by name, the images that taught somebody, see `Learner.characters`. `skipped`:
    loss or gradients were not finite, and the weights stayed as they were.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    skipped: bool
    seconds: float
    n_images: int
    peak_memory_gb: float
    characters: dict[str, int] = field(default_factory=dict)


def training_loop(
    learner: Learner,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler,
    scaler: torch.amp.GradScaler,
    start_step: int = 0,
    group: ProcessGroup = ProcessGroup(),  # noqa: B008
) -> Iterator[StepRecord | None]:
    """Yield a record after each optimiser step, from `start_step + 1` to `max_train_steps`.

    Between two micro-batches of a step it yields None: the weights are as after the last step, and the
    caller may draw or save them.

    A step is one update on batch_size x gradient_accumulation_steps images, whose micro-batches the
    processes of `group` deal out among themselves. The caller decides what happens in between: logging,
    samples, checkpoints, or stopping early. A stop from outside drops the micro-batch that it comes in,
    and leaves everything as it was after the last step.
    """
    training = learner.config.training
    images_per_step = training.batch_size * training.gradient_accumulation_steps
    parameters = [p for settings in optimizer.param_groups for p in settings["params"]]

    for step in range(start_step + 1, training.max_train_steps + 1):
        started = time.perf_counter()
        first = (step - 1) * images_per_step
        positions = range(first, first + images_per_step, training.batch_size)
        losses = torch.zeros(len(positions), device=parameters[0].device)
        for number, position in group.local_shard(list(enumerate(positions))):
            group.check()
            if number >= group.count:
                yield None
            with interrupts.stoppable():
                loss = learner.loss(position)
                scaler.scale(loss / len(positions)).backward()
                losses[number] = loss.item()
        group.all_reduce_many([*(p.grad for p in parameters if p.grad is not None), losses])

        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm).item()
        learning_rate = float(lr_scheduler.get_last_lr()[0])
        mean_loss = sum(losses.tolist()) / len(losses)
        finite = math.isfinite(mean_loss) and math.isfinite(grad_norm)
        if finite:
            scaler.step(optimizer)
        scaler.update()
        lr_scheduler.step()
        optimizer.zero_grad()

        yield StepRecord(
            step=step,
            loss=mean_loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            skipped=not finite,
            seconds=time.perf_counter() - started,
            n_images=images_per_step,
            peak_memory_gb=devices.peak_memory_gb(learner.components.device),
            characters=dict(sum((learner.characters(position) for position in positions), Counter())),
        )
