"""Adapters in PEFT's format that came from anywhere: where they lie, and what they hold, checked.

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
from peft.utils.other import get_pattern_key
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from safetensors.torch import load_file

from bunny_lora.core import files, paths
from bunny_lora.core.values import shown
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model.lora import PARTS
from bunny_lora.model.tensor_files import PICKLE, UNKNOWN, checked, trouble

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LORA_FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
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


# ---------------------------------------------------------------------------- where they lie


def find_weights(lora_weights_dir: str | Path) -> Path:
    """Return what holds a LoRA, a file or a folder of PEFT's: the one named, or what lies in it.

    In a run that is `final/`. In another folder it is `peft/`, as in an export, or the file that
    diffusers looks for, or the only `.safetensors`; which of them is said.

    Raises:
        BunnyLoraError: there is none, or several that nothing sets apart.
    """
    path = paths.expanded(lora_weights_dir)
    path = path if path.exists() else paths.resolve(path)
    if path.is_file():
        of_peft = path.name in (CONFIG, WEIGHTS, OLD_WEIGHTS) and (path.parent / CONFIG).is_file()
        return path.parent if of_peft else path
    found = _inside(path)
    if found not in (path, path / "final"):
        print(f"The LoRA in {paths.relative(path)} is {found.name}.")
    if path.name in PARTS and (others := [p for p in _part_folders(path.parent) if p != path]):
        rest = " and ".join(other.name for other in others)
        print(f"{paths.relative(path)} is one part of a LoRA; {path.parent.name} has the {rest} too.")
    return found


def _inside(folder: Path) -> Path:
    if (folder / "model_index.json").is_file():
        raise BunnyLoraError(
            f"No LoRA adapter in {folder}: it is a whole model; name it as the base model, base_model=…"
            " or --base-model."
        )
    for place in (folder, folder / "final", folder / "peft"):
        if _part_folders(place) or (place / CONFIG).is_file():
            return place
    weights = [path for path in folder.glob("[!.]*.safetensors") if path.stem != "optimizer"]
    if chosen := [path for path in weights if path.name == LORA_FILE or len(weights) == 1]:
        return chosen[0]
    raise BunnyLoraError(_nothing_in(folder, sorted(path.name for path in weights)))


def _part_folders(folder: Path) -> list[Path]:
    return [folder / part for part in PARTS if (folder / part).is_dir()]


def _nothing_in(folder: Path, weights: list[str]) -> str:
    if not folder.is_dir():
        return (
            f"No LoRA adapter in {folder}: there is no such file or folder. Name a run's folder,"
            " …/final, …/checkpoint-100 or a .safetensors file."
        )
    if choice := weights or sorted(path.name for path in folder.glob("checkpoint-*")):
        return (
            f"No LoRA adapter in {folder} to choose by itself: name one of {', '.join(choice)} in it."
        )
    held = sorted(path.name + "/" * path.is_dir() for path in folder.glob("[!.]*"))
    more = f" and {len(held) - 8} more" if len(held) > 8 else ""
    return (
        f"No LoRA adapter in {folder}: needed is unet/ or text_encoder/ in PEFT's format ({CONFIG} and"
        f" {WEIGHTS}) or a .safetensors file; there is {', '.join(held[:8]) or 'nothing'}{more}."
    )


def adapter_parts(weights_dir: Path) -> dict[str, Path]:
    """Return the adapters in a folder, by part of the model: those in it, or itself if it is one.

    Raises:
        BunnyLoraError: there is none, or one is not whole.
    """
    if (weights_dir / CONFIG).is_file():
        check_adapter(weights_dir)
        names = read_weights(weights_dir)
        is_text = any("self_attn" in name or "text_model" in name for name in names)
        return {PARTS[is_text]: weights_dir}
    folders = _part_folders(weights_dir)
    for folder in folders or [weights_dir / PARTS[0]]:
        check_adapter(folder)
    return {folder.name: folder for folder in folders}


def check_adapter(folder: Path) -> None:
    """Raise BunnyLoraError unless `folder` looks like one PEFT adapter."""
    names = (WEIGHTS, OLD_WEIGHTS)
    if not (folder / CONFIG).is_file() or not any((folder / n).is_file() for n in names):
        raise BunnyLoraError(
            f"No LoRA adapter in {folder}: {CONFIG} and {' or '.join(names)} are needed."
            " Name a folder such as outputs/lora_weights/final or …/checkpoint-100."
        )


# ---------------------------------------------------------------------------- what they hold


def _simple_pattern(value: Any) -> Any:
    """Refuse what takes for ever to match: a repeated group, or many repeats of anything but digits."""
    wrong = not isinstance(value, str) or not 0 < len(value) <= 500 or re.search(r"\)[*+{]", value)
    if wrong or len(re.findall(r"(?<!\\d)[*+{]", value)) > 4:
        raise ValueError("should be the name of a module, or a simple pattern of names")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is no pattern of names: {error}") from None
    return value


Pattern = Annotated[str, BeforeValidator(_simple_pattern)]
Rank = Annotated[int, Field(ge=1, le=100_000)]
Alpha = Annotated[float, Field(gt=0, le=1e6)]


class AdapterConfig(BaseModel):
    """What is taken from `adapter_config.json`, with PEFT's defaults; the rest cannot change a picture.

    Which layers there are is told by the weights: `target_modules` names them once more, as a list of
    names or as a pattern, less what `exclude_modules` and `layers_to_transform` take away.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: Rank = 8
    lora_alpha: Alpha = 8
    rank_pattern: dict[Pattern, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[Pattern, Alpha] = Field(default_factory=dict)
    use_rslora: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def alpha(self, name: str, rank: int) -> float:
        """Return the strength of a module, as if it were not rank-stabilised.

        Raises:
            ValueError: another rank is told of it than its weights have.
        """
        recorded = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)
        if recorded != rank:
            raise ValueError(f"it says rank {recorded} of {name}, whose weights have {rank}")
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), name), self.lora_alpha)
        return alpha * rank**0.5 if self.use_rslora else alpha


def read_config(folder: Path) -> AdapterConfig:
    """Return what PEFT's configuration of the adapter in `folder` says.

    Raises:
        BunnyLoraError: it is damaged, absurd, or a kind of adapter that is not read here.
    """
    path = folder / CONFIG
    try:
        return parsed(files.read_json(path))
    except RecursionError:
        raise BunnyLoraError(f"{path} cannot be read: it is nested too deeply.") from None
    except ValueError as error:
        raise BunnyLoraError(f"{path} cannot be used: {error}.") from None


def parsed(settings: Any) -> AdapterConfig:
    """Return PEFT's settings, checked.

    Raises:
        ValueError: they are absurd, or of a kind of adapter that is not read here.
    """
    known = settings if isinstance(settings, dict) else {}
    if (kind := known.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"peft_type: it is {shown(kind)}, and LORA alone is read")
    _refuse_variants(known)
    try:
        return AdapterConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = first["loc"][0] if first["loc"] else "the file"
        raise ValueError(f"{where}: {first['msg']}") from None


def _refuse_variants(given: dict[str, Any]) -> None:
    plain = LoraConfig().to_dict()
    unread = [
        name
        for name, value in given.items()
        if name in plain.keys() - UNDERSTOOD and value and value != plain[name]
    ]
    if str(given.get("init_lora_weights")).startswith(CHANGED_BASES):
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
        state = load_file(path) if path.name == WEIGHTS else _read_old(path)
    except Exception as error:  # Both readers raise whatever they trip over.
        reason = trouble(path)
        if path.name == OLD_WEIGHTS and reason in (PICKLE, UNKNOWN):
            wrong = isinstance(error, TypeError)
            reason = "is not a file of tensors alone" if wrong else "is damaged, or holds code"
        raise BunnyLoraError(
            f"The weights in {folder} cannot be read safely: {path.name} {reason}. Of a run of yours,"
            " use another checkpoint."
        ) from None
    return {name: checked(name, tensor, folder) for name, tensor in state.items()}


def _read_old(path: Path) -> dict[str, torch.Tensor]:
    """Read PEFT's file of before safetensors by torch's reader that runs nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise TypeError("no dictionary of tensors")
    return state
