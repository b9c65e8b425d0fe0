"""How well each checkpoint of a run predicts noise in frames, all of them with the same noise.

Of frames that training did not see it falls while something is learnt, and rises again where frames are
learnt by heart. One pass a frame and timestep, no picture is drawn: seconds for all checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bunny_lora.config import Config
from bunny_lora.core.progress import progress
from bunny_lora.data.frames import Sample
from bunny_lora.dataset import sample_indices
from bunny_lora.model import adapters, components, devices
from bunny_lora.model.components import Components
from bunny_lora.training import setup
from bunny_lora.training.latents import EncodedImages, encode_dataset
from bunny_lora.training.objective import Learner

if TYPE_CHECKING:
    from bunny_lora.training.setup import Setup

N_SAMPLES = 96  # about: of each frame several, each with a square, a timestep and noise of its own
BATCH_SIZE = 8
SEED = 0  # of no run: all are measured alike
N_VALIDATION = 32  # frames, or draws of fewer frames: while a run waits for it


class Validation:
    """The loss of a run on frames that it does not see, while it goes on.

    Args:
        setup: of the run, whose `held_out` are the frames: a few of each character, if there are many.
    """

    def __init__(self, setup: Setup) -> None:
        parts, config = setup.parts, setup.config
        images = _encode(parts, config, _few(setup.held_out, N_VALIDATION))
        self.learner = Learner(parts, config, images, models=setup.state.models)

    def measure(self) -> dict[str, Any]:
        """Return `loss`, the mean, `n_frames`, and `characters`: by name the mean where they are.

        The weights are as they are, and dropout is off.
        """
        samples = self.learner.images.samples
        size = min(BATCH_SIZE, self.learner.config.training.batch_size)
        losses = _frame_losses(self.learner, N_VALIDATION, size).tolist()
        of_name: dict[str, list[float]] = {}
        for sample, loss in zip(samples, losses, strict=True):
            for name in sample.characters:
                of_name.setdefault(name, []).append(loss)
        characters = {name: sum(own) / len(own) for name, own in sorted(of_name.items())}
        return {
            "loss": sum(losses) / len(losses),
            "n_frames": len(losses),
            "characters": characters,
        }


def _few(samples: Sequence[Sample], n: int) -> list[Sample]:
    """Return at most `n` samples in their order, of each character in turn the next one."""
    if len(samples) <= n:
        return list(samples)
    of_name: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        of_name.setdefault(sample.characters, []).append(index)
    turns = (index for turn in zip_longest(*of_name.values()) for index in turn if index is not None)
    return [samples[index] for index in sorted(islice(turns, n))]


def checkpoint_losses(
    config: Config, folders: Mapping[str, Path], samples: Sequence[Sample], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the mean loss of each frame under each checkpoint, float32 [frames] each.

    Noise, timesteps and squares are functions of a frame's place alone, so they are the same for every
    checkpoint, and for every run on the same frames.

    Args:
        config: of the run: base model, adapters, how frames are cut.
        folders: of each name where its adapters lie.
        samples: the frames.
        dtype: precision of the base weights.
    """
    device = devices.resolve_device(config.device)
    parts = components.load_components(config.base_model, device, dtype)
    images = _encode(parts, config, samples)
    models = setup.attach(parts, config, adapters.adapter_parts(next(iter(folders.values()))))
    for part in models:
        getattr(parts, part).eval()
    learner = Learner(parts, config, images, models=models)
    found = {}
    bar = progress(folders.items(), desc="loss of checkpoints", total=len(folders))
    for name, folder in bar:
        for part, model in models.items():
            adapters.load_weights(model, folder / part)
        found[name] = _frame_losses(learner)
    return found


def _encode(parts: Components, config: Config, samples: Sequence[Sample]) -> EncodedImages:
    return encode_dataset(
        parts.vae,
        setup.image_dataset(config, parts, list(samples), is_training=False),
        config.data_path.parent / "latents",
        zoom_on_faces=config.zoom_on_faces,
        stream="held out",
    )


@torch.no_grad()
def _frame_losses(
    learner: Learner, n_samples: int = N_SAMPLES, batch_size: int = BATCH_SIZE
) -> torch.Tensor:
    """Return the mean over each frame's draws, [frames]."""
    n = len(learner.images.samples)
    count = learner.components.noise_scheduler.config.num_train_timesteps
    n_draws = -(-n_samples // n)
    sums = torch.zeros(n)
    for first in range(0, n * n_draws, batch_size):
        size = min(batch_size, n * n_draws - first)
        batch = learner.images.batch(SEED, first, size, count)
        frames = torch.tensor(sample_indices(SEED, n, first, size))
        sums.index_add_(0, frames, learner.losses(batch).cpu())
    return sums / n_draws
