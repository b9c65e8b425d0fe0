"""One LoRA in the formats that other programs read: PEFT folders, diffusers' file, kohya's file.

Everything goes through one neutral form, so that each format is a reader, a writer and a way of naming.
Names of modules are the model's own: `down_blocks.0.attentions.0.….attn1.to_q`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bunny_lora.core import files
from bunny_lora.core.values import split_revision
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model.adapter_files import CONFIG, WEIGHTS, checked, read_config, read_weights

PARTS = ("unet", "text_encoder")
KOHYA_PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}
KOHYA_NAME, DIFFUSERS_NAME = "kohya.safetensors", "pytorch_lora_weights.safetensors"
_WRAPPER = (
    "text_model."  # around CLIP's encoder, before transformers 5.6 and in every format but PEFT's
)
_UP_BLOCKS = {
    "0.attentions.0": "1.attentions.0",
    "0.attentions.1": "1.attentions.2",
    "1.attentions.0": "2.attentions.0",
    "1.attentions.1": "2.attentions.2",
    "2.attentions.0": "3.attentions.0",
    "2.attentions.1": "3.attentions.2",
}


@dataclass(frozen=True)
class Module:
    """The change of one layer, ΔW = alpha / rank · up · down (https://arxiv.org/abs/2106.09685).

    Attributes:
        down: A, float32 [rank, in], of a convolution [rank, in, h, w].
        up: B, float32 [out, rank], of a convolution [out, rank, 1, 1].
        alpha: the strength at which it was trained; rank-stabilised scaling is folded in.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner width."""
        return self.down.shape[0]

    def change(self) -> torch.Tensor:
        """Return ΔW, float32, of the shape of the layer's weight."""
        flat = self.alpha / self.rank * self.up.flatten(1) @ self.down.flatten(1)
        return flat.view(len(flat), *self.down.shape[1:])


LoRA = dict[str, dict[str, Module]]
"""By part ("unet", "text_encoder"), then by name of the module."""

# ---------------------------------------------------------------------------- reading


def read_lora(path: Path, models: Mapping[str, torch.nn.Module]) -> LoRA:
    """Return the LoRA in `path`, whatever its format; nothing in it is run.

    Args:
        path: a checkpoint or `final/` with PEFT folders, or a `.safetensors` of diffusers or kohya.
        models: the base model's parts, "unet" and "text_encoder", for the names of their modules.

    Raises:
        BunnyLoraError: no LoRA there, unreadable, of an unknown kind, or for another base model.
    """
    try:
        lora = _read_file(path, models) if path.is_file() else _read_folders(path)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise BunnyLoraError(f"{path} is damaged: {error}.") from error
    for part, modules in lora.items():
        for name, module in modules.items():
            _refuse_misfit(path, part, name, module, models[part])
    return lora


def _read_folders(path: Path) -> LoRA:
    folders = {part: path / part for part in PARTS if (path / part / CONFIG).is_file()}
    if not folders:
        raise BunnyLoraError(
            f"No LoRA in {path}: name a folder with unet/ or text_encoder/ in PEFT's format, or a"
            " .safetensors file of diffusers or kohya."
        )
    return {part: _from_peft(read_config(f), read_weights(f)) for part, f in folders.items()}


def _from_peft(config: LoraConfig, state: Mapping[str, torch.Tensor]) -> dict[str, Module]:
    def alpha(name: str, rank: int) -> float:
        key = get_pattern_key(config.alpha_pattern.keys(), name)
        told = config.alpha_pattern.get(key, config.lora_alpha)
        return told * rank**0.5 if config.use_rslora else told

    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    return _paired(plain, alpha)


def _read_file(path: Path, models: Mapping[str, torch.nn.Module]) -> LoRA:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BunnyLoraError(f"{path} cannot be read as safetensors: {error}.") from None
    state = {name: checked(name, tensor, path) for name, tensor in state.items()}
    if any(name.startswith("lora_") for name in state):
        return _from_kohya(path, state, models)
    try:
        told = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        raise BunnyLoraError(f"{path} cannot be read: its lora_adapter_metadata is no JSON.") from None
    if not any(name.startswith(tuple(f"{part}." for part in PARTS)) for name in state):
        raise BunnyLoraError(f"No LoRA in {path}: none of its tensors is named as one.")
    return _from_diffusers(state, told if isinstance(told, dict) else {})


def _from_diffusers(state: Mapping[str, torch.Tensor], told: Mapping[str, Any]) -> LoRA:
    found: LoRA = {}
    for part in PARTS:
        own = {n.removeprefix(f"{part}."): t for n, t in state.items() if n.startswith(f"{part}.")}
        patterns = told.get(f"{part}.alpha_pattern") or {}
        default = told.get(f"{part}.lora_alpha")

        def alpha(
            name: str, rank: int, patterns: dict = patterns, default: float | None = default
        ) -> float:
            known = patterns.get(get_pattern_key(patterns.keys(), name), default)
            return float(rank if known is None else known)

        if own:
            found[part] = _paired(own, alpha)
    _refuse_unread([n for n in state if not n.startswith(tuple(f"{part}." for part in PARTS))])
    return found


def _from_kohya(
    path: Path, state: Mapping[str, torch.Tensor], models: Mapping[str, torch.nn.Module]
) -> LoRA:
    stems = {
        prefix + wrapper + name.replace(".", "_"): (part, name)
        for part, prefixes in KOHYA_PREFIXES.items()
        for name, _ in models[part].named_modules()
        for prefix in prefixes
        for wrapper in (("", "text_model_") if part == "text_encoder" else ("",))
    }
    found: LoRA = {}
    unread = dict(state)
    for stem in dict.fromkeys(name.split(".", 1)[0] for name in state):
        if stem not in stems:
            raise BunnyLoraError(
                f"{path} was made for another base model than the one loaded: it has no {stem}."
            )
        part, name = stems[stem]
        try:
            down, up = unread.pop(f"{stem}.lora_down.weight"), unread.pop(f"{stem}.lora_up.weight")
        except KeyError as missing:
            raise BunnyLoraError(f"{path} is not plain LoRA: {missing} is missing.") from None
        alpha = unread.pop(f"{stem}.alpha", torch.tensor(float(len(down))))
        found.setdefault(part, {})[name] = Module(down, up, float(alpha))
    _refuse_unread(unread)
    return found


_DOWN = re.compile(r"(.+?)\.(?:lora_A|lora\.down|lora_linear_layer\.down)\.weight")
_UPS = (".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")


def _paired(state: Mapping[str, torch.Tensor], alpha: Callable[[str, int], float]) -> dict[str, Module]:
    found, unread = {}, dict(state)
    for key, down in state.items():
        if (match := _DOWN.fullmatch(key)) is None:
            continue
        name = match[1]
        up = next((unread.pop(name + end) for end in _UPS if name + end in unread), None)
        if up is None:
            raise BunnyLoraError(f"The LoRA has no counterpart to {key}.")
        del unread[key]
        found[name.removeprefix(_WRAPPER)] = Module(down, up, alpha(name, len(down)))
    _refuse_unread(unread)
    return found


def _refuse_unread(names: Iterable[str]) -> None:
    """Refuse what plain LoRA does not have, DoRA's magnitudes for one: pictures would be wrong."""
    if unread := sorted(names):
        raise BunnyLoraError(
            f"The LoRA holds {unread[0]}, which is not read here ({len(unread)} such tensors);"
            " plain LoRA is."
        )


def _refuse_misfit(path: Path, part: str, name: str, module: Module, model: torch.nn.Module) -> None:
    try:
        weight = model.get_submodule(name).weight
    except AttributeError:
        weight = None
    fits = weight is not None and weight.shape == (len(module.up), *module.down.shape[1:])
    if not fits or module.up.shape[1] != module.rank or module.rank < 1:
        raise BunnyLoraError(
            f"{path} was made for another base model than the one loaded: the {part} has no {name} of"
            f" {module.down.shape[1]} inputs and {len(module.up)} outputs."
        )


def combined(loras: Sequence[tuple[LoRA, float]]) -> LoRA:
    """Return one LoRA that changes the weights as all of them do together, each times its weight.

    Σ wₖ·Bₖ·Aₖ is the product of the Bs side by side and the As one below the other: nothing is lost,
    the rank is the sum of the ranks. One LoRA of weight 1 comes back as it is.
    """
    if len(loras) == 1 and loras[0][1] == 1:
        return loras[0][0]
    found: LoRA = {}
    for part in PARTS:
        names = dict.fromkeys(name for lora, _ in loras for name in lora.get(part, {}))
        for name in names:
            own = [(lora[part][name], w) for lora, w in loras if name in lora.get(part, {})]
            down = torch.cat([module.down for module, _ in own])
            up = torch.cat([w * module.alpha / module.rank * module.up for module, w in own], dim=1)
            found.setdefault(part, {})[name] = Module(down, up, float(len(down)))
    return found


# ---------------------------------------------------------------------------- writing


def write_peft(lora: LoRA, folder: Path, base_model: str) -> None:
    """Write `folder/{unet,text_encoder}/` in PEFT's format, as training does."""
    for part, modules in lora.items():
        (folder / part).mkdir(parents=True)
        state = _named(modules, "base_model.model.", (".lora_A.weight", ".lora_B.weight"))
        save_file(state, folder / part / WEIGHTS, {"format": "pt"})
        config = peft_config(modules)
        config.base_model_name_or_path, config.revision = split_revision(base_model)
        told = {"peft_type": "LORA"} | config.to_dict()
        told |= {"target_modules": sorted(told["target_modules"])}
        files.write_json(folder / part / CONFIG, told)


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


def write_diffusers(lora: LoRA, path: Path) -> None:
    """Write the file that diffusers' `load_lora_weights` reads, alpha in its metadata.

    The strength is folded into B as well as told: alpha is written as the rank, which is what readers
    assume that do not look at the metadata.
    """
    state: dict[str, torch.Tensor] = {}
    told: dict[str, Any] = {}
    for part, modules in lora.items():
        folded = {
            n: Module(m.down, m.up * (m.alpha / m.rank), float(m.rank)) for n, m in modules.items()
        }
        prefix = f"{part}." + (_WRAPPER if part == "text_encoder" else "")
        state |= _named(folded, prefix, (".lora_A.weight", ".lora_B.weight"))
        config = peft_config(folded).to_dict() | {"target_modules": sorted(folded)}
        told |= {f"{part}.{key}": value for key, value in config.items() if _is_plain(value)}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(told, sort_keys=True)}
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
        start, _, rest = name.partition("up_blocks.")
        block = ".".join(rest.split(".")[:3])
        return f"up_blocks.{_UP_BLOCKS[block]}{rest[len(block) :]}" if rest and not start else name

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
