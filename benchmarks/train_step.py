"""A training image by its ancestor's loop, by diffusers' script, ours and its fast paths, in turns.

    python benchmarks/train_step.py                                      # the real shape, 512 px
    python benchmarks/train_step.py --quick                              # toy size, in seconds
    python benchmarks/train_step.py --resolution 128 --append docs/benchmarks.md
    python benchmarks/train_step.py --mixed-precision no --fast-path off --sides ancestor plain

All sides take turns in one process, so that what else the machine does falls on each of them; the table
has medians, spread and the load.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measuring
import torch
from measuring import Seconds
from rivals import SEED, Ancestor, DiffusersScript
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from bunny_lora.config import validate
from bunny_lora.dataset import ImageDataset
from bunny_lora.model.components import Components
from bunny_lora.model.fast import choice, pooled
from bunny_lora.model.fast.choice import FastPath
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import fingerprint
from bunny_lora.training.batch import Batch
from bunny_lora.world.film import write_film

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def open_trainer(base_model: str, resolution: int, precision: str, fast_path: str) -> LoRATrainer:
    """Return a trainer with its data encoded and its model loaded, in a project of its own."""
    write_film(Path(os.environ["BUNNY_LORA_ROOT"]) / "outputs" / "film", n_frames=1)
    section = {
        "base_model": base_model,
        "source": "outputs/film",
        "resolution": resolution,
        "training": {
            "batch_size": 1,
            "seed": SEED,
            "mixed_precision": precision,
            "fast_path": fast_path,
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
    trainer: LoRATrainer,
    rivals: dict[str, Ancestor | DiffusersScript],
    paths: dict[str, tuple[FastPath, int]],
) -> dict[str, Callable[[], None]]:
    """Return what is compared, by name; each is one picture, forwards, backwards and an update."""
    setup, first = trainer.setup, first_batch(trainer)

    def ours(path: FastPath, factor: int) -> None:
        choice.install(setup.parts.unet, path, factor)
        setup.learner.loss(0).backward()
        choice.remove(setup.parts.unet)
        setup.state.optimizer.step()
        setup.state.optimizer.zero_grad()

    return {
        **{name: partial(rival.step, *first) for name, rival in rivals.items()},
        **{f"ours, {name}": partial(ours, *path) for name, path in paths.items()},
    }


POOLED = "pooled_attention: 2"


def fast_paths(trainer: LoRATrainer) -> dict[str, tuple[FastPath, int]]:
    """Return the plain path, each change alone, what training.fast_path takes, and an approximation."""
    config, chosen = trainer.config, choice.read(trainer.setup.fast_path)
    name = f"fast_path: {config.training.fast_path}"
    found = {"plain": (FastPath([], lora=False), 1)}
    if chosen.shapes:
        found["native attention"] = (chosen._replace(lora=False), 1)
    if chosen.lora:
        found["LoRA without casts"] = (FastPath([], lora=True), 1)
    if chosen != found["plain"][0]:
        found[name] = (chosen, 1)
    if pooled.applies_to(trainer.setup.parts.unet):
        *about, _ = fingerprint.about_fast_path(config)
        found[f"{name}, {POOLED}"] = (choice.read(choice.choose(*about, 2)), 2)
    return found


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


def measure(options: argparse.Namespace) -> str:
    """Measure everything, or the sides that are wanted; return the section of docs/benchmarks.md."""
    base_model, resolution = options.base_model, options.resolution
    repeats, wanted, load = options.repeats, options.sides, os.getloadavg()[0]
    trainer = open_trainer(base_model, resolution, options.mixed_precision, options.fast_path)
    parts: Components = trainer.setup.parts

    def is_wanted(name: str) -> bool:
        return not wanted or any(part in name for part in wanted)

    kinds = {"the ancestor's loop": Ancestor, "diffusers' script": DiffusersScript}
    rivals = {name: kind(trainer) for name, kind in kinds.items() if is_wanted(name)}
    paths = {name: path for name, path in fast_paths(trainer).items() if is_wanted(name)}
    facts = [
        f"{base_model} at {resolution} px, one image at a time, {parts.dtype}".replace("torch.", "")
    ]
    if rivals:
        apart = ", ".join(f"{name} {loss_difference(trainer, r):.1e}" for name, r in rivals.items())
        facts.append(f"losses of the same micro-batch, away from ours: {apart}")
    if options.fast_path != "off":
        facts.append(choice.explain(*fingerprint.about_fast_path(trainer.config)[1:]))
    warm_up = not options.no_warm_up
    facts.append(f"sides in turns, medians of {repeats}" + ", none to warm up" * options.no_warm_up)
    times = measuring.take_turns(sides(trainer, rivals, paths), repeats, warm_up=warm_up)
    if not wanted:
        facts.append(_of_the_peak(trainer, times, resolution))
    return measuring.section("A training image", facts, measuring.table(times, "an image"), load)


def _of_the_peak(trainer: LoRATrainer, times: dict[str, list[Seconds]], resolution: int) -> str:
    """Return in words which share of the machine's best our fastest exact side reaches."""
    exact = {
        name: side for name, side in times.items() if name.startswith("ours") and POOLED not in name
    }
    name, best = list(exact.items())[-1]
    seconds = statistics.median(s.wall for s in best)
    peak = peak_flops(trainer.setup.parts.dtype, 2048 if resolution > 64 else 256)
    flops = count_flops(trainer)
    return (
        f"{name}: {flops / 1e12:.3g} TFLOP at {flops / seconds / peak:.0%} of the {peak / 1e12:.3g}"
        " TFLOP/s of a product of large matrices"
    )


def main() -> None:
    """Measure, print, and append to a file where one is named."""
    parser = measuring.arguments(__doc__, resolution=512, repeats=5)
    parser.add_argument("--quick", action="store_true", help="random-tiny at 64 px")
    parser.add_argument("--mixed-precision", default="auto", help="as training.mixed_precision")
    parser.add_argument("--fast-path", default="auto", help="as training.fast_path")
    parser.add_argument("--sides", nargs="+", default=[], help="parts of names; all, if none is named")
    parser.add_argument("--no-warm-up", action="store_true", help="have the first turn count")
    options = parser.parse_args()
    if options.quick:
        options.base_model, options.resolution = "random-tiny", 64
    with measuring.project():
        text = measure(options)
    measuring.report(text, options.append)


if __name__ == "__main__":
    main()
