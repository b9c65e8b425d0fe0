"""A training image by its ancestor's loop, by diffusers' script, ours and its fast paths, in turns.

    python benchmarks/train_step.py                                      # the real shape, 512 px
    python benchmarks/train_step.py --quick                              # toy size, in seconds
    python benchmarks/train_step.py --resolution 128 --append docs/benchmarks.md

All sides take turns in one process, so that what else the machine does falls on each of them; the table
has medians, spread and the load.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measuring
import torch
from rivals import SEED, Ancestor, DiffusersScript
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from bunny_lora.config import validate
from bunny_lora.dataset import ImageDataset
from bunny_lora.model import components, devices
from bunny_lora.model.components import Components
from bunny_lora.model.fast import choice
from bunny_lora.model.fast.choice import FastPath
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training.latents import Batch
from bunny_lora.world.film import write_film

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def open_trainer(base_model: str, resolution: int, *, checkpointing: bool = False) -> LoRATrainer:
    """Return a trainer with its data encoded and its model loaded, in a project of its own."""
    write_film(Path(os.environ["BUNNY_LORA_ROOT"]) / "outputs" / "film", n_frames=2)
    section = {
        "base_model": base_model,
        "source": "outputs/film",
        "resolution": resolution,
        "training": {
            "batch_size": 1,
            "seed": SEED,
            "gradient_checkpointing": checkpointing,
            "fast_path": "auto",
        },
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
    trainer: LoRATrainer, rivals: dict[str, Ancestor | DiffusersScript], paths: dict[str, FastPath]
) -> dict[str, Callable[[], None]]:
    """Return what is compared, by name; each is one picture, forwards, backwards and an update."""
    setup, first = trainer.setup, first_batch(trainer)

    def ours(path: FastPath) -> None:
        choice.install(setup.parts.unet, path)
        setup.learner.loss(0).backward()
        choice.remove(setup.parts.unet)
        setup.state.optimizer.step()
        setup.state.optimizer.zero_grad()

    return {
        **{name: partial(rival.step, *first) for name, rival in rivals.items()},
        **{f"ours, {name}": partial(ours, path) for name, path in paths.items()},
    }


def fast_paths(chosen: FastPath) -> dict[str, FastPath]:
    """Return the plain path, each change alone, and the one that `fast_path: auto` takes here."""
    found = {"plain": FastPath([], lora=False)}
    if chosen.shapes:
        found["native attention"] = chosen._replace(lora=False)
    if chosen.lora:
        found["LoRA without casts"] = FastPath([], lora=True)
    return found | ({"fast_path: auto": chosen} if len(found) == 3 else {})


def loss_difference(trainer: LoRATrainer, rival: Ancestor | DiffusersScript) -> float:
    """Return by how much the losses of the same micro-batch differ, relative to the rival's."""
    with torch.no_grad():
        theirs = rival.loss(*first_batch(trainer)).item()
        mine = trainer.setup.learner.loss(0).item()
    difference = abs(mine - theirs) / theirs
    if difference > TOLERANCE[trainer.setup.parts.dtype]:
        raise SystemExit(f"The loops do not do the same work: losses {theirs} and {mine}.")
    return difference


def peak_flops(dtype: torch.dtype, side: int) -> float:
    """Return the operations a second of a large product of matrices, the best of ten."""
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    seconds = min(measuring.timed(lambda: torch.mm(a, b)).wall for _ in range(10))
    return 2 * side**3 / seconds


def count_flops(trainer: LoRATrainer) -> int:
    """Return the operations of products, convolutions and attention in one picture."""
    choice.remove(trainer.setup.parts.unet)  # The native attention cannot be looked into.
    for way in ("", "_backward"):
        kernel = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{way}")
        known = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{way}")
        register_flop_formula(kernel, get_raw=True)(flop_registry[known])
    with FlopCounterMode(display=False) as counter:
        trainer.setup.learner.loss(0).backward()
    trainer.setup.state.optimizer.zero_grad()
    return counter.get_total_flops()


def memory_alone(options: list[str]) -> str:
    """Return the most memory of a process that does nothing but our training, GB of 10^9."""
    command = [sys.executable, __file__, "--memory", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def measure(base_model: str, resolution: int, repeats: int) -> str:
    """Measure everything and return the section of docs/benchmarks.md."""
    load = os.getloadavg()[0]
    own = ["--base-model", base_model, "--resolution", str(resolution)]
    memory = {kind: memory_alone([*own, *extra]) for kind, extra in MEMORY.items()}
    trainer = open_trainer(base_model, resolution)
    parts: Components = trainer.setup.parts
    rivals = {
        "the ancestor's loop": Ancestor(trainer),
        "diffusers' script": DiffusersScript(trainer),
    }
    apart = ", ".join(f"{name} {loss_difference(trainer, r):.1e}" for name, r in rivals.items())
    place = (Path(components.resolve_base_model(base_model)), resolution, parts.device, parts.dtype)
    paths = fast_paths(choice.read(choice.choose("auto", *place)))
    peak, flops = peak_flops(parts.dtype, 2048 if resolution > 64 else 256), count_flops(trainer)
    times = measuring.take_turns(sides(trainer, rivals, paths), repeats)
    best = statistics.median(s.wall for s in list(times.values())[-1])
    facts = [
        f"{base_model} at {resolution} px, one image at a time, {parts.dtype}".replace("torch.", ""),
        f"losses of the same micro-batch, away from ours: {apart}",
        f"{choice.explain(*place)}; sides in turns, medians of {repeats}",
        f"the last row does {flops / 1e12:.3g} TFLOP at {flops / best / peak:.0%} of the"
        f" {peak / 1e12:.3g} TFLOP/s of a product of large matrices",
        "most memory of a process that encodes two pictures and trains: "
        + ", ".join(f"{gb} GB {kind}" for kind, gb in memory.items()),
    ]
    return measuring.section("A training image", facts, measuring.table(times, "an image"), load)


MEMORY: dict[str, list[str]] = {
    "with fast_path: auto": [],
    "with gradient checkpointing": ["--checkpointing"],
}


def train_alone(base_model: str, resolution: int, *, checkpointing: bool) -> None:
    """Do two steps as a run does them, and print the most memory of this process."""
    trainer = open_trainer(base_model, resolution, checkpointing=checkpointing)
    for position in range(2):
        trainer.setup.learner.loss(position).backward()
        trainer.setup.state.optimizer.step()
        trainer.setup.state.optimizer.zero_grad()
    print(f"{devices.peak_memory_gb(trainer.setup.parts.device):.2f}")


def main() -> None:
    """Measure, print, and append to a file where one is named."""
    parser = measuring.arguments(__doc__, resolution=512, repeats=5)
    parser.add_argument("--quick", action="store_true", help="random-tiny at 64 px")
    parser.add_argument("--memory", action="store_true", help="only our memory, in this process")
    parser.add_argument("--checkpointing", action="store_true", help="with --memory")
    options = parser.parse_args()
    small = ("random-tiny", 64) if options.quick else (options.base_model, options.resolution)
    with measuring.project():
        if options.memory:
            train_alone(*small, checkpointing=options.checkpointing)
            return
        text = measure(*small, options.repeats)
    measuring.report(text, options.append)


if __name__ == "__main__":
    main()
