"""A training image by its ancestor's loop, by ours, and by ours with native attention, in turns.

    python benchmarks/train_step.py                                      # the real shape, 512 px
    python benchmarks/train_step.py --quick                              # toy size, in seconds
    python benchmarks/train_step.py --resolution 128 --append docs/benchmarks.md

All sides take turns in one process, so that what else the machine does falls on each of them; the table
has medians, spread and the load.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import measuring
import torch
from torch.nn.functional import mse_loss

from bunny_lora.config import validate
from bunny_lora.dataset import ImageDataset
from bunny_lora.model import adapters, components
from bunny_lora.model.components import Components
from bunny_lora.model.fast import attention, choice
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training.latents import Batch
from bunny_lora.world.film import write_film

SEED = 42
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class Ancestor:
    """The loop that this project began with: float32, all three models at every image, checkpointing.

    Its loss is not divided by the accumulation, so its gradients are that many times as long.
    """

    def __init__(self, trainer: LoRATrainer) -> None:
        config = trainer.config
        self.parts = components.load_components(config.base_model, torch.device("cpu"), torch.float32)
        self.parts.unet.enable_gradient_checkpointing()
        lora = config.lora
        adapters.attach(self.parts.unet, "unet", lora, base_model=config.base_model, seed=SEED)
        self.parts.unet.train()
        parameters = adapters.trainable_parameters(self.parts.unet).values()
        self.optimizer = torch.optim.AdamW(parameters, lr=config.training.learning_rate)

    def loss(self, pixels: torch.Tensor, random: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Encode a picture and its caption, and predict the noise of `batch` in what was encoded."""
        with torch.no_grad():
            mean, std = components.encode_images(self.parts.vae, pixels)
            words = components.encode_prompts(self.parts, batch.captions)
        latents = mean + std * random
        noisy = self.parts.noise_scheduler.add_noise(latents, batch.noise, batch.timesteps)
        predicted = self.parts.unet(noisy, batch.timesteps, words).sample
        return mse_loss(predicted.float(), batch.noise)

    def step(self, pixels: torch.Tensor, random: torch.Tensor, batch: Batch) -> None:
        """Learn from one picture."""
        self.loss(pixels, random, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def open_trainer(base_model: str, resolution: int) -> LoRATrainer:
    """Return a trainer with its data encoded and its model loaded, in a project of its own."""
    write_film(Path(os.environ["BUNNY_LORA_ROOT"]) / "outputs" / "film", n_frames=2)
    section = {
        "base_model": base_model,
        "source": "outputs/film",
        "resolution": resolution,
        "training": {"batch_size": 1, "seed": SEED},
    }
    trainer = LoRATrainer(config=validate(section))
    trainer.prepare_data()
    trainer.load()
    trainer.setup.set_training_mode(True)
    return trainer


def first_batch(trainer: LoRATrainer) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """Return the first micro-batch of the run, with its picture and the VAE's random numbers."""
    setup = trainer.setup
    images, count = setup.learner.images, setup.parts.noise_scheduler.config.num_train_timesteps
    batch = images.batch(SEED, 0, 1, count)
    index = images.captions.index(batch.captions[0])
    pictures = ImageDataset(images.samples, resolution=trainer.config.resolution, center_crop=True)
    mean, std = images.views[index][0].latent_dist
    return pictures[index][None], (batch.latents - mean) / std, batch


def sides(
    trainer: LoRATrainer, ancestor: Ancestor, fast: list[attention.Shape]
) -> dict[str, Callable[[], None]]:
    """Return what is compared, by name; each is one picture, forwards, backwards and an update."""
    setup, first = trainer.setup, first_batch(trainer)

    def ours(shapes: list[attention.Shape]) -> None:
        attention.install(setup.parts.unet, shapes)
        setup.learner.loss(0).backward()
        attention.remove(setup.parts.unet)
        setup.state.optimizer.step()
        setup.state.optimizer.zero_grad()

    found: dict[str, Callable[[], None]] = {
        "the ancestor's loop": lambda: ancestor.step(*first),
        "ours": lambda: ours([]),
    }
    return found | ({"ours, native attention": lambda: ours(fast)} if fast else {})


def loss_difference(trainer: LoRATrainer, ancestor: Ancestor) -> float:
    """Return by how much the losses of the same micro-batch differ, relative to the ancestor's."""
    with torch.no_grad():
        theirs = ancestor.loss(*first_batch(trainer)).item()
        mine = trainer.setup.learner.loss(0).item()
    difference = abs(mine - theirs) / theirs
    if difference > TOLERANCE[trainer.setup.parts.dtype]:
        raise SystemExit(f"The two loops do not do the same work: losses {theirs} and {mine}.")
    return difference


def measure(base_model: str, resolution: int, repeats: int) -> str:
    """Measure everything and return the section of docs/benchmarks.md."""
    load = os.getloadavg()[0]
    trainer = open_trainer(base_model, resolution)
    parts: Components = trainer.setup.parts
    ancestor = Ancestor(trainer)
    difference = loss_difference(trainer, ancestor)
    place = (Path(components.resolve_base_model(base_model)), resolution, parts.device, parts.dtype)
    why_not = choice.why_not(parts.device, parts.dtype)
    works = sides(trainer, ancestor, choice.read(choice.choose("auto" if why_not else "on", *place)))
    times = measuring.take_turns(works, repeats)
    told = "no native attention: " if why_not else "native attention, "
    told += choice.explain(*place)
    facts = [
        f"{base_model} at {resolution} px, one image at a time, {parts.dtype}".replace("torch.", ""),
        f"losses of ancestor and ours on one micro-batch: {difference:.1e} apart",
        f"{told}; sides in turns, medians of {repeats}",
    ]
    return measuring.section("A training image", facts, measuring.table(times, "an image"), load)


def main() -> None:
    """Measure, print, and append to a file where one is named."""
    parser = measuring.arguments(__doc__, resolution=512, repeats=5)
    parser.add_argument("--quick", action="store_true", help="random-tiny at 64 px")
    options = parser.parse_args()
    small = ("random-tiny", 64) if options.quick else (options.base_model, options.resolution)
    with measuring.project():
        text = measure(*small, options.repeats)
    measuring.report(text, options.append)


if __name__ == "__main__":
    main()
