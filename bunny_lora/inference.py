"""Pictures from a base model and a trained LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from bunny_lora.config import load_config
from bunny_lora.core import paths
from bunny_lora.core.image_file import image_settings, save_image
from bunny_lora.core.values import with_revision
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, components, devices, formats, samplers
from bunny_lora.training.handover import (
    HANDOVER,
    Recommended,
    chosen_weights,
    read_handover,
    recommended_by,
    recorded_precision,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = [
    "default_settings",
    "generate_image",
    "generate_images",
    "load_lora_pipeline",
    "load_run",
    "recommended",
    "save_image",
]

REFERENCE_STEPS = 50
ON_THE_HUB = re.compile(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.ckpt)(@.+)?")


def load_lora_pipeline(
    base_model: str | None = None,
    lora_weights_dir: str | Path | Mapping[Any, float] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> StableDiffusionPipeline:
    """Return a pipeline that draws with a trained LoRA, with several, or with the base model alone.

    Args:
        base_model: folder, hub repository or random model; None reads it from the run that the weights
            belong to.
        lora_weights_dir: `…/final` or `…/checkpoint-<step>`, a run folder (see `handed_on`), or a
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
    pipe = components.pipeline_from(parts, base_model)
    pipe.recommended = recommended(first)
    if pipe.recommended and len(found) > 1:  # each has its own weight already
        pipe.recommended = pipe.recommended.model_copy(update={"lora_scale": 1.0})
    return pipe


def find_loras(named: Iterable[tuple[str | Path, float]]) -> dict[Path, float]:
    """Return what holds each LoRA (`adapters.find_weights`) and how strongly it counts.

    Raises:
        BunnyLoraError: there is none, or one is named twice.
    """
    found: dict[Path, float] = {}
    for name, weight in named:
        path = adapters.find_weights(handed_on(name))
        if path.resolve() in {known.resolve() for known in found}:
            raise BunnyLoraError(
                f"The LoRA in {path} is named twice; name it once, with the sum of the weights."
            )
        found[path] = weight
    return found


def handed_on(name: str | Path) -> str | Path:
    """Return the weights that a run's folder stands for: those that were chosen; else the same name."""
    folder = paths.expanded(name) if paths.expanded(name).exists() else paths.resolve(name)
    is_run = (folder / HANDOVER).is_file() and (folder / "final").is_dir()
    return chosen_weights(folder) if is_run else name


def load_run(run_dir: str | Path, device: str = "cpu") -> StableDiffusionPipeline:
    """Return a pipeline that draws as a finished run recommends: `load_run("outputs/lora_weights")`.

    Everything comes from the run's `handover.json`, its `recommended` steps, guidance and size too.

    Raises:
        BunnyLoraError: no run there, or its weights are not those that it was handed over with.
    """
    handover = read_handover(run_dir)
    weights_dir = paths.resolve(run_dir) / handover.weights
    if adapters.adapter_digest(weights_dir) != handover.weights_sha256:
        raise BunnyLoraError(
            f"The weights in {weights_dir} are not those that {HANDOVER} was written for; run"
            " `bunny-lora train` again to write it anew."
        )
    return load_lora_pipeline(
        with_revision(handover.base_model, handover.base_revision), weights_dir, device
    )


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
    except (OSError, BunnyLoraError):  # no name that a folder can have
        return False


def run_dtype(weights: Path | None, device: torch.device) -> torch.dtype:
    """Return the precision that a run was trained in, so that its images match its samples.

    A run that recorded none is of before records: its configuration is resolved on this machine.
    float16 is for GPUs alone: on a CPU such a run draws in float32, and that is said.
    """
    run = run_folder(weights)
    if weights is None or run is None:
        return torch.float32
    if recorded := recorded_precision(run, weights):
        dtype = getattr(torch, recorded)
    else:
        dtype = devices.resolve_dtype(load_config(run / "config.yaml").training.mixed_precision, device)
    if dtype == torch.float16 and device.type == "cpu":
        print("This run was trained in float16, which a CPU cannot well draw in: drawn in float32.")
        return torch.float32
    return dtype


def recommended(weights: Path | None) -> Recommended | None:
    """Return how the run of some weights is to be drawn with; None where nobody says so.

    A finished run says it in `handover.json`, one that is still training in its `config.yaml`.

    Raises:
        BunnyLoraError: one of these files is damaged.
    """
    run = run_folder(weights)
    if run is None:
        return None
    if (run / HANDOVER).is_file():
        return read_handover(run).recommended
    return recommended_by(load_config(run / "config.yaml"))


def generate_image(
    pipe: StableDiffusionPipeline,
    prompt: str,
    *,
    seed: int = 42,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    lora_scale: float | None = None,
    sampler: str | None = None,
    reference: bool = False,
) -> Image.Image:
    """Draw one image; its `info` carries prompt, seed and settings, and `save_image` keeps them.

    What is None is as the run of the weights recommends, or else diffusers' usual.

    Args:
        pipe: from `load_lora_pipeline`.
        prompt: what to draw.
        seed: the same seed gives the same image, alone or among others; as in diffusers,
            `torch.Generator("cpu").manual_seed(seed)`.
        num_inference_steps: denoising steps; else 25.
        guidance_scale: classifier-free guidance, https://arxiv.org/abs/2207.12598; 1 and below is off;
            else 7.5.
        negative_prompt: what to steer away from.
        width: pixels, a multiple of 8; else the model's own size.
        height: likewise.
        lora_scale: strength of the adapter, 0 (the base model) to 1 (as trained) and beyond; else 1.
        sampler: as in `sampling.sampler` of a configuration; else the model's own.
        reference: draw to the bit what diffusers and peft alone draw, with the model's own sampler.

    Raises:
        BunnyLoraError: a setting is out of range, or unknown.
    """
    given = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "width": width,
        "height": height,
        "lora_scale": lora_scale,
        "sampler": sampler,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    settings = settings_with(pipe, reference=reference, **overrides)
    return components.generate(
        pipe, image_settings(**settings, prompt=prompt, seed=seed, negative_prompt=negative_prompt)
    )


def settings_with(
    pipe: StableDiffusionPipeline, *, reference: bool = False, **overrides: Any
) -> dict[str, Any]:
    """Return a pipeline's `default_settings` with those that are named, and which path draws.

    The reference has the model's own sampler, and diffusers' usual 50 steps where others are
    recommended for another sampler.

    Raises:
        BunnyLoraError: the reference is to be drawn with another sampler.
    """
    own, settings = type(pipe.scheduler).__name__, default_settings(pipe)
    if (named := overrides.get("sampler")) is not None:
        overrides["sampler"] = own if named == samplers.OWN else samplers.recorded(named)
    if not reference:
        return settings | overrides
    if overrides.setdefault("sampler", own) != own:
        raise BunnyLoraError(
            f"The reference is drawn with the model's own sampler, {own}: leave out {named}, or the"
            " reference."
        )
    if settings["sampler"] != own:
        overrides.setdefault("num_inference_steps", REFERENCE_STEPS)
    return settings | overrides | {"path": "reference"}


def default_settings(pipe: StableDiffusionPipeline) -> dict[str, Any]:
    """Return how a pipeline draws unless told otherwise: as its run recommends, see `recommended`."""
    native = pipe.unet.config.sample_size * pipe.vae_scale_factor
    usual = Recommended(
        lora_scale=1.0,
        num_inference_steps=25,
        guidance_scale=7.5,
        width=native,
        height=native,
        sampler=type(pipe.scheduler).__name__,
    )
    return (getattr(pipe, "recommended", None) or usual).settings()


def generate_images(
    pipe: StableDiffusionPipeline, prompts: Iterable[str], seeds: Iterable[int], **settings: Any
) -> Iterable[Image.Image]:
    """Yield every prompt with every seed, prompts first; settings as for `generate_image`."""
    seeds = list(seeds)
    for prompt in prompts:
        for seed in seeds:
            yield generate_image(pipe, prompt, seed=seed, **settings)
