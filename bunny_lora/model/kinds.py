"""Which model a folder in diffusers' layout holds, told by its configuration files alone.

What is trained and drawn with here is Stable Diffusion as 1.x and 2.x have it: a UNet that takes four
latent channels, a time and what one CLIP says of a text, no more. All else is refused by its name
before any weight is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers

from bunny_lora.core import files
from bunny_lora.errors import BunnyLoraError

TAKES = "base_model takes Stable Diffusion 1.x or 2.x, from text to image: nota-ai/bk-sdm-tiny, for one"
CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
)
# What is in the name of a pipeline's class, and what people call the model.
FAMILIES = {
    "XL": "a Stable Diffusion XL (SDXL)",
    "StableDiffusion3": "a Stable Diffusion 3",
    "Flux": "a Flux",
}
# What a UNet takes beside the four channels of the latents.
CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "a model that edits images, as InstructPix2Pix does",
    9: "an inpainting model",
}
# Inputs of a UNet beside latents, time and text, by the key that asks for them.
CONDITIONS = {
    "addition_embed_type": "a model with further conditions, as Stable Diffusion XL (SDXL) has them",
    "class_embed_type": "a model with further conditions, as unCLIP has them",
    "num_class_embeds": "a model with further conditions, as upscalers have them",
    "encoder_hid_dim_type": "a model with another kind of text, as Kandinsky and DeepFloyd have it",
    "time_cond_proj_dim": "a latent consistency model, distilled to draw in few steps",
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SD2_WIDTH = 1024  # of what its text encoder gives; 768 in 1.x

Json = dict[str, Any]


def check(folder: Path, name: str) -> None:
    """Refuse a base model of another kind, by what it is.

    Args:
        folder: in diffusers' layout; its configuration files are enough.
        name: what the user calls it.

    Raises:
        BunnyLoraError: it is none that can be trained, or a configuration file is no JSON.
    """
    for other in (_by_parts, _by_unet, _by_text, _by_vae, _by_schedule):
        if kind := other(folder):
            raise BunnyLoraError(f"{name} is {kind}. {TAKES}.")


def is_sd2(folder: Path) -> bool:
    """Whether a model has the text encoder of Stable Diffusion 2.x."""
    return _config(folder, "text_encoder").get("hidden_size") == SD2_WIDTH


def prediction_type(folder: Path) -> str:
    """Return what the UNet predicts: "epsilon", "v_prediction" or "sample"."""
    return _config(folder, "scheduler").get("prediction_type", "epsilon")


def _config(folder: Path, part: str) -> Json:
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    return _json(path)


def _json(path: Path) -> Json:
    """Return a configuration; an empty one for a file that is not there, which loading tells of."""
    content = files.read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _by_parts(folder: Path) -> str | None:
    index = _json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    called = next((name for word, name in FAMILIES.items() if word in pipeline), "another model")
    called += f" ({pipeline})"
    text_encoder = (index.get("text_encoder") or [None, None])[1]
    if (folder / "transformer").is_dir() or (index.get("transformer") or [None])[0]:
        return f"{called}, with a transformer where Stable Diffusion has a UNet"
    if (index.get("text_encoder_2") or [None])[0]:
        return f"{called}, with a second text encoder"
    if text_encoder not in (None, "CLIPTextModel"):
        return f"{called}, whose text encoder is a {text_encoder}"
    return None


def _by_unet(folder: Path) -> str | None:
    unet = _config(folder, "unet")
    n_in, n_out = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if (kind := unet.get("_class_name", "UNet2DConditionModel")) != "UNet2DConditionModel":
        return f"another model: its UNet is a {kind}"
    if (n_in, n_out) != (4, 4):
        called = CHANNELS.get(n_in, "another model")
        return f"{called}: its UNet takes {n_in} channels and gives {n_out}, where plain ones have 4"
    for key, called in CONDITIONS.items():
        if unet.get(key) is not None:
            return f"{called} (its UNet has {key}: {unet[key]})"
    return None


def _by_text(folder: Path) -> str | None:
    width, asked = (
        _config(folder, "text_encoder").get("hidden_size"),
        _config(folder, "unet").get("cross_attention_dim"),
    )
    if None in (width, asked) or asked == width or set(_listed(asked)) == {width}:
        return None
    return (
        f"put together from parts of different models: its UNet takes text {asked} wide"
        f" (cross_attention_dim), and its text encoder gives {width} (hidden_size)"
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _by_vae(folder: Path) -> str | None:
    vae = _config(folder, "vae")
    if (kind := vae.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        return f"another model: its VAE is a {kind}"
    if (channels := vae.get("latent_channels", 4)) != 4:
        return f"another model: its latents have {channels} channels, where Stable Diffusion's have 4"
    return None


def _by_schedule(folder: Path) -> str | None:
    schedule = _config(folder, "scheduler")
    sampler, predicts = str(schedule.get("_class_name")), prediction_type(folder)
    if "Flow" in sampler or schedule.get("use_flow_sigmas") or predicts == "flow_prediction":
        return f"a flow-matching model ({sampler})"
    if schedule and not schedule.keys() & {"beta_schedule", "trained_betas"}:
        return f"another kind of diffusion model: its schedule ({sampler}) has no betas"
    if predicts not in PREDICTIONS:
        return f"another kind of diffusion model: it predicts {predicts}"
    if not schedule.get("rescale_betas_zero_snr"):
        return None
    if predicts != "v_prediction":
        return f"contradictory: zero terminal SNR needs v_prediction, and its schedule says {predicts}"
    sampler_class: Callable | None = getattr(diffusers, sampler, None)
    if sampler_class and "rescale_betas_zero_snr" not in inspect.signature(sampler_class).parameters:
        return f"contradictory: it has zero terminal SNR, and its {sampler} knows no such thing"
    return None
