"""From the command to the end of the first step: with everything to do, and with all of it kept.

    python benchmarks/start.py                               # the real shape, 512 px
    python benchmarks/start.py --base-model random-tiny --resolution 32

Warm: the model is on this machine, the data are prepared and encoded. Each start is a new process.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

import measuring
from measuring import Seconds

from bunny_lora.config import validate
from bunny_lora.core import files
from bunny_lora.model import components
from bunny_lora.world.film import write_film

FIRST_STEP = "import sys; from bunny_lora import LoRATrainer; next(LoRATrainer(sys.argv[1]).steps())"


def start(config: str) -> Seconds:
    """Return how long a process takes that trains one step."""
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", FIRST_STEP, config], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Seconds(time.perf_counter() - wall, cpu)


def main() -> None:
    """Measure, print, and append to a file where one is named."""
    parser = measuring.arguments(__doc__, resolution=512, repeats=3)
    parser.add_argument("--frames", type=int, default=8)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with measuring.project() as root:
        write_film(root / "outputs" / "film", n_frames=options.frames)
        components.resolve_base_model(options.base_model)  # built, as a real one is downloaded
        section = {
            "base_model": options.base_model,
            "source": "outputs/film",
            "resolution": options.resolution,
            "training": {"gradient_accumulation_steps": 1, "save_minutes": None},
            "resume": "never",
        }
        files.write_text(root / "start.yaml", validate(section).to_yaml())
        times = {"with data to prepare and to encode": [start(str(root / "start.yaml"))]}
        warm = [start(str(root / "start.yaml")) for _ in range(options.repeats)]
    facts = [
        f"{options.base_model} at {options.resolution} px, {options.frames} frames, one image a step;"
        f" a new process each, medians of {options.repeats}"
    ]
    results = measuring.table(times | {"warm": warm}, "to the end of the first step")
    measuring.report(measuring.section("A start", facts, results, load), options.append)


if __name__ == "__main__":
    main()
