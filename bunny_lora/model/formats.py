"""One LoRA in the formats that other programs read: PEFT folders, diffusers' file, kohya's file.

Everything goes through one neutral form, so that each format is a reader, a writer and a way of naming.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from bunny_lora.core import files
from bunny_lora.core.values import split_revision
from bunny_lora.model.adapter_files import CONFIG, LORA_FILE, WEIGHTS
from bunny_lora.model.format_readers import BASE_REVISION, read_lora, recorded_base
from bunny_lora.model.lora import KOHYA_PREFIXES, PARTS, WRAPPER, LoRA, Module, combined

__all__ = [
    "BASE_REVISION",
    "DIFFUSERS_NAME",
    "PARTS",
    "LoRA",
    "Module",
    "combined",
    "for_sd1",
    "peft_config",
    "read_lora",
    "recorded_base",
    "write_diffusers",
    "write_kohya",
    "write_peft",
]

DIFFUSERS_NAME = LORA_FILE


def write_peft(lora: LoRA, folder: Path, base_model: str) -> None:
    """Write `folder/{unet,text_encoder}/` in PEFT's format, as training does."""
    for part, modules in lora.items():
        (folder / part).mkdir(parents=True)
        state = _named(modules, "base_model.model.", (".lora_A.weight", ".lora_B.weight"))
        save_file(state, folder / part / WEIGHTS, {"format": "pt"})
        config = peft_config(modules)
        config.base_model_name_or_path, config.revision = split_revision(base_model)
        metadata = {"peft_type": "LORA"} | config.to_dict()
        metadata |= {"target_modules": sorted(metadata["target_modules"])}
        files.write_json(folder / part / CONFIG, metadata)


def peft_config(modules: Mapping[str, Module]) -> LoraConfig:
    """Return PEFT's configuration of these modules, with patterns where rank or alpha differ."""
    first = next(iter(modules.values()))
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        target_modules=sorted(modules),
        rank_pattern={n: m.rank for n, m in modules.items() if m.rank != first.rank},
        alpha_pattern={n: m.alpha for n, m in modules.items() if m.alpha != first.alpha},
        inference_mode=True,
    )


def write_diffusers(lora: LoRA, path: Path, base_model: str | None = None) -> None:
    """Write the file that diffusers' `load_lora_weights` reads, alpha and base model in its metadata.

    The strength is folded into B as well as told: alpha is written as the rank, which is what readers
    assume that do not look at the metadata.
    """
    state: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for part, modules in lora.items():
        folded = {
            n: Module(m.down, m.up * (m.alpha / m.rank), float(m.rank)) for n, m in modules.items()
        }
        prefix = f"{part}." + (WRAPPER if part == "text_encoder" else "")
        state |= _named(folded, prefix, (".lora_A.weight", ".lora_B.weight"))
        peft = peft_config(folded)
        peft.base_model_name_or_path, peft.revision = split_revision(base_model or "")
        config = peft.to_dict() | {"target_modules": sorted(folded)}
        metadata |= {f"{part}.{key}": value for key, value in config.items() if _is_plain(value)}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, sort_keys=True)}
    save_file(state, path, metadata)


def write_kohya(lora: LoRA, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the file that ComfyUI, A1111 and sd-scripts read; `metadata` is what they show."""
    state = {}
    for part, modules in lora.items():
        prefix = KOHYA_PREFIXES[part][0] + ("text_model_" if part == "text_encoder" else "")
        for name, module in modules.items():
            stem = prefix + name.replace(".", "_")
            state[f"{stem}.lora_down.weight"] = module.down.contiguous()
            state[f"{stem}.lora_up.weight"] = module.up.contiguous()
            state[f"{stem}.alpha"] = torch.tensor(float(module.alpha))
    save_file(state, path, dict(metadata))


def for_sd1(lora: LoRA) -> LoRA:
    """Return a LoRA for BK-SDM-Tiny's UNet under the names of full Stable Diffusion 1.x.

    After BK-SDM's own map from teacher to student. Experimental: the blocks fit, the pictures are
    unproven.
    """

    def renamed(name: str) -> str:
        if not (match := re.fullmatch(r"up_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)):
            return name
        block, kind, index, rest = match.groups()
        # The student has the teacher's last three blocks, and of their three layers the first and last.
        taken = int(index) if kind == "upsamplers" else 2 * int(index)
        return f"up_blocks.{int(block) + 1}.{kind}.{taken}.{rest}"

    return lora | {"unet": {renamed(name): module for name, module in lora.get("unet", {}).items()}}


def _named(
    modules: Mapping[str, Module], prefix: str, ends: tuple[str, str]
) -> dict[str, torch.Tensor]:
    pairs: Iterable[tuple[str, torch.Tensor]] = (
        (prefix + name + end, tensor.contiguous())
        for name, module in modules.items()
        for end, tensor in zip(ends, (module.down, module.up), strict=True)
    )
    return dict(pairs)


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool | list | dict) or value is None
