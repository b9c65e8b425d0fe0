"""Stable Diffusion folders with random weights, built on the spot where no download can be had.

`random-bk-sdm-tiny` has the published shapes of nota-ai/bk-sdm-tiny, so speed, memory and file formats
are the real ones; `random-tiny` has the same parts at toy size, so that everything runs in seconds.
Their pictures are noise: nothing drawn with them says anything about quality.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bunny_lora.core import files, paths
from bunny_lora.core.seeding import derive_seed
from bunny_lora.model import bpe
from bunny_lora.model.quiet import quiet

# Words that the random model's tokenizer knows as one token, about as CLIP's would.
_TEXT = """
a an the of in on at with and to from his her its by up down over under behind before near ellie
phil rex victoria buck birdie flutter character cartoon anime animated scene detailed render style
bunny rabbit cat bear fox mouse bird animal butterfly girl boy woman man small big huge large round
young red orange yellow green blue purple violet pink brown grey white black golden dark light soft
bright warm fur ears eyes eye nose mouth beak face head paw tail wings dress shirt hat scarf bow
overalls jacket standing sitting running jumping waving sleeping walking looking smiling laughing
singing stretching happy sad angry surprised calm sleepy left right front side close portrait wide
full body view forest meadow beach snow city night bedroom desert grass tree branch hill sky cloud
flower river house sun moon evening morning sunset day window street room bed stars sand sea
mountain path field background
"""
WORDS = sorted({*_TEXT.split(), ","})


@dataclass(frozen=True)
class Shape:
    """The numbers that make one architecture; the rest is Stable Diffusion 1.x."""

    unet: dict
    vae_channels: tuple[int, ...]
    vae_layers: int
    vae_groups: int
    text: dict
    text_tokens: int


# The config.json of each part of https://huggingface.co/nota-ai/bk-sdm-tiny
BK_SDM_TINY = Shape(
    unet={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "mid_block_type": None,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    vae_channels=(128, 256, 512, 512),
    vae_layers=2,
    vae_groups=32,
    text={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    },
    text_tokens=77,
)
TINY = Shape(
    unet={
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": None,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
    vae_channels=(8, 16, 16, 16),
    vae_layers=1,
    vae_groups=8,
    text={
        "vocab_size": 2048,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "quick_gelu",
    },
    text_tokens=77,
)
# https://huggingface.co/CompVis/stable-diffusion-v1-4 and 1.5: UNet2DConditionModel's defaults.
SD1 = replace(BK_SDM_TINY, unet={"sample_size": 64, "cross_attention_dim": 768})
RANDOM_MODELS: dict[str, Shape] = {"random-tiny": TINY, "random-bk-sdm-tiny": BK_SDM_TINY}


def build_tokenizer(model_max_length: int = 77) -> CLIPTokenizer:
    """Return a CLIP tokenizer with a token for each word of `WORDS`; it can write any text."""
    return bpe.build_tokenizer(WORDS, model_max_length)


@quiet()
def build_pipeline(
    shape: Shape, seed: int = 0, tokenizer: CLIPTokenizer | None = None
) -> diffusers.StableDiffusionPipeline:
    """Return a pipeline with random float32 weights, the same for the same seed."""
    tokenizer = tokenizer or build_tokenizer(shape.text_tokens)
    with torch.random.fork_rng(devices=[]):
        text_config = CLIPTextConfig(
            **shape.text,
            max_position_embeddings=shape.text_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        parts: dict[str, Callable] = {
            "text_encoder": lambda: CLIPTextModel(text_config),
            "vae": lambda: _build_vae(shape),
            "unet": lambda: UNet2DConditionModel(**shape.unet),
        }
        built = {}
        for name, build in parts.items():
            # Its old name: another would draw other weights, and old runs could not go on.
            torch.manual_seed(derive_seed(seed, f"stand-in {name}"))
            built[name] = build()
    return diffusers.StableDiffusionPipeline(
        **built,
        tokenizer=tokenizer,
        scheduler=_build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _build_vae(shape: Shape) -> AutoencoderKL:
    depth = len(shape.vae_channels)
    return AutoencoderKL(
        block_out_channels=shape.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        latent_channels=4,
        layers_per_block=shape.vae_layers,
        norm_num_groups=shape.vae_groups,
        sample_size=512,
    )


def _build_scheduler() -> PNDMScheduler:
    """Stable Diffusion 1.4's own scheduler/scheduler_config.json."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )


def save_configs(shape: Shape, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write what a folder in diffusers' layout holds beside weights."""
    with torch.device("meta"):
        pipe = build_pipeline(shape, tokenizer=tokenizer)
    save_parts_configs(pipe, folder)


def save_parts_configs(pipe: diffusers.StableDiffusionPipeline, folder: Path) -> None:
    """Write a pipeline without its weights."""
    pipe.save_config(folder)
    pipe.unet.save_config(folder / "unet")
    pipe.vae.save_config(folder / "vae")
    pipe.text_encoder.config.save_pretrained(folder / "text_encoder")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.tokenizer.save_pretrained(folder / "tokenizer")


def random_model_folder(name: str) -> Path:
    """Return the folder of a random model, built under `outputs/standins/` the first time.

    The large one is stored in float16, as the published weights can be: 1 GB instead of 2.
    """
    folder = paths.project_root() / "outputs" / "standins" / name
    if not (folder / "model_index.json").is_file():
        with files.atomic_path(folder) as part:
            pipeline = build_pipeline(RANDOM_MODELS[name])
            pipeline = pipeline.to(torch.float16) if name != "random-tiny" else pipeline
            with quiet():
                pipeline.save_pretrained(part)
    return folder
