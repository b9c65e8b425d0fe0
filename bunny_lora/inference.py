"""Pictures from a base model and a trained LoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bunny_lora.config import load_config
from bunny_lora.core import files, paths
from bunny_lora.core.values import with_revision
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, components, devices, formats
from bunny_lora.training.handover import HANDOVER, read_handover

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ON_THE_HUB = re.compile(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.ckpt)(@.+)?")


def load_lora_pipeline(
    base_model: str | None = None,
    lora_weights_dir: str | Path | Mapping[Any, float] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> StableDiffusionPipeline:
    """Return a pipeline that draws with a trained LoRA, with several, or with the base model alone.

    Args:
        base_model: folder, hub repository or stand-in; None reads it from the run that the weights
            belong to.
        lora_weights_dir: `…/final` or `…/checkpoint-<step>`, a run folder (its `final`), or a
            `.safetensors` file of diffusers or kohya; several as `{path: weight}`; None loads no LoRA.
        device: "cpu", "cuda" or "auto".
        dtype: precision of the base weights; None is the run's own, float32 without a run.

    Raises:
        BunnyLoraError: no such model or weights, or they do not belong together.
    """
    given = {} if lora_weights_dir is None else lora_weights_dir
    weights = dict(given) if isinstance(given, Mapping) else {given: 1.0}
    found = find_loras(weights.items())
    first = next(iter(found), None)
    place = devices.resolve_device(device)
    if dtype is None:
        dtype = run_dtype(first, place)
    base_model = base_model or recorded_base_model(first)
    parts = components.load_components(base_model, place, dtype)
    if found:
        models = {part: getattr(parts, part) for part in formats.PARTS}
        loras = [(formats.read_lora(path, models), weight) for path, weight in found.items()]
        for part, modules in formats.combined(loras).items():
            adapters.attach_modules(models[part], modules)
    return components.pipeline_from(parts, base_model)


def find_loras(named: Iterable[tuple[str | Path, float]]) -> dict[Path, float]:
    """Return what holds each LoRA (`adapters.find_weights`) and how strongly it counts.

    Raises:
        BunnyLoraError: there is none, or one is named twice.
    """
    found: dict[Path, float] = {}
    for name, weight in named:
        path = adapters.find_weights(name)
        if path.resolve() in {known.resolve() for known in found}:
            raise BunnyLoraError(
                f"The LoRA in {path} is named twice; name it once, with the sum of the weights."
            )
        found[path] = weight
    return found


def load_run(run_dir: str | Path, device: str = "cpu") -> StableDiffusionPipeline:
    """Return a pipeline that draws as a finished run recommends: `load_run("outputs/lora_weights")`.

    Everything comes from the run's `handover.json`; its `recommended` steps and size are for the caller
    to pass on, see `handover.read_handover`.

    Raises:
        BunnyLoraError: no run there, or its weights are not those that it was handed over with.
    """
    told = read_handover(run_dir)
    weights_dir = paths.resolve(run_dir) / told.weights
    if adapters.adapter_digest(weights_dir) != told.weights_sha256:
        raise BunnyLoraError(
            f"The weights in {weights_dir} are not those that {HANDOVER} was written for; run"
            " `bunny-lora train` again to write it anew."
        )
    weights = {weights_dir: told.recommended.lora_scale}
    return load_lora_pipeline(with_revision(told.base_model, told.base_revision), weights, device)


def run_folder(weights: Path | None) -> Path | None:
    """Return the run that weights lie in: `…/final`, `…/checkpoint-100`, or one part of them."""
    if weights is None:
        return None
    folder = weights.parent if weights.name not in formats.PARTS else weights.parent.parent
    return folder if weights.is_dir() and (folder / "config.yaml").is_file() else None


def recorded_base_model(weights: Path | None) -> str:
    """Return the base model that a LoRA was trained on.

    Args:
        weights: from `adapters.find_weights`.

    Raises:
        BunnyLoraError: it is recorded nowhere, or what is recorded is no model's name.
    """
    advice = "name it: base_model=… or --base-model"
    if weights is None:
        raise BunnyLoraError(f"There is no LoRA that records a base model; {advice}.")
    if run := run_folder(weights):
        return load_config(run / "config.yaml").base_model
    name = formats.recorded_base(weights)
    if not name:
        raise BunnyLoraError(f"{weights} does not record the base model it was trained on; {advice}.")
    # Other trainers record the name of a file that only they had.
    if weights.is_file() and not (ON_THE_HUB.fullmatch(name) or _is_here(name)):
        raise BunnyLoraError(
            f"{weights} was trained on {name!r}, which is no folder here and no name on the hub;"
            f" {advice}."
        )
    return name


def _is_here(name: str) -> bool:
    try:
        return components.folder_here(name) is not None
    except (OSError, RuntimeError):  # no name that a folder can have
        return False


def run_dtype(weights: Path | None, device: torch.device) -> torch.dtype:
    """Return the precision that a run was trained in, so that its pictures match its samples."""
    run = run_folder(weights)
    if run is None:
        return torch.float32
    training = load_config(run / "config.yaml").training
    return devices.resolve_dtype(training.mixed_precision, device)


def generate_image(
    pipe: StableDiffusionPipeline,
    prompt: str,
    *,
    seed: int = 42,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    lora_scale: float = 1.0,
) -> Image.Image:
    """Draw one picture; its `info` carries prompt, seed and settings, and `save_image` keeps them.

    Args:
        pipe: from `load_lora_pipeline`.
        prompt: what to draw.
        seed: the same seed gives the same picture, alone or among others; as in diffusers,
            `torch.Generator("cpu").manual_seed(seed)`.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance, https://arxiv.org/abs/2207.12598; 1 and below is off.
        negative_prompt: what to steer away from.
        width: pixels, a multiple of 8; None is the model's own size.
        height: likewise.
        lora_scale: strength of the adapter, 0 (the base model) to 1 (as trained) and beyond.

    Raises:
        BunnyLoraError: width or height is no positive multiple of 8, or the seed no 64-bit number.
    """
    native = pipe.unet.config.sample_size * pipe.vae_scale_factor
    width, height = native if width is None else width, native if height is None else height
    _refuse_impossible(width, height, seed)
    prompt = prompt.encode("utf-8", "replace").decode()  # A command line may hold bytes of no text.
    settings: dict[str, Any] = {
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "width": width,
        "height": height,
        "negative_prompt": negative_prompt,
        "lora_scale": lora_scale,
    }
    image = components.draw_image(pipe, prompt, **settings)
    image.info["parameters"] = json.dumps({"prompt": prompt} | settings, ensure_ascii=False)
    return image


def _refuse_impossible(width: int, height: int, seed: int) -> None:
    if width % 8 or height % 8 or min(width, height) < 8:
        raise BunnyLoraError(
            f"{width} x {height} pixels cannot be drawn: width and height must be multiples of 8."
        )
    if not 0 <= seed < 2**64:
        raise BunnyLoraError(f"seed {seed} cannot be used: it must be from 0 to 2^64 - 1.")


def generate_images(
    pipe: StableDiffusionPipeline, prompts: Iterable[str], seeds: Iterable[int], **settings: Any
) -> Iterable[Image.Image]:
    """Yield every prompt with every seed, prompts first; settings as for `generate_image`."""
    seeds = list(seeds)
    for prompt in prompts:
        for seed in seeds:
            yield generate_image(pipe, prompt, seed=seed, **settings)


def told(image: Image.Image, more: Mapping[str, Any]) -> Image.Image:
    """Have an image of `generate_image` tell more of what made it; returns the image."""
    made = json.loads(image.info["parameters"]) | dict(more)
    image.info["parameters"] = json.dumps(made, ensure_ascii=False)
    return image


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically, with the picture's settings in its `parameters` text."""
    metadata = PngInfo()
    if "parameters" in image.info:
        # A prompt from a command line may hold bytes that are no text.
        text = image.info["parameters"].encode("utf-8", "replace").decode()
        metadata.add_itxt("parameters", text)
    with files.atomic_path(path) as part:
        image.save(part, format="PNG", pnginfo=metadata)


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings that `save_image` put into a PNG; None of any other file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # The text may follow the pixels.
            settings = json.loads(image.info["parameters"])
    except Exception:  # Pillow's decoders raise whatever they trip over.
        return None
    return settings if isinstance(settings, dict) else None
