"""Other programs as oracles: they read what we export, and must draw what diffusers draws.

    make readers

A model of BK-SDM-Tiny's shapes with random weights and CLIP's vocabulary, and random LoRAs of its UNet
and text encoder, are exported; each program draws one prompt with them. Where a program draws from the
same noise on the same schedule, the pictures are the same but for rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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
SHAPE = random_models.BK_SDM_TINY
# By the names of the exported files: attention alone, and every layer, convolutions too.
LORAS = {
    "lora": LoRASection(rank=4, alpha=8),
    "locon": LoRASection(rank=4, alpha=8, target_modules=["all"]),
}
# Mean over a picture, of 255: rounding stays below the first, what the LoRA changes above the second.
ALIKE, CHANGED = 0.25, 2.5


@dataclass(frozen=True)
class Files:
    """What the programs are given."""

    folder: Path
    size_px: int

    @property
    def base(self) -> Path:
        """A folder in diffusers' layout."""
        return self.folder / "base"

    @property
    def base_file(self) -> Path:
        """The same as one file."""
        return self.folder / "base.safetensors"

    @property
    def checkpoint(self) -> Path:
        """Base and LoRA as one file."""
        return self.folder / "lora" / "lora-checkpoint.safetensors"

    def weights(self, name: str) -> Path:
        """A LoRA as training leaves it."""
        return self.folder / "weights" / name

    def kohya(self, name: str) -> Path:
        """Kohya's file of it."""
        return self.folder / name / f"{name}.safetensors"

    def drawn(self, pipe: diffusers.StableDiffusionPipeline) -> Image.Image:
        """Draw with the sampler that stable-diffusion.cpp calls Euler with the discrete schedule."""
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="linspace"
        )
        return pipe(
            PROMPT,
            generator=torch.Generator("cpu").manual_seed(SEED),
            num_inference_steps=N_STEPS,
            guidance_scale=1.0,
            width=self.size_px,
            height=self.size_px,
        ).images[0]


@dataclass(frozen=True)
class Row:
    """What one program made of one file; `expected` is diffusers' on the weights that we hold."""

    program: str
    read: str
    image: Image.Image
    expected: str

    def difference(self, expected: Image.Image) -> tuple[float, int]:
        """Return mean and largest difference of the pictures, of 255."""
        apart = np.abs(np.asarray(self.image, float) - np.asarray(expected, float))
        return float(apart.mean()), int(apart.max())


def make_files(files: Files) -> None:
    """Write the model, its LoRAs and their exports, where they are not there from another time."""
    if not files.base_file.is_file():
        tokenizer = bpe.build_clip_tokenizer()
        pipe = random_models.build_pipeline(SHAPE, tokenizer=tokenizer).to(torch.float16)
        pipe.save_pretrained(files.base)
        save_file(ldm.state_dict(pipe), files.base_file, {"format": "pt"})
    for name, section in LORAS.items():
        if not files.kohya(name).is_file():
            save_random_lora(files, name, section)
            kinds = ["kohya", "checkpoint"] if name == "lora" else ["kohya"]
            out = files.kohya(name).parent
            export.export(files.weights(name), out, kinds=kinds, base_model=str(files.base))


def save_random_lora(files: Files, name: str, section: LoRASection) -> None:
    """Write one of both parts, as training leaves it."""
    base = str(files.base)
    parts = components.load_components(base, torch.device("cpu"), torch.float32)
    for part in adapters.PARTS:
        model = getattr(parts, part)
        handle = adapters.attach(model, part, section, base_model=base, seed=3)
        random = torch.Generator().manual_seed(1)
        for parameter_name, parameter in adapters.trainable_parameters(model).items():
            if "lora_B" in parameter_name:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
        adapters.save_adapter(handle, files.weights(name) / part)


def by_diffusers(files: Files) -> Iterator[Row]:
    """Draw with the kohya files as diffusers loads them."""
    for name in LORAS:
        pipe = inference.load_lora_pipeline(str(files.base))
        pipe.load_lora_weights(files.kohya(name))
        yield Row("diffusers", f"kohya file, {name}", files.drawn(pipe), name)


def by_lycoris(files: Files) -> Iterator[Row]:
    """Merge the kohya files as LyCORIS does for sd-scripts and A1111."""
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights

    # By default it names the time embedding of diffusers' UNet twice, and refuses its own names.
    LycorisNetworkKohya.apply_preset({"unet_target_name": []})
    for name in LORAS:
        pipe = inference.load_lora_pipeline(str(files.base))
        # sd-scripts knows CLIP as it was before transformers 5, with one module around it.
        text_encoder = torch.nn.Module()
        text_encoder.text_model = pipe.text_encoder
        network, state = create_network_from_weights(
            1.0, str(files.kohya(name)), pipe.vae, text_encoder, pipe.unet, for_inference=True
        )
        network.merge_to(text_encoder, pipe.unet, state, torch.float32, "cpu")
        yield Row("lycoris-lora", f"kohya file, {name}", files.drawn(pipe), name)


def by_stable_diffusion_cpp(files: Files) -> Iterator[Row]:
    """Draw with the model in one file, alone, with the kohya files, and with the LoRA merged in."""
    from stable_diffusion_cpp import StableDiffusion

    def draw(model: Path, lora: str | None = None) -> Image.Image:
        program = StableDiffusion(
            model_path=str(model),
            lora_model_dir=str(files.kohya(lora).parent) if lora else "",
            rng_type="cpu",
            sampler_rng_type="cpu",
            verbose=False,
        )
        [image] = program.generate_image(
            prompt=PROMPT + (f"<lora:{lora}:1>" if lora else ""),
            seed=SEED,
            width=files.size_px,
            height=files.size_px,
            sample_steps=N_STEPS,
            cfg_scale=1.0,
            sample_method="euler",
            scheduler="discrete",
        )
        return image.convert("RGB")

    program = "stable-diffusion-cpp-python"
    yield Row(program, "base model in one file", draw(files.base_file), "base")
    yield Row(program, "checkpoint, lora", draw(files.checkpoint), "lora")
    for name in LORAS:
        yield Row(program, f"kohya file, {name}, on it", draw(files.base_file, name), name)


READERS: dict[str, Callable[[Files], Iterator[Row]]] = {
    "diffusers": by_diffusers,
    "lycoris": by_lycoris,
    "stable_diffusion_cpp": by_stable_diffusion_cpp,
}


@quiet()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row a file; return 1 if a program draws something else, or a LoRA changes nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="a folder for files and pictures, to be used again")
    parser.add_argument("--size", type=int, default=SIZE_PX, help="of the pictures, in pixels")
    parser.add_argument("--only", choices=READERS, action="append", help="one program; repeatable")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = Files(folder, options.size)
        make_files(files)
        expected = {"base": files.drawn(inference.load_lora_pipeline(str(files.base)))}
        failed = False
        for name in LORAS:
            pipe = inference.load_lora_pipeline(str(files.base), files.weights(name))
            expected[name] = files.drawn(pipe)
            change, _ = Row("diffusers", name, expected[name], "base").difference(expected["base"])
            print(f"{name} changes the picture by {change:.2f} of 255 in the mean.", flush=True)
            failed |= change < CHANGED
        print("\n| program | version | what it read | mean difference | largest | CPU seconds |")
        print("|---|---|---|---|---|---|", flush=True)
        for name in options.only or READERS:
            try:
                failed |= not compare(READERS[name](files), expected, folder)
            except ImportError as error:
                print(f"| {name} | not installed: {error} | | | | |", flush=True)
                failed = True
    return int(failed)


def compare(rows: Iterator[Row], expected: dict[str, Image.Image], folder: Path) -> bool:
    """Print what a program read and how far its pictures are off; return whether all are alike."""
    alike = True
    began = time.process_time()
    for number, row in enumerate(rows):
        mean, largest = row.difference(expected[row.expected])
        version = metadata.version(row.program)
        seconds = time.process_time() - began
        figures = f"{mean:.3f} | {largest} | {seconds:.0f}"
        print(f"| {row.program} | {version} | {row.read} | {figures} |", flush=True)
        row.image.save(folder / f"{row.program}-{number}.png")
        alike &= mean <= ALIKE
        began = time.process_time()
    return alike


if __name__ == "__main__":
    sys.exit(main())
