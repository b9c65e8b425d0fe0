"""Read an adapter that came from anywhere: all of it is checked before the model is touched.

Nothing in the files is ever run: weights are read by safetensors or torch's weights-only reader, and of
`adapter_config.json` only the numbers and names that LoRA's arithmetic needs are taken over.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from bunny_lora.core import files
from bunny_lora.errors import BunnyLoraError

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of PEFT's settings, those that are read below, and those that say where an adapter is from, how it was
# begun or trained: they change nothing in what its weights mean. Any other must be as PEFT has it.
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip
# These start from a base model that was changed; without that change the adapter is wrong.
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _plain_name(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"\^?[\w.]{1,200}", value):
        raise ValueError("should be the name of a module")
    return value


ModuleName = Annotated[str, BeforeValidator(_plain_name)]
Rank = Annotated[int, Field(ge=1, le=100_000)]
Alpha = Annotated[float, Field(gt=0, le=1e6)]


class AdapterConfig(BaseModel):
    """What is taken from `adapter_config.json`; the rest cannot change a picture."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: Alpha
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Annotated[list[ModuleName], Field(min_length=1)] | ModuleName
    rank_pattern: dict[ModuleName, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[ModuleName, Alpha] = Field(default_factory=dict)
    use_rslora: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None


def check_adapter(folder: Path) -> None:
    """Raise BunnyLoraError unless `folder` looks like one PEFT adapter."""
    names = (WEIGHTS, OLD_WEIGHTS)
    if not (folder / CONFIG).is_file() or not any((folder / n).is_file() for n in names):
        raise BunnyLoraError(
            f"No LoRA adapter in {folder}: {CONFIG} and {' or '.join(names)} are needed."
            " Name a folder such as outputs/lora_weights/final or …/checkpoint-100."
        )


def read_config(folder: Path) -> LoraConfig:
    """Return PEFT's configuration of the adapter in `folder`.

    Raises:
        BunnyLoraError: it is damaged, absurd, or a kind of adapter that is not read here.
    """
    path = folder / CONFIG
    try:
        given = files.read_json(path)
        _refuse_variants(given if isinstance(given, dict) else {})
        config = AdapterConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = first["loc"][0] if first["loc"] else "the file"
        raise BunnyLoraError(f"{path} is no LoRA's: {where}: {first['msg']}.") from None
    except (ValueError, RecursionError) as error:
        raise BunnyLoraError(f"{path} cannot be read: {error}.") from None
    settings = config.model_dump(exclude={"peft_type", "base_model_name_or_path"})
    lora_config = LoraConfig(**settings, inference_mode=True)
    lora_config.base_model_name_or_path = config.base_model_name_or_path
    return lora_config


def _refuse_variants(given: dict[str, Any]) -> None:
    plain = LoraConfig().to_dict()
    unread = [
        name
        for name, value in given.items()
        if name in plain.keys() - UNDERSTOOD and value and value != plain[name]
    ]
    if given.get("init_lora_weights") in CHANGED_BASES:
        unread.append(f"init_lora_weights: {given['init_lora_weights']}")
    if unread:
        raise ValueError(f"it uses {', '.join(unread)}, which is not read here; plain LoRA is")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the adapter in `folder`, float32, by the names in the file.

    Raises:
        BunnyLoraError: they are missing, unreadable, no tensors of real numbers, or not all finite.
    """
    path = folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder / OLD_WEIGHTS
    try:
        state = _read(path)
    except Exception as error:  # Both readers raise whatever they trip over.
        reason = "not a safetensors file" if path.name == WEIGHTS else "not a file of tensors alone"
        if isinstance(error, OSError | SafetensorError) and str(error):
            reason = str(error).splitlines()[0]
        raise BunnyLoraError(
            f"The weights in {folder} cannot be read safely: {path.name}: {reason}. They are cut off,"
            " damaged, or a pickle that holds more than tensors; use another checkpoint."
        ) from None
    return {name: checked(name, tensor, folder) for name, tensor in state.items()}


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.name == WEIGHTS:
        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise ValueError("no dictionary of tensors")
    return state


def checked(name: str, tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """Return a tensor from a file as float32; refuse one of other kinds or with NaN."""
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise BunnyLoraError(f"The weights in {folder} hold {kind} where numbers should be: {name}.")
    tensor = tensor.detach().float()
    if not torch.isfinite(tensor).all():
        raise BunnyLoraError(f"The weights in {folder} hold NaN or infinity in {name}.")
    return tensor


def check_ranks(config: LoraConfig, state: dict[str, torch.Tensor]) -> None:
    """Raise ValueError, before it is allocated, if the configuration asks for more than there is."""
    held = max((tensor.shape[0] for name, tensor in state.items() if "lora_A" in name), default=0)
    asked = max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r
    if asked > held:
        raise ValueError(f"{CONFIG} says rank {asked}, its weights have {held}")
