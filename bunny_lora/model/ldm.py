"""Stable Diffusion 1.x in one file, in the layout of its first program (latent diffusion, LDM).

That is what A1111, ComfyUI and stable-diffusion.cpp read. The layout numbers the UNet's layers through,
three to a block: the first has a convolution more, the last of a block changes the size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import diffusers
import torch

from bunny_lora.errors import BunnyLoraError

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
_DOWN, _UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
# The UNets that programs know in this layout, by what makes them: Stable Diffusion 1.x, BK-SDM-Tiny.
UNETS: tuple[dict[str, Any], ...] = (
    {
        "down_block_types": [_DOWN] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + [_UP] * 3,
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    },
    {
        "down_block_types": [_DOWN] * 3,
        "up_block_types": [_UP] * 3,
        "layers_per_block": 1,
        "mid_block_type": None,
    },
)
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_INNER = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_UNET_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def is_full(unet: diffusers.UNet2DConditionModel) -> bool:
    """Whether a UNet has all blocks of Stable Diffusion 1.x, which diffusers reads in this layout.

    Raises:
        BunnyLoraError: it has neither those nor BK-SDM-Tiny's: no program would know it.
    """
    shape = {key: unet.config[key] for key in UNETS[0]}
    shape = {key: list(value) if isinstance(value, tuple) else value for key, value in shape.items()}
    if shape not in UNETS or unet.config["use_linear_projection"]:
        raise BunnyLoraError(
            "A checkpoint in one file is written of Stable Diffusion 1.x and of BK-SDM-Tiny, which"
            " other programs know by their blocks; this model has others, or is a Stable Diffusion 2.x:"
            " choose --format merged."
        )
    return shape == UNETS[0]


def state_dict(pipe: diffusers.StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """Return a pipeline's weights as a file holds them: float16, none sharing memory."""
    return {name: _half(name, tensor) for name, tensor in tensors(pipe).items()}


def tensors(pipe: diffusers.StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """Return a pipeline's weights under the names of the layout."""
    state = {}
    for name, tensor in pipe.unet.state_dict().items():
        state[PREFIXES["unet"] + unet_name(name)] = tensor
    depth = len(pipe.vae.config.block_out_channels)
    for name, tensor in pipe.vae.state_dict().items():
        is_projection = ".attentions." in name and name.endswith("weight") and tensor.ndim == 2
        # A linear layer of the middle's attention was a convolution of one pixel.
        state[PREFIXES["vae"] + vae_name(name, depth)] = (
            tensor[:, :, None, None] if is_projection else tensor
        )
    for name, tensor in pipe.text_encoder.state_dict().items():
        state[PREFIXES["text_encoder"] + name.removeprefix("text_model.")] = tensor
    return state


def _half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor.contiguous()
    half = tensor.to(torch.float16, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(half).all():
        raise BunnyLoraError(f"{name} is too large for float16 or no number: choose --format merged.")
    return half


def unet_name(name: str) -> str:
    """Return the layout's name for a tensor of the UNet.

    Attention in the first block up is in BK-SDM-Tiny alone: it keeps its name, by which
    stable-diffusion.cpp knows it.
    """
    return name if name.startswith("up_blocks.0.attentions.") else _numbered(name, 3)


def unet_layers(unet: torch.nn.Module) -> dict[str, str]:
    """Return names of the UNet's modules by the layout's, with blocks as long as they are.

    So does diffusers count when it reads a LoRA; `unet_name` keeps the full model's numbers.
    """
    config: Any = unet.config
    if not isinstance(config.layers_per_block, int):
        return {}
    names = [name for name, _ in unet.named_modules()]
    found = {_numbered(f"{n}.", config.layers_per_block + 1).removesuffix("."): n for n in names}
    if "up_blocks.0.attentions.0" in names:  # the change of size comes behind it, as in later blocks
        behind = re.compile(r"(output_blocks\.\d\.)1(\.conv)")
        found = {behind.sub(r"\g<1>2\2", written): name for written, name in found.items()}
    return found


def _numbered(name: str, n_places: int) -> str:
    """Return the layout's name where each block has so many places, the change of size one of them."""
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name):
        way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        blocks, first = ("input_blocks", 1) if way == "down" else ("output_blocks", 0)
        if kind == "resnets":
            return f"{blocks}.{n_places * block + layer + first}.0.{_renamed(rest, _RESNET)}"
        if kind == "attentions":
            return f"{blocks}.{n_places * block + layer + first}.1.{rest}"
        if kind == "downsamplers":
            return f"{blocks}.{n_places * (block + 1)}.0.{rest.replace('conv', 'op')}"
        return f"{blocks}.{n_places * (block + 1) - 1}.{1 if block == 0 else 2}.{rest}"
    if match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", name):
        return f"middle_block.{2 * int(match[1])}.{_renamed(match[2], _RESNET)}"
    return _renamed(name.replace("mid_block.attentions.0.", "middle_block.1."), _UNET_OUTER)


def vae_name(name: str, depth: int) -> str:
    """Return the layout's name for a tensor of a VAE of so many blocks; upwards, they count down."""

    def block(match: re.Match) -> str:
        way, number, kind, layer = match[1], int(match[2]), match[3], match[4]
        place = f"{way}.{number if way == 'down' else depth - 1 - number}"
        return f"{place}.block.{layer}." if kind == "resnets" else f"{place}.{way}sample."

    name = re.sub(r"(down|up)_blocks\.(\d)\.(resnets|downsamplers|upsamplers)\.(\d)\.", block, name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    inner = re.fullmatch(r"(.+\.(?:block[._]\d|attn_1)\.)(.+)", name)
    return inner[1] + _renamed(inner[2], _VAE_INNER) if inner else name


def _renamed(name: str, names: Mapping[str, str]) -> str:
    stem, _, end = name.rpartition(".")
    return f"{names.get(stem, stem)}.{end}"
