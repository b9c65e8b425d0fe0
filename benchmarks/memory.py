"""The most memory of a whole run, what its plan had said, and what less memory costs in time.

    python benchmarks/memory.py                              # the real shape, 512 px
    python benchmarks/memory.py --settings low_memory --no-plan
    python benchmarks/memory.py --base-model random-tiny --resolution 64

Each run has a process of its own: it encodes two pictures, does four steps of one image, and draws a
picture of two steps.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

import measuring

from bunny_lora.config import validate
from bunny_lora.core import files
from bunny_lora.model import components, devices
from bunny_lora.trainer import LoRATrainer
from bunny_lora.world.film import write_film

SETTINGS: dict[str, dict[str, bool]] = {
    "default": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "low_memory": {"low_memory": True},
    "both": {"gradient_checkpointing": True, "low_memory": True},
}


def build(base_model: str) -> None:
    """Have a base model that is built where it is named for the first time."""
    print(json.dumps([len(components.resolve_base_model(base_model))]))


def run(config: str) -> None:
    """Train, and print seconds of a step and of a picture."""
    steps, before = [], time.perf_counter()
    for record in LoRATrainer(config).steps():
        steps.append(record.seconds)
        whole, before = time.perf_counter() - before, time.perf_counter()
    drawn = whole - steps[-1]  # what came between the last step and its record
    print(json.dumps([record.peak_memory_gb, statistics.median(steps), drawn]))


def plan(config: str) -> None:
    """Plan the run, and print its memory."""
    print(json.dumps([LoRATrainer(config).plan().memory_gb]))


def in_a_process(what: str, config: str) -> list[float]:
    """Return what `run` or `plan` print, and the most memory of its process behind it."""
    program = f"import memory, sys; memory.{what}(sys.argv[1]); print(memory.peak())"
    command = [sys.executable, "-c", program, config]
    environment = os.environ | {
        "PYTHONPATH": f"{sys.path[0]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    }
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    numbers, peak = done.stdout.splitlines()[-2:]
    return [*json.loads(numbers), float(peak)]


def peak() -> float:
    """Return the most memory of this process, GB of 10^9."""
    return devices.peak_memory_gb(devices.resolve_device("cpu"))


def main() -> None:
    """Measure, print, and append to a file where one is named."""
    parser = measuring.arguments(__doc__, resolution=512, repeats=1)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--no-plan", action="store_true", help="only the runs")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = ["| training. | a run, at most | its plan said | a step | a picture |", "|---" * 5 + "|"]
    with measuring.project() as root:
        write_film(root / "outputs" / "film", n_frames=2)
        # Built, as a real one is downloaded; not here, for a process hands its peak on to its children.
        in_a_process("build", options.base_model)
        for name in options.settings:
            section = {
                "base_model": options.base_model,
                "source": "outputs/film",
                "resolution": options.resolution,
                "data_dir": f"training_data/{name}/instance_images",
                "training": {
                    "fast_path": "auto",
                    "gradient_accumulation_steps": 1,
                    "max_train_steps": 4,
                    "validation_prompt": "ellie",
                    "num_validation_images": 1,
                    **SETTINGS[name],
                },
                "sampling": {"num_inference_steps": 2},
                "resume": "never",
            }
            config = root / f"{name}.yaml"
            files.write_text(config, validate(section).to_yaml())
            planned = None if options.no_plan else in_a_process("plan", str(config))[0]
            _, step, picture, peak_gb = in_a_process("run", str(config))
            said = f"{planned:.2f} GB" if planned else ""
            rows.append(f"| {name} | {peak_gb:.2f} GB | {said} | {step:.2f} s | {picture:.1f} s |")
            print(rows[-1], file=sys.stderr)
    facts = [f"{options.base_model} at {options.resolution} px, as its `auto` chooses; one run each"]
    text = measuring.section("Memory of a run", facts, "\n".join(rows), load)
    measuring.report(text, options.append)


if __name__ == "__main__":
    main()
