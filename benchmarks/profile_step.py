"""Where the time of a training image goes, before and after the fast path.

    python benchmarks/profile_step.py                                    # the real shape, 512 px
    python benchmarks/profile_step.py --resolution 128 --append docs/benchmarks.md

Seconds that torch's profiler counts in operators themselves, forwards and backwards, sides in turns
in one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import Counter
from collections.abc import Callable

import measuring
from torch.profiler import ProfilerActivity, profile
from train_step import fast_paths, open_trainer, sides

# By a part of an operator's name, the first that fits.
KINDS = {
    "attention": "attention",
    "conv": "convolutions",
    "lora": "linear layers and LoRA",
    "mm": "linear layers and LoRA",
    "softmax": "attention",
    "norm": "normalisation",
    "silu": "activations",
    "gelu": "activations",
    "copy": "copies and casts",
    "adamw": "optimiser",
}
REST = "all else"


def kind_of(operator: str) -> str:
    """Return what an operator is counted as."""
    return next((kind for part, kind in KINDS.items() if part in operator.lower()), REST)


def seconds_of(work: Callable[[], None]) -> Counter[str]:
    """Return the seconds of each kind of operator in a call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    found: Counter[str] = Counter()
    for event in profiled.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return found


def measure(options: argparse.Namespace) -> str:
    """Return the section of docs/benchmarks.md."""
    load = os.getloadavg()[0]
    trainer = open_trainer(options.base_model, options.resolution, "auto", "auto")
    paths = fast_paths(trainer)
    shown = {name: path for name, path in paths.items() if name in ("plain", "fast_path: auto")}
    works = sides(trainer, {}, shown)
    for work in works.values():
        work()
    turns = [{name: seconds_of(work) for name, work in works.items()} for _ in range(options.repeats)]
    kinds = [*dict.fromkeys(KINDS.values()), REST]
    lines = ["| | " + " | ".join(works) + " |", "|---" * (len(works) + 1) + "|"]
    for kind in kinds:
        medians = [statistics.median(turn[name][kind] for turn in turns) for name in works]
        lines.append(f"| {kind} | " + " | ".join(f"{s:.3g}" for s in medians) + " |")
    whole = [statistics.median(turn[name].total() for turn in turns) for name in works]
    lines.append("| all | " + " | ".join(f"{s:.3g}" for s in whole) + " |")
    facts = [
        f"{options.base_model} at {options.resolution} px, one image, {trainer.setup.parts.dtype}"
        f"; seconds of operators themselves, sides in turns, medians of {options.repeats}"
    ]
    title = "Where the time of a training image goes"
    return measuring.section(title, facts, "\n".join(lines), load)


def main() -> None:
    """Measure, print, and append to a file where one is named."""
    options = measuring.arguments(__doc__, resolution=512, repeats=3).parse_args()
    with measuring.project():
        text = measure(options)
    measuring.report(text, options.append)


if __name__ == "__main__":
    main()
