"""Whether a plan keeps its word: what `bunny-lora plan` says of a short run, and what that takes.

    python benchmarks/plan.py                                # the demo's model
    python benchmarks/plan.py --base-model random-bk-sdm-tiny --resolution 256 --steps 3

Ends with an error if the run takes 15 % more or less.
"""

from __future__ import annotations

import os

import measuring

from bunny_lora.config import validate
from bunny_lora.trainer import LoRATrainer
from bunny_lora.world.film import write_film

ALLOWED = 0.15


def main() -> None:
    """Measure, print, append to a file where one is named, and compare."""
    parser = measuring.arguments(__doc__, resolution=128, repeats=1)
    parser.set_defaults(base_model="bunny-world")
    parser.add_argument("--steps", type=int, default=60)
    options, load = parser.parse_args(), os.getloadavg()[0]
    with measuring.project() as root:
        write_film(root / "outputs" / "film", n_frames=16)
        section = {
            "base_model": options.base_model,
            "source": "outputs/film",
            "resolution": options.resolution,
            "training": {"max_train_steps": options.steps, "validation_prompt": "ellie, on the beach"},
        }
        trainer = LoRATrainer(config=validate(section))
        plan = trainer.plan()
        print(plan)
        taken = measuring.timed(trainer.train)
    off = taken.wall / plan.seconds - 1
    low, high = ((1 + sign * plan.pieces.doubt) * plan.seconds for sign in (-1, 1))
    facts = [
        f"{options.base_model} at {options.resolution} px, {options.steps} steps of"
        f" {plan.images_a_step} images, {plan.work.n_pictures} pictures",
        f"planned {plan.seconds:.1f} s ({low:.1f} to {high:.1f}), taken {taken.wall:.1f} s: {off:+.0%}",
    ]
    measuring.report(measuring.section("A plan and its run", facts, "", load), options.append)
    if abs(off) > ALLOWED:
        raise SystemExit(f"The run took {off:+.0%} of what was planned; {ALLOWED:.0%} are allowed.")


if __name__ == "__main__":
    main()
