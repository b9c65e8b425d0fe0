"""What it costs to teach many characters: measured pieces, and a model of the whole from them.

    python benchmarks/cost.py                                # the real shape, random weights, 512 px
    python benchmarks/cost.py --price 0.03 --machines 200    # your own assumptions

Times are medians of repeats on this machine, with all its cores for one process. Prints the table of
docs/cost.md.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from bunny_lora import inference
from bunny_lora.config import validate
from bunny_lora.model import components, devices
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import banner, checkpoint
from bunny_lora.world.film import write_film

N_REPEATS = 5


@dataclass(frozen=True)
class Measured:
    """The pieces: seconds, bytes and GB of one machine."""

    load_sec: float
    encode_sec: float
    micro_batch_sec: float
    denoise_sec: float
    decode_sec: float
    reduce_sec: float
    memory_gb: float
    base_bytes: int
    run_bytes: int
    frame_bytes: int
    n_trainable: int


@dataclass(frozen=True)
class Plan:
    """What is asked for. One run teaches the characters of one film."""

    n_characters: int
    per_run: int = 4
    frames_per_run: int = 65
    steps: int = 500
    images_per_step: int = 4
    pictures_per_run: int = 40
    denoise_steps: int = 25


def run_sec(m: Measured, plan: Plan, n_sharing: int = 1) -> float:
    """Return how long one run takes, its micro-batches and pictures shared by so many machines."""
    per_step = math.ceil(plan.images_per_step / n_sharing) * m.micro_batch_sec
    per_step += m.reduce_sec if n_sharing > 1 else 0
    pictures = math.ceil(plan.pictures_per_run / n_sharing)
    drawing = pictures * (plan.denoise_steps * m.denoise_sec + m.decode_sec)
    return m.load_sec + plan.frames_per_run * m.encode_sec + plan.steps * per_step + drawing


def wall_sec(m: Measured, plan: Plan, n_machines: int) -> float:
    """Return how long all runs take on so many machines.

    Whole runs go to one machine each; where there are more machines than runs, the runs are shared,
    by as many machines as a step has micro-batches at the most.
    """
    n_runs = math.ceil(plan.n_characters / plan.per_run)
    n_sharing = max(1, min(n_machines // n_runs, plan.images_per_step))
    n_rounds = math.ceil(n_runs * n_sharing / n_machines)
    return n_rounds * run_sec(m, plan, n_sharing)


def disk_bytes(m: Measured, plan: Plan, n_machines: int) -> float:
    """Return what stays on disk: the base model on each machine used, frames, latents and runs."""
    n_runs = math.ceil(plan.n_characters / plan.per_run)
    return min(n_machines, n_runs) * m.base_bytes + n_runs * (
        m.run_bytes + plan.frames_per_run * m.frame_bytes
    )


# ---------------------------------------------------------------------------- measuring


def median_sec(work: Callable[[], object], n: int = N_REPEATS) -> float:
    """Return the median time of a call, after one that warms up."""
    work()
    times = []
    for _ in range(n):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(base_model: str, resolution: int) -> Measured:
    """Measure everything in a project of its own, in a temporary folder."""
    root = Path(os.environ["BUNNY_LORA_ROOT"])
    write_film(root / "outputs" / "film", n_frames=4)
    section = {
        "base_model": base_model,
        "source": "outputs/film",
        "resolution": resolution,
        "training": {"batch_size": 1},
    }
    trainer = LoRATrainer(config=validate(section))
    trainer.prepare_data()
    trainer.load()
    started = time.perf_counter()
    trainer.load()  # Now the latents are there: what is left is reading the model.
    load_sec = time.perf_counter() - started
    parts, config = trainer.setup.parts, trainer.config

    pixels = torch.rand(1, 3, resolution, resolution) * 2 - 1
    encode_sec = median_sec(lambda: components.encode_images(parts.vae, pixels))
    trainer.setup.set_training_mode(True)
    learner, optimizer = trainer.setup.learner, trainer.setup.state.optimizer
    trials = [banner.time_trial(learner, optimizer) for _ in range(N_REPEATS)]
    memory_gb = devices.peak_memory_gb(parts.device)
    trainer.setup.set_training_mode(False)

    def draw(n_steps: int) -> Callable[[], object]:
        options = {"guidance_scale": 7.5, "width": resolution, "height": resolution}
        return lambda: inference.generate_image(
            trainer.setup.pipe, "ellie", num_inference_steps=n_steps, **options
        )

    few, more = median_sec(draw(2), 3), median_sec(draw(6), 3)
    denoise_sec = (more - few) / 4
    learner.loss(0).backward()
    optimizer.step()
    checkpoint.save_checkpoint(root / "checkpoint-1", trainer.setup.state, {})
    n_checkpoints = config.training.max_train_steps // config.training.save_steps
    n_trainable = sum(p.numel() for p in trainer.setup.trainable())
    frames = list((root / "training_data").rglob("*.*"))
    return Measured(
        load_sec=load_sec,
        encode_sec=encode_sec,
        micro_batch_sec=statistics.median(trial.micro_batch_sec for trial in trials),
        denoise_sec=denoise_sec,
        decode_sec=max(few - 2 * denoise_sec, 0.0),
        reduce_sec=reduce_sec(n_trainable),
        memory_gb=memory_gb,
        base_bytes=size_of(Path(components.resolve_base_model(base_model))),
        run_bytes=n_checkpoints * size_of(root / "checkpoint-1"),
        frame_bytes=sum(file.stat().st_size for file in frames) // 4,
        n_trainable=n_trainable,
    )


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def reduce_sec(n_numbers: int) -> float:
    """Return the median time of adding up a step's gradients over two processes on this machine."""
    with tempfile.NamedTemporaryFile() as meeting, tempfile.NamedTemporaryFile("r") as result:
        arguments = (meeting.name + ".store", result.name, n_numbers)
        torch.multiprocessing.spawn(_reduce, arguments, nprocs=2)
        return float(result.read())


def _reduce(rank: int, meeting: str, result: str, n_numbers: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    gradients = torch.ones(n_numbers)
    seconds = median_sec(lambda: dist.all_reduce(gradients), 20)
    if rank == 0:
        Path(result).write_text(str(seconds))
    dist.destroy_process_group()


# ---------------------------------------------------------------------------- telling


def table(m: Measured, n_machines: int, n_cores: int, price: float) -> str:
    """Return the table of docs/cost.md, in Markdown."""
    lines = [
        f"| characters | runs | core hours | one machine | {n_machines} machines | disk, one machine |"
        f" disk, {n_machines} | money |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for n in (10, 100, 1000):
        plan = Plan(n)
        n_runs = math.ceil(n / plan.per_run)
        hours = n_runs * run_sec(m, plan) / 3600 * n_cores
        cells = [
            f"{n:,}",
            f"{n_runs:,}",
            f"{hours:,.0f}",
            banner.duration(wall_sec(m, plan, 1)),
            banner.duration(wall_sec(m, plan, n_machines)),
            f"{disk_bytes(m, plan, 1) / 1e9:,.1f} GB",
            f"{disk_bytes(m, plan, n_machines) / 1e9:,.1f} GB",
            f"{hours * price:,.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print pieces and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="random-bk-sdm-tiny")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--machines", type=int, default=50)
    parser.add_argument("--price", type=float, default=0.04, help="of a core for an hour")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for name in ("params", "notebooks"):
            (Path(root) / name).mkdir()
        os.environ["BUNNY_LORA_ROOT"] = root
        m = measure(options.base_model, options.resolution)
    n_cores = os.cpu_count() or 1
    print(f"{options.base_model} at {options.resolution} px, {n_cores} cores, medians of {N_REPEATS}")
    for name, value in vars(m).items():
        print(f"  {name:<16}{value:,.5f}" if isinstance(value, float) else f"  {name:<16}{value:,}")
    print(table(m, options.machines, n_cores, options.price))


if __name__ == "__main__":
    main()
