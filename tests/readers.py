"""Other programs as oracles: they read what we export, and must draw what diffusers draws.

    make readers

A model of BK-SDM-Tiny's shapes with random weights and CLIP's vocabulary, and a random LoRA of its UNet
and text encoder, are exported; each program draws one prompt with them. Where a program draws from the
same noise on the same schedule, the pictures are the same but for rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from bunny_lora import export, inference
from bunny_lora.config import LoRASection
from bunny_lora.model import adapters, bpe, components, ldm, random_models
from bunny_lora.model.quiet import quiet

PROMPT, SEED, SIZE_PX, N_STEPS = "a purple bunny with a red bow, waving", 7, 256, 4
# Mean over a picture, of 255: rounding stays below the first, what the LoRA changes above the second.
ALIKE, CHANGED = 0.25, 2.5


@dataclass(frozen=True)
class Files:
    """What the programs are given."""

    base: Path  # a folder in diffusers' layout
    base_file: Path  # the same as one file
    lora: Path  # kohya's file
    checkpoint: Path  # base and LoRA as one file


@dataclass(frozen=True)
class Row:
    """What one program made of one file, against diffusers on the weights that we hold."""

    program: str
    read: str
    image: Image.Image
    expected: Image.Image

    def difference(self) -> tuple[float, int]:
        """Return mean and largest difference of the pictures, of 255."""
        apart = np.abs(np.asarray(self.image, float) - np.asarray(self.expected, float))
        return float(apart.mean()), int(apart.max())

    def __str__(self) -> str:
        mean, largest = self.difference()
        version = metadata.version(self.program)
        return f"| {self.program} | {version} | {self.read} | {mean:.3f} | {largest} |"


def make_files(folder: Path) -> Files:
    """Write the model, its LoRA and their exports."""
    tokenizer = bpe.build_clip_tokenizer()
    pipe = random_models.build_pipeline(random_models.BK_SDM_TINY, tokenizer=tokenizer)
    pipe.to(torch.float16).save_pretrained(folder / "base")
    save_file(ldm.state_dict(pipe), folder / "base.safetensors", {"format": "pt"})
    base = str(folder / "base")
    parts = components.load_components(base, torch.device("cpu"), torch.float32)
    for part in adapters.PARTS:
        model = getattr(parts, part)
        handle = adapters.attach(model, part, LoRASection(rank=4, alpha=8), base_model=base, seed=3)
        random = torch.Generator().manual_seed(1)
        for name, parameter in adapters.trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
        adapters.save_adapter(handle, folder / "lora" / part)
    export.export(folder / "lora", folder / "out", kinds=["kohya", "checkpoint"], base_model=base)
    return Files(
        folder / "base",
        folder / "base.safetensors",
        folder / "out" / "lora.safetensors",
        folder / "out" / "lora-checkpoint.safetensors",
    )


def drawn(pipe: diffusers.StableDiffusionPipeline) -> Image.Image:
    """Draw with the sampler that stable-diffusion.cpp calls Euler with the discrete schedule."""
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="linspace"
    )
    return components.generate(
        pipe,
        PROMPT,
        seed=SEED,
        num_inference_steps=N_STEPS,
        guidance_scale=1.0,
        width=SIZE_PX,
        height=SIZE_PX,
    )


def by_diffusers(files: Files, expected: dict[str, Image.Image]) -> Iterator[Row]:
    """Draw with the kohya file as diffusers loads it."""
    pipe = inference.load_lora_pipeline(str(files.base))
    pipe.load_lora_weights(files.lora)
    yield Row("diffusers", "kohya file", drawn(pipe), expected["lora"])


def by_lycoris(files: Files, expected: dict[str, Image.Image]) -> Iterator[Row]:
    """Merge the kohya file as LyCORIS does for sd-scripts and A1111."""
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights

    # By default it names the time embedding of diffusers' UNet twice, and refuses its own names.
    LycorisNetworkKohya.apply_preset({"unet_target_name": []})
    pipe = inference.load_lora_pipeline(str(files.base))
    # sd-scripts knows CLIP as it was before transformers 5, with one module around it.
    text_encoder = torch.nn.Module()
    text_encoder.text_model = pipe.text_encoder
    network, state = create_network_from_weights(
        1.0, str(files.lora), pipe.vae, text_encoder, pipe.unet, for_inference=True
    )
    network.merge_to(text_encoder, pipe.unet, state, torch.float32, "cpu")
    yield Row("lycoris-lora", "kohya file", drawn(pipe), expected["lora"])


def by_stable_diffusion_cpp(files: Files, expected: dict[str, Image.Image]) -> Iterator[Row]:
    """Draw with the model in one file, alone, with the kohya file, and with the LoRA merged in."""
    from stable_diffusion_cpp import StableDiffusion

    def draw(model: Path, prompt: str) -> Image.Image:
        program = StableDiffusion(
            model_path=str(model),
            lora_model_dir=str(files.lora.parent),
            rng_type="cpu",
            sampler_rng_type="cpu",
            verbose=False,
        )
        [image] = program.generate_image(
            prompt=prompt,
            seed=SEED,
            width=SIZE_PX,
            height=SIZE_PX,
            sample_steps=N_STEPS,
            cfg_scale=1.0,
            sample_method="euler",
            scheduler="discrete",
        )
        return image.convert("RGB")

    name = "stable-diffusion-cpp-python"
    with_lora = f"{PROMPT}<lora:{files.lora.stem}:1>"
    yield Row(name, "base model in one file", draw(files.base_file, PROMPT), expected["base"])
    yield Row(name, "kohya file on it", draw(files.base_file, with_lora), expected["lora"])
    yield Row(name, "checkpoint", draw(files.checkpoint, PROMPT), expected["lora"])


READERS: dict[str, Callable[[Files, dict[str, Image.Image]], Iterator[Row]]] = {
    "diffusers": by_diffusers,
    "lycoris": by_lycoris,
    "stable_diffusion_cpp": by_stable_diffusion_cpp,
}


@quiet()
def main() -> int:
    """Print a row a file; return 1 if a program draws something else, or the LoRA changes nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="a folder for files and pictures")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = make_files(folder)
        expected = {
            "base": drawn(inference.load_lora_pipeline(str(files.base))),
            "lora": drawn(inference.load_lora_pipeline(str(files.base), folder / "lora")),
        }
        change, _ = Row("diffusers", "", expected["lora"], expected["base"]).difference()
        print(f"The LoRA changes the picture by {change:.2f} of 255 in the mean.\n")
        print("| program | version | what it read | mean difference | largest |\n|---|---|---|---|---|")
        failed = change < CHANGED
        for name, reader in READERS.items():
            try:
                for number, row in enumerate(reader(files, expected)):
                    print(row, flush=True)
                    row.image.save(folder / f"{name}-{number}.png")
                    failed |= row.difference()[0] > ALIKE
            except ImportError as error:
                print(f"| {name} | not installed: {error} | | | |")
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
