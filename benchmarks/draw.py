"""A picture, from prompt to PNG: as this project's ancestor draws by default, and as ours does.

    python benchmarks/draw.py                      # the real shape, 512 px
    python benchmarks/draw.py --quick              # toy size, in seconds
    python benchmarks/draw.py --resolution 128 --repeats 2 --append docs/benchmarks.md

Both sides draw with the same LoRA on attention and with guidance. The ancestor loads everything for
each picture and draws it in float32 in 50 steps: how long that takes is calculated from pictures of a
few steps. Ours draws in the precision that the machine is fastest at, as its runs do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Seconds

from bunny_lora import inference
from bunny_lora.core.sections import LoRASection
from bunny_lora.model import adapters, components, devices
from bunny_lora.model.fast import drawing

PROMPT = "ellie, animated character, sitting, on the beach, at sunset, medium shot"
OURS = {"sampler": "dpm++-2m-karras", "num_inference_steps": 12}
OWN_DTYPE = devices.resolve_dtype("auto", torch.device("cpu"))
OURS_NAME = "ours: loaded before, LoRA merged, 12 steps of DPM++ 2M Karras"
FEW = {"the ancestor's, 2 steps": 2, "the ancestor's, 5 steps": 5}


def write_lora(base_model: str, folder: Path) -> Path:
    """Write a LoRA of the default shape that changes something."""
    parts = components.load_components(base_model, torch.device("cpu"), torch.float32)
    model = adapters.attach(parts.unet, "unet", LoRASection(), base_model=base_model, seed=1)
    for parameter in adapters.trainable_parameters(parts.unet).values():
        torch.nn.init.normal_(parameter, std=0.02)
    adapters.save_adapter(model, folder / "unet")
    return folder


def sides(base_model: str, lora: Path, resolution: int) -> dict[str, Callable[[], object]]:
    """Return what is compared, by name; each draws one picture and writes it."""
    size: dict[str, Any] = {"width": resolution, "height": resolution, "guidance_scale": 7.5}

    def draw(pipe: Any, **settings: Any) -> None:
        pipe = pipe or inference.load_lora_pipeline(base_model, lora, dtype=torch.float32)
        image = inference.generate_image(pipe, PROMPT, **size, **settings)
        inference.save_image(image, lora / "image.png")

    pipe = inference.load_lora_pipeline(base_model, lora, dtype=OWN_DTYPE)
    few = {name: partial(draw, None, reference=True, num_inference_steps=n) for name, n in FEW.items()}
    return few | {OURS_NAME: partial(draw, pipe, **OURS)}


def with_all_steps(times: dict[str, list[Seconds]]) -> dict[str, list[Seconds]]:
    """Return the ancestor's 50 steps, turn by turn from its two pictures of few, and ours."""
    (first, n_first), (second, n_second) = FEW.items()
    whole = []
    for short, longer in zip(times[first], times[second], strict=True):
        clocks = zip(short, longer, strict=True)
        step = [(b - a) / (n_second - n_first) for a, b in clocks]
        whole.append(Seconds(*(a + (50 - n_first) * s for a, s in zip(short, step, strict=True))))
    name = "the ancestor's defaults: loaded for each picture, float32, 50 steps, by calculation"
    return {name: whole, OURS_NAME: times[OURS_NAME]} | {name: times[name] for name in FEW}


def pieces(base_model: str, lora: Path, resolution: int) -> dict[str, Callable[[], object]]:
    """Return denoising with guidance and decoding, plain and on the fast path, and what that costs."""
    pipe = inference.load_lora_pipeline(base_model, lora, dtype=OWN_DTYPE)
    side = resolution // pipe.vae_scale_factor
    latents = torch.zeros(2, 4, side, side, dtype=OWN_DTYPE)
    words = torch.zeros(2, 77, pipe.unet.config.cross_attention_dim, dtype=OWN_DTYPE)

    @torch.no_grad()
    def denoise() -> None:
        pipe.unet(latents, 500, words)

    @torch.no_grad()
    def decode() -> None:
        pipe.vae.decode(latents[:1])

    def fast(work: Callable[[], None]) -> None:
        with torch.no_grad(), drawing.prepared(pipe, 1.0, resolution, resolution):
            work()

    return {
        "a step": denoise,
        "a step, fast path": partial(fast, denoise),
        "decoding": decode,
        "decoding, fast path": partial(fast, decode),
        "putting the fast path in and taking it out, part of both": partial(fast, lambda: None),
    }


def measure(base_model: str, resolution: int, repeats: int, root: Path) -> str:
    """Measure everything and return the section of docs/benchmarks.md."""
    load = os.getloadavg()[0]
    lora = write_lora(base_model, root / "lora")
    turns = measuring.take_turns(sides(base_model, lora, resolution), repeats, warm_up=False)
    whole = with_all_steps(turns)
    parts = measuring.take_turns(pieces(base_model, lora, resolution), repeats)
    denoising = {name: times for name, times in parts.items() if "step" in name}
    decoding = {name: times for name, times in parts.items() if name not in denoising}
    tables = [measuring.table(times, "each") for times in (whole, denoising, decoding)]
    facts = [
        f"{base_model} at {resolution} px, guidance (two images a call), LoRA of rank 8 on attention,"
        f" prompt to PNG; ours and the pieces in {OWN_DTYPE}".replace("torch.", ""),
        f"sides in turns, medians of {repeats}",
    ]
    return measuring.section("A picture", facts, "\n\n".join(tables), load)


def main() -> None:
    """Measure, print, and append to a file where one is named."""
    parser = measuring.arguments(__doc__, resolution=512, repeats=3)
    parser.add_argument("--quick", action="store_true", help="random-tiny at 64 px")
    options = parser.parse_args()
    small = ("random-tiny", 64) if options.quick else (options.base_model, options.resolution)
    with measuring.project() as root:
        text = measure(*small, options.repeats, root)
    measuring.report(text, options.append)


if __name__ == "__main__":
    main()
