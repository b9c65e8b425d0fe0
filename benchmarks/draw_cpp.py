"""A picture by stable-diffusion.cpp and by ours: the same merged model, size, steps and threads.

    make readers                                    # builds stable-diffusion.cpp beside .venv
    PYTHONPATH=.readers python benchmarks/draw_cpp.py --append docs/benchmarks.md

Both draw with Euler's method and guidance from the prompt to the picture, with the model loaded before.
Pictures of few and of more steps tell what a step and what all else takes; the usual 12 steps are
calculated from them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import draw
import measuring
import torch
from measuring import Seconds

from bunny_lora import export, inference
from bunny_lora.model import bpe, random_models
from bunny_lora.model.quiet import quiet

FEW, MORE, USUAL = 1, 3, 12
GUIDANCE = 7.5
OURS, THEIRS = "ours", "stable-diffusion.cpp"


@quiet()
def write_models(folder: Path) -> tuple[Path, Path, Path]:
    """Return base model, LoRA, and the two merged in one file of float16; write them if need be.

    The vocabulary is CLIP's, which stable-diffusion.cpp brings itself.
    """
    base, shape = folder / "base", random_models.BK_SDM_TINY
    if (folder / "out").is_dir():
        return base, folder / "lora", next((folder / "out").glob("*.safetensors"))
    pipe = random_models.build_pipeline(shape, tokenizer=bpe.build_clip_tokenizer())
    pipe.to(torch.float16).save_pretrained(base)
    lora = draw.write_lora(str(base), folder / "lora")
    files = export.export(lora, folder / "out", kinds=["checkpoint"], base_model=str(base))
    [merged] = [file for file in files if file.suffix == ".safetensors"]
    return base, lora, merged


def ours(base: Path, lora: Path, size_px: int) -> Callable[[int], object]:
    """Return what draws a picture of so many steps with this project."""
    pipe = inference.load_lora_pipeline(str(base), lora, dtype=draw.OWN_DTYPE)
    size: dict[str, Any] = {"width": size_px, "height": size_px, "guidance_scale": GUIDANCE}
    return lambda steps: inference.generate_image(
        pipe, draw.PROMPT, sampler="euler", num_inference_steps=steps, **size
    )


def theirs(merged: Path, size_px: int) -> Callable[[int], object]:
    """Return what draws a picture of so many steps with stable-diffusion.cpp."""
    try:
        from stable_diffusion_cpp import StableDiffusion
    except ImportError as error:
        raise SystemExit(
            f"stable-diffusion.cpp is not here ({error}): `make readers` builds it."
        ) from error
    threads = torch.get_num_threads()
    program = StableDiffusion(model_path=str(merged), n_threads=threads, verbose=False)
    return lambda steps: program.generate_image(
        prompt=draw.PROMPT,
        width=size_px,
        height=size_px,
        sample_steps=steps,
        cfg_scale=GUIDANCE,
        sample_method="euler",
        scheduler="discrete",
    )


def rows(times: dict[str, list[Seconds]]) -> dict[str, dict[str, list[Seconds]]]:
    """Return for whole pictures, a step, and all else what each program takes, turn by turn."""
    found: dict[str, dict[str, list[Seconds]]] = {"picture": {}, "step": {}, "rest": {}}
    for who in (THEIRS, OURS):
        few, more = (times[f"{who} {steps}"] for steps in (FEW, MORE))
        for short, longer in zip(few, more, strict=True):
            step = Seconds(*((b - a) / (MORE - FEW) for a, b in zip(short, longer, strict=True)))
            rest = Seconds(*(a - FEW * s for a, s in zip(short, step, strict=True)))
            picture = Seconds(*(r + USUAL * s for r, s in zip(rest, step, strict=True)))
            for kind, seconds in (("picture", picture), ("step", step), ("rest", rest)):
                found[kind].setdefault(who, []).append(seconds)
    return found


def measure(size_px: int, repeats: int, root: Path) -> str:
    """Measure both and return the section of docs/benchmarks.md."""
    load = os.getloadavg()[0]
    base, lora, merged = write_models(root)
    programs = {THEIRS: theirs(merged, size_px), OURS: ours(base, lora, size_px)}
    works = {
        f"{who} {steps}": lambda draw_one=draw_one, steps=steps: draw_one(steps)
        for steps in (FEW, MORE)
        for who, draw_one in programs.items()
    }
    for draw_one in programs.values():  # what only a first picture pays is no part of a step
        draw_one(FEW)
    times = measuring.take_turns(works, repeats, warm_up=False)
    found = rows(times)
    drawn = {f"{who}, {MORE} steps": times[f"{who} {MORE}"] for who in programs}
    tables = [
        measuring.table(drawn, "a picture"),
        measuring.table(found["picture"], f"a picture of {USUAL} steps, calculated"),
        measuring.table(found["step"], "a step with guidance"),
        measuring.table(found["rest"], "for all else, decoding most of it"),
    ]
    facts = [
        f"BK-SDM-Tiny's shape with random weights and a LoRA merged in, {size_px} px, Euler; theirs"
        f" from one file of float16, ours in {draw.OWN_DTYPE}".replace("torch.", ""),
        f"sides in turns, medians of {repeats}",
    ]
    return measuring.section(
        "A picture, against stable-diffusion.cpp", facts, "\n\n".join(tables), load
    )


def main() -> None:
    """Measure, print, and append to a file where one is named."""
    parser = measuring.arguments(__doc__, resolution=512, repeats=1)
    parser.add_argument("--models", type=Path, help="a folder to keep the models in, for another time")
    options = parser.parse_args()
    with measuring.project() as root:
        text = measure(options.resolution, options.repeats, options.models or root)
    measuring.report(text, options.append)


if __name__ == "__main__":
    main()
