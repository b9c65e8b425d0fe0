"""What is in a weights file that is no plain LoRA of Stable Diffusion 1.x, in words for its owner."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

# By the names of tensors, the first that fits: whole models, other architectures, other methods.
_KINDS = (
    (
        r"(model\.diffusion_model|first_stage_model|cond_stage_model)\.",
        "a whole Stable Diffusion in one file, no LoRA: it is a base model",
    ),
    (r"control_model\.|lora_controlnet$|input_hint_block\.", "a ControlNet, no LoRA"),
    (
        r"lora_te[23]_|text_encoder_[23]\.|.*(add_embedding|label_emb)",
        "a LoRA of Stable Diffusion XL, or of another model with several text encoders; the base models"
        " here are Stable Diffusion 1.x, which has one, and other shapes",
    ),
    (
        r"transformer\.|lora_transformer_|.*(double|single|joint)_(transformer_)?blocks"
        r"|(base_model\.model\.|diffusion_model\.|lora_unet_)(transformer_)?(blocks|layers)[._]\d",
        "a LoRA of a diffusion transformer (Flux, Stable Diffusion 3 or the like); the base models here"
        " are Stable Diffusion 1.x, which has a UNet in its place",
    ),
    (
        r"bundle_emb\.",
        "an embedding (textual inversion) bundled with a LoRA, and embeddings are not read",
    ),
    (
        r"(emb_params|clip_[lg]|string_to_(param|token)\b.*)$",
        "an embedding (textual inversion), no LoRA",
    ),
    (r".*\.hada_", "LoHa of the LyCORIS family, not plain LoRA"),
    (r".*\.lokr_", "LoKr of the LyCORIS family, not plain LoRA"),
    (r".*\.oft_", "OFT, orthogonal finetuning, not plain LoRA"),
    (r".*\.on_input$", "IA3, not plain LoRA"),
    (r".*\.[ab][12]\.weight$", "GLoRA of the LyCORIS family, not plain LoRA"),
    (r".*\.lora_mid\.", "LoCon with a Tucker decomposition (LyCORIS), not plain LoRA"),
    (r".*\.(diff|diff_b|w_norm|b_norm)$", "whole changes of weights (LyCORIS's full), not plain LoRA"),
    (r".*\.(dora_scale|lora_magnitude_vector)", "DoRA, whose magnitudes are more than plain LoRA"),
    (r".*\.lora_(B|up)\.bias$", "LoRA with a bias, more than plain LoRA"),
)
# How wide the text is that cross-attention reads.
_FAMILIES = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "Stable Diffusion XL's refiner",
    2048: "Stable Diffusion XL",
}
_CROSS_ATTENTION = re.compile(
    r".*attn2[._](processor\.)?to_[kv](_lora\.down|\.lora[._]down|\.lora_A)\.weight"
)


def other_kind(state: Mapping[str, torch.Tensor], width: int) -> str | None:
    """Return what tensors are that plain LoRA of a model with such cross-attention does not have.

    Args:
        state: by the names in the file.
        width: of the text that the base model's UNet reads.
    """
    found = family(state)
    if found and found != _FAMILIES[768] and _FAMILIES.get(width) != found:
        return f"a LoRA of {found}; the base model is another"
    for pattern, kind in _KINDS:
        if names := [name for name in state if re.match(pattern, name)]:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{kind} (tensor {names[0]}{rest})"
    return None


def family(state: Mapping[str, torch.Tensor]) -> str | None:
    """Return the Stable Diffusion that a LoRA of its cross-attention was made for, by its width."""
    widths = (t.shape[1] for n, t in state.items() if t.ndim > 1 and _CROSS_ATTENTION.fullmatch(n))
    return _FAMILIES.get(next(widths, 0))
