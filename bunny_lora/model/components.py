"""The parts of a Stable Diffusion 1.x: loaded, frozen, placed; encoding and drawing with them.

The one place that knows the VAE's scaling factor, and the names of models that need no download.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from bunny_lora.core import files, paths
from bunny_lora.core.image_file import ImageSettings, add_metadata
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import (
    hub,
    kinds,
    offload,
    preview,
    random_models,
    samplers,
    single_file,
    variants,
)
from bunny_lora.model.fast import drawing
from bunny_lora.model.quiet import quiet

BUNNY_WORLD = "bunny-world"
WORLD_WEIGHTS = Path(__file__).parents[1] / "world" / "weights"
"""What the package brings: `sd/`, the pipeline that `base_model: bunny-world` names, and `clip/`."""


PART_CLASSES = {
    "unet": (UNet2DConditionModel, "torch_dtype"),
    "text_encoder": (CLIPTextModel, "dtype"),
    "vae": (AutoencoderKL, "torch_dtype"),
}


@dataclass
class Components:
    """The parts that training needs; all frozen and in eval mode until an adapter is attached."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    device: torch.device
    dtype: torch.dtype


def resolve_base_model(name: str) -> str:
    """Return the folder of a base model, which a hub's is downloaded to where it is not yet here.

    Random models are built where they are named for the first time.

    Raises:
        BunnyLoraError: there is no such folder, the hub's model could not be had, or it is no Stable
            Diffusion of the kind that is trained here.
    """
    folder = folder_here(name) or str(_from_hub(name))
    kinds.check(Path(folder), name)
    return folder


def base_commit(name: str) -> str | None:
    """Return the commit of a hub's model that its name stands for here; None of a folder."""
    return None if folder_here(name) else _from_hub(name).name


def base_identity(name: str) -> str | None:
    """Return what a base model is, whatever it is called: a hub's commit, the digest of a single file.

    None of a folder, whose weights speak for themselves.
    """
    folder = folder_here(name)
    digest = single_file.sha256(Path(folder)) if folder else None
    return f"sha256:{digest}" if digest else base_commit(name)


def folder_here(name: str) -> str | None:
    """Return the folder of a base model that needs no download.

    Random models are built and single files converted where they are named for the first time.
    """
    if name == BUNNY_WORLD:
        return str(WORLD_WEIGHTS / "sd")
    if name in random_models.RANDOM_MODELS:
        return str(random_models.random_model_folder(name))
    for folder in (paths.resolve(name), paths.expanded(name)):
        if (folder / "model_index.json").is_file():
            return str(folder.absolute())
        if files.is_file(folder):
            return str(single_file.converted(folder.absolute()))
    return None


def _from_hub(name: str) -> Path:
    if name.lower().endswith(single_file.SUFFIXES):
        raise model_not_loaded(name, BunnyLoraError("there is no such file."))
    if files.is_folder(paths.resolve(name)):
        reason = f"{paths.resolve(name)} has no model_index.json, as diffusers' layout has."
        raise model_not_loaded(name, BunnyLoraError(reason))
    try:
        return hub.local(name)
    except BunnyLoraError as error:
        raise model_not_loaded(name, error) from error


@quiet()
def _load(part: Any, base_model: str, subfolder: str, **kwargs: object) -> Any:
    try:
        return part.from_pretrained(resolve_base_model(base_model), subfolder=subfolder, **kwargs)
    except (NotImplementedError, OSError, ValueError) as error:
        raise model_not_loaded(base_model, error) from error


def model_not_loaded(base_model: str, error: Exception) -> BunnyLoraError:
    """Return the message for a base model that is neither here nor on the hub."""
    known = isinstance(error, BunnyLoraError)
    reason = str(error).strip() if known else str(error).strip().splitlines()[0][:200]
    return BunnyLoraError(
        f"Could not load the base model {base_model}: {reason}\n"
        "base_model takes a folder in diffusers' layout, a .safetensors file of Stable Diffusion 1.x,"
        " the name of a hub repository (for example nota-ai/bk-sdm-tiny, 2 GB, fetched once by"
        " `bunny-lora download nota-ai/bk-sdm-tiny`), or,"
        f" with no download, {BUNNY_WORLD} (a cartoon world of its own, at 128 px) or"
        f" {' or '.join(random_models.RANDOM_MODELS)} (random weights: they draw noise)."
    )


def load_tokenizer(base_model: str) -> CLIPTokenizer:
    """Load the tokenizer alone; it takes no weights.

    Raises:
        BunnyLoraError: there is no such model here, and none could be had from the hub.
    """
    tokenizer = _load(CLIPTokenizer, base_model, "tokenizer")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # transformers 5 makes an empty one of files that it cannot find, and says nothing.
        raise model_not_loaded(base_model, OSError("there are no tokenizer files"))
    return tokenizer


def load_noise_scheduler(base_model: str) -> DDPMScheduler:
    """Load the training schedule with the model's own betas and prediction type."""
    return _load(DDPMScheduler, base_model, "scheduler")


@quiet()
def sampler_name(base_model: str, wanted: str = samplers.OWN) -> str:
    """Return what a sampler is recorded as, see `samplers.recorded`; the model's own as its class."""
    if wanted != samplers.OWN:
        return samplers.recorded(wanted)
    config = DDPMScheduler.load_config(resolve_base_model(base_model), subfolder="scheduler")
    return str(config["_class_name"])


def load_components(base_model: str, device: torch.device, dtype: torch.dtype) -> Components:
    """Load all parts of a base model, frozen, in `dtype` on `device`.

    Raises:
        BunnyLoraError: there is no such model here, and none could be had from the hub.
    """
    variants.tell(base_model, variants.variants(Path(resolve_base_model(base_model))))
    # The largest first: files in full precision take twice what is kept, while they are read.
    models = {part: load_part(base_model, part, device, dtype) for part in PART_CLASSES}
    return Components(
        tokenizer=load_tokenizer(base_model),
        noise_scheduler=load_noise_scheduler(base_model),
        device=device,
        dtype=dtype,
        **models,
    )


def load_part(base_model: str, part: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load "unet", "text_encoder" or "vae" alone, frozen, in `dtype` on `device`.

    Raises:
        BunnyLoraError: there is no such model here, and none could be had from the hub.
    """
    model, dtype_key = PART_CLASSES[part]
    variant = variants.variants(Path(resolve_base_model(base_model)))[part]
    loaded = _load(model, base_model, part, variant=variant, **{dtype_key: dtype})
    return loaded.requires_grad_(False).eval().to(device)


def load_vae(base_model: str, device: torch.device) -> AutoencoderKL:
    """Load the autoencoder alone, frozen, in full precision.

    Raises:
        BunnyLoraError: there is no such model here, and none could be had from the hub.
    """
    return load_part(base_model, "vae", device, torch.float32)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, image: Image.Image) -> Image.Image:
    """Return an image as the autoencoder gives it back: the best that its model can draw."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = vae.encode(pixels.to(vae.device)).latent_dist.mean
    decoded = vae.decode(latents).sample[0].cpu()
    array = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the scaled latents, float32 [N, 4, H/8, W/8] each.

    Args:
        vae: the encoder; its dtype and device are used.
        pixel_values: [N, 3, H, W] in [-1, 1].
    """
    distribution = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return distribution.mean.float() * scale, distribution.std.float() * scale


@quiet()
def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Return token ids, int64 [N, model_max_length], padded and truncated as Stable Diffusion does."""
    encoded = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return encoded.input_ids


def encode_prompts(components: Components, captions: Sequence[str]) -> torch.Tensor:
    """Return encoder_hidden_states [N, model_max_length, cross_attention_dim]; gradients flow."""
    input_ids = tokenize(components.tokenizer, captions).to(components.device)
    return components.text_encoder(input_ids)[0]


@quiet()
def pipeline_from(components: Components, base_model: str) -> diffusers.StableDiffusionPipeline:
    """Return a pipeline around parts that are already in memory, with the model's own sampler."""
    source = resolve_base_model(base_model)
    try:
        return diffusers.StableDiffusionPipeline.from_pretrained(
            source,
            tokenizer=components.tokenizer,
            text_encoder=components.text_encoder,
            vae=components.vae,
            unet=components.unet,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise model_not_loaded(base_model, error) from error


@quiet()
def save_model(model: Any, folder: Path) -> None:
    """Write a model or a pipeline as its library does, but for the folder that it was loaded from."""
    model.save_pretrained(folder)
    for path in folder.rglob("*.json"):
        content = files.read_json(path)
        if isinstance(content, dict) and "_name_or_path" in content:
            files.write_json(
                path, {key: value for key, value in content.items() if key != "_name_or_path"}
            )


def generate(
    pipe: diffusers.StableDiffusionPipeline,
    settings: ImageSettings,
    on_step: Callable[[int], None] | None = None,
) -> Image.Image:
    """Draw one image that depends on its settings and the weights alone; it carries them in its `info`.

    The seed means what it means to diffusers' users: `torch.Generator("cpu").manual_seed(seed)`.
    `lora_scale` multiplies the adapters' alpha / rank in UNet and text encoder; 0 is the base model.
    On the path "reference" nothing here differs from diffusers alone, to the bit. `on_step` is told
    each denoising step that is done, from 1.
    """
    with quiet(), _way(pipe, settings):
        return _generate(pipe, settings, on_step)


def generate_together(
    pipes: Sequence[diffusers.StableDiffusionPipeline], wanted: Sequence[ImageSettings]
) -> list[Image.Image]:
    """Draw images at the same time, each as `generate` draws it on one thread.

    Args:
        pipes: from `drawing.twins`, at least as many as images; one alone draws with all threads.
        wanted: images of one LoRA scale and one path.
    """
    if len(pipes) == 1:
        return [generate(pipes[0], settings) for settings in wanted]
    for part in (pipes[0].vae, pipes[0].unet, pipes[0].text_encoder):
        offload.onload(part)  # Here, since two threads would bring it back at once.
    with contextlib.ExitStack() as ways:
        ways.enter_context(quiet())
        ways.enter_context(_way(pipes[0], wanted[0]))
        ways.enter_context(drawing.threads(1))
        pool = ways.enter_context(ThreadPoolExecutor(len(wanted), initializer=_one_thread))
        return list(pool.map(_generate, pipes, wanted))


def _one_thread() -> None:
    torch.set_num_threads(1)  # Each thread of Python has a number of its own.


def _way(
    pipe: diffusers.StableDiffusionPipeline, settings: ImageSettings
) -> contextlib.AbstractContextManager[None]:
    """Return what changes a pipeline's models for as long as it draws."""
    if settings.path == "fast":
        return drawing.prepared(pipe, settings.lora_scale, settings.width, settings.height)
    return contextlib.nullcontext()


@torch.no_grad()
def _generate(
    pipe: diffusers.StableDiffusionPipeline,
    settings: ImageSettings,
    on_step: Callable[[int], None] | None = None,
) -> Image.Image:
    pipe.set_progress_bar_config(disable=True)
    as_adapter = settings.path == "reference" and settings.lora_scale != 1
    with samplers.used(pipe, settings.sampler), preview.used(pipe, settings.decoder):
        result = pipe(
            settings.prompt,
            generator=torch.Generator("cpu").manual_seed(settings.seed),
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            negative_prompt=settings.negative_prompt,
            width=settings.width,
            height=settings.height,
            cross_attention_kwargs={"scale": settings.lora_scale} if as_adapter else None,
            callback_on_step_end=_telling(on_step) if on_step else None,
        )
    image = result.images[0]
    if image.getbbox() is None:  # What is no number becomes 0.
        print(
            f"All black, so the model computed values that are no numbers: {settings.prompt!r}, seed"
            f" {settings.seed}. Draw it again, and if it stays so with training.mixed_precision: no"
        )
    return add_metadata(image, settings.model_dump())


def _telling(on_step: Callable[[int], None]) -> Callable[..., dict[str, Any]]:
    """Return what diffusers calls after each step; it hands back what it may change, unchanged."""

    def tell(_: Any, place: int, __: Any, changeable: dict[str, Any]) -> dict[str, Any]:
        on_step(place + 1)
        return changeable

    return tell
