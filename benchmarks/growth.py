"""How the cost grows with the number of frames: preparing, encoding, a step, memory.

    python benchmarks/growth.py                              # 65, 650 and 6,500 small frames
    python benchmarks/growth.py --frames 10 20 --append docs/benchmarks.md

Small pictures and a small model: what is asked is whether it is linear, not how long it takes. Each
size has a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from functools import partial
from pathlib import Path
from typing import Any

import measuring
from PIL import Image

SIZE = (96, 54)
RESOLUTION = 32


def write_frames(folder: Path, count: int) -> None:
    """Write small pictures that all differ, with captions."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        image = Image.new("RGB", SIZE, (i % 256, i // 256 % 256, 90))
        image.paste((250, 30, 20), (i % 60, 10, i % 60 + 20, 44))
        image.save(folder / f"frame_{i:06d}.png")
        lines.append(json.dumps({"file_name": f"frame_{i:06d}.png", "text": f"ellie, bunny {i % 50}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(count: int, results: Any) -> None:
    """Measure one size in a project of its own."""
    from bunny_lora.config import validate
    from bunny_lora.model import devices
    from bunny_lora.trainer import LoRATrainer
    from bunny_lora.training import banner

    with measuring.project() as root:
        write_frames(root / "frames", count)
        section = {"base_model": "random-tiny", "source": "frames", "resolution": RESOLUTION}
        trainer = LoRATrainer(config=validate(section))
        prepared = measuring.timed(trainer.prepare_data)
        first = measuring.timed(trainer.load)
        again = measuring.timed(trainer.load)
        setup = trainer.setup
        work = partial(banner.time_trial, setup.learner, setup.state.optimizer)  # two micro-batches
        step = measuring.medians([measuring.timed(work) for _ in range(9)]).cpu / 2
        peak = devices.peak_memory_gb(setup.parts.device)
    results.put([prepared.cpu, first.cpu - again.cpu, again.cpu, step, peak])


def table(measured: dict[int, list[float]]) -> str:
    """Return what each size took, in Markdown."""
    head = ["frames", "preparing", "a frame", "encoding", "a frame", "loading again", "a micro-batch"]
    lines = ["| " + " | ".join([*head, "memory at most"]) + " |", "|---" * (len(head) + 1) + "|"]
    for count, (prepared, encoded, again, step, peak) in measured.items():
        cells = [f"{count:,}", f"{prepared:.1f} s", f"{1000 * prepared / count:.1f} ms"]
        cells += [f"{encoded:.1f} s", f"{1000 * encoded / count:.1f} ms", f"{again:.1f} s"]
        lines.append("| " + " | ".join([*cells, f"{step:.3f} s", f"{peak:.2f} GB"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and append to a file where one is named."""
    parser = measuring.arguments(__doc__, resolution=RESOLUTION, repeats=1)
    parser.add_argument("--frames", type=int, nargs="+", default=[65, 650, 6500])
    options = parser.parse_args()
    load, measured = os.getloadavg()[0], {}
    context = multiprocessing.get_context("spawn")
    for count in options.frames:
        results = context.Queue()
        process = context.Process(target=measure, args=(count, results))
        process.start()
        measured[count] = results.get()
        process.join()
    facts = [f"random-tiny at {RESOLUTION} px, frames of {SIZE[0]} x {SIZE[1]}, CPU seconds"]
    text = measuring.section("Growth with the number of frames", facts, table(measured), load)
    measuring.report(text, options.append)


if __name__ == "__main__":
    main()
