"""One LoRA from what other programs write: PEFT's folders, diffusers' files, kohya's."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bunny_lora.core.values import with_revision
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import ldm
from bunny_lora.model.adapter_files import CONFIG, adapter_parts, parsed, read_config, read_weights
from bunny_lora.model.lora import KOHYA_PREFIXES, PARTS, WRAPPER, LoRA, Module
from bunny_lora.model.other_kinds import family, other_kind
from bunny_lora.model.targets import LAYERS
from bunny_lora.model.tensor_files import checked, read_metadata, read_tensors

# In a kohya file's header, whose own names know a model's file alone.
BASE_REVISION = "base_model_revision"


def read_lora(path: Path, models: Mapping[str, torch.nn.Module]) -> LoRA:
    """Return the LoRA in `path`, whatever its format; nothing in it is run.

    Args:
        path: a folder with PEFT's, or a `.safetensors` of diffusers or kohya; see `find_weights`.
        models: the base model's parts, "unet" and "text_encoder", for the names of their modules.

    Raises:
        BunnyLoraError: no LoRA there, unreadable, of an unknown kind, or for another base model.
    """
    try:
        lora = _read_file(path, models) if path.is_file() else _read_folders(path, models)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise BunnyLoraError(f"{path} is damaged: {error}.") from error
    for part, modules in lora.items():
        layers = dict(models[part].named_modules())
        for name, module in modules.items():
            _refuse_misfit(path, part, name, module, layers.get(name))
    return lora


def recorded_base(path: Path) -> str | None:
    """Return the base model that a LoRA says it was trained on, with its revision, or None.

    Raises:
        BunnyLoraError: its file or configuration is unreadable.
    """
    if path.is_file():
        metadata = read_metadata(path)
        adapter = _adapter_metadata(path, metadata)
        part = next((p for p in PARTS if adapter.get(f"{p}.base_model_name_or_path")), "")
        name = metadata.get("ss_sd_model_name") or adapter.get(f"{part}.base_model_name_or_path")
        revision = metadata.get(BASE_REVISION) or adapter.get(f"{part}.revision")
        return with_revision(str(name), revision) if name else None
    config = read_config(next(iter(adapter_parts(path).values())))
    name = config.base_model_name_or_path
    return with_revision(name, config.revision) if name else None


def _read_folders(path: Path, models: Mapping[str, torch.nn.Module]) -> LoRA:
    found = {}
    for part, folder in adapter_parts(path).items():
        config, state = read_config(folder), read_weights(folder)
        _refuse_other_kinds(folder, state, models)
        plain = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
        found[part] = _paired(folder, part, plain, config.alpha)
    return found


def _read_file(path: Path, models: Mapping[str, torch.nn.Module]) -> LoRA:
    state, metadata = read_tensors(path)
    _refuse_other_kinds(path, state, models)
    state = {name: checked(name, tensor, path) for name, tensor in state.items()}
    if any(name.startswith("lora_") for name in state):
        return _from_kohya(path, state, models)
    if any(name.startswith("base_model.") for name in state):
        raise BunnyLoraError(f"{path} is PEFT's, and {CONFIG}, which holds its strength, is not there.")
    return _from_diffusers(path, state, _adapter_metadata(path, metadata), models)


def _refuse_other_kinds(
    path: Path, state: Mapping[str, torch.Tensor], models: Mapping[str, torch.nn.Module]
) -> None:
    unet: Any = models.get("unet")
    if kind := other_kind(state, unet.config.cross_attention_dim if unet else 0):
        raise BunnyLoraError(f"{path} holds {kind}.")


def _adapter_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return PEFT's settings, by part, that diffusers puts into its files."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        raise BunnyLoraError(f"{path} cannot be read: its lora_adapter_metadata is no JSON.") from None
    return settings if isinstance(settings, dict) else {}


def _from_diffusers(
    path: Path,
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    models: Mapping[str, torch.nn.Module],
) -> LoRA:
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        part, name = _split_part(key, models)
        tensors.setdefault(part, {})[name] = tensor
    if unread := tensors.pop("", {}):
        _refuse_unread(path, unread)
    found = {}
    for part, own in tensors.items():
        settings = {
            key.removeprefix(f"{part}."): value
            for key, value in metadata.items()
            if key.startswith(f"{part}.")
        }
        alpha = parsed({"peft_type": "LORA"} | settings).alpha if settings else _as_rank
        found[part] = _paired(path, part, own, alpha)
    return found


def _split_part(key: str, models: Mapping[str, torch.nn.Module]) -> tuple[str, str]:
    """Return part and name; files of a single part, older ones above all, do not name it."""
    part, _, rest = key.partition(".")
    if part in PARTS:
        return part, rest
    if part == WRAPPER.rstrip("."):
        return "text_encoder", key
    children = {p: {name for name, _ in model.named_children()} for p, model in models.items()}
    return next((p for p, names in children.items() if part in names), ""), key


def _as_rank(name: str, rank: int) -> float:
    """Return the strength of a module for which none is told."""
    return float(rank)


def _from_kohya(
    path: Path, state: Mapping[str, torch.Tensor], models: Mapping[str, torch.nn.Module]
) -> LoRA:
    stems = _kohya_stems(models)
    unread = dict(state)
    wanted = dict.fromkeys(name.split(".", 1)[0] for name in state)
    if foreign := [stem for stem in wanted if stem not in stems]:
        raise BunnyLoraError(
            f"{path} was made for another base model than the one loaded{_size(state)}: that has no"
            f" {foreign[0]}, and {len(foreign) - 1} more of its {len(wanted)} layers are missing."
        )
    found: LoRA = {}
    alphas: dict[str, dict[str, float]] = {part: {} for part in models}
    for stem in wanted:
        part, name = stems[stem]
        try:
            down, up = unread.pop(f"{stem}.lora_down.weight"), unread.pop(f"{stem}.lora_up.weight")
        except KeyError as missing:
            raise BunnyLoraError(f"{path} is not plain LoRA: {missing} is missing.") from None
        if name in found.setdefault(part, {}):
            raise BunnyLoraError(f"{path} holds {name} of the {part} twice, once as {stem}.")
        found[part][name] = Module(down, up, float(len(down)))
        if (alpha := unread.pop(f"{stem}.alpha", None)) is not None:
            alphas[part][name] = float(alpha)
    _refuse_unread(path, unread)
    return {part: _with_alphas(path, part, layers, alphas[part]) for part, layers in found.items()}


def _kohya_stems(models: Mapping[str, torch.nn.Module]) -> dict[str, tuple[str, str]]:
    """Return parts and modules by the names that kohya's files have for them."""
    names = {part: {name: name for name, _ in model.named_modules()} for part, model in models.items()}
    # As trainers call them that know the UNet in the LDM layout.
    names["unet"] = ldm.unet_layers(models["unet"]) | names["unet"]
    return {
        prefix + wrapper + written.replace(".", "_"): (part, name)
        for part, prefixes in KOHYA_PREFIXES.items()
        for written, name in names[part].items()
        for prefix in prefixes
        for wrapper in (("", "text_model_") if part == "text_encoder" else ("",))
    }


def _with_alphas(
    path: Path, part: str, layers: Mapping[str, Module], alphas: Mapping[str, float]
) -> dict[str, Module]:
    """Give layers the strengths that are told; the others what diffusers takes: the most common one."""
    if not alphas:
        return dict(layers)
    (usual, _), *_ = Counter(alphas.values()).most_common(1)
    if lacking := len(layers) - len(alphas):
        print(
            f"{path.name} tells no alpha of {lacking} of its {len(layers)} layers of the {part}: they"
            f" get the most common of the others, {usual:g}, as in diffusers; ComfyUI takes the rank."
        )
    return {n: Module(m.down, m.up, alphas.get(n, usual)) for n, m in layers.items()}


# PEFT's names for the two matrices, diffusers' of several years, and its oldest, where they hung on the
# attention's processor instead of on its layers.
_MATRIX = re.compile(
    r"(.+?)(?:\.processor)?\."
    r"(?:lora_([AB])|(?:lora|lora_linear_layer)\.(down|up)|to_(q|k|v|out)_lora\.(down|up))\.weight"
)
_OLD_NAMES = {"unet": ("to_{}", "to_out.0"), "text_encoder": ("{}_proj", "out_proj")}


def _paired(
    path: Path, part: str, state: Mapping[str, torch.Tensor], alpha: Callable[[str, int], float]
) -> dict[str, Module]:
    matrices: dict[str, dict[str, torch.Tensor]] = {}
    unread = []
    for key, tensor in state.items():
        if match := _MATRIX.fullmatch(key):
            name, letter, side, old, old_side = match.groups()
            if old:
                plain, out = _OLD_NAMES[part]
                name += "." + (out if old == "out" else plain.format(old))
            which = "down" if letter == "A" or "down" in (side, old_side) else "up"
            matrices.setdefault(name, {})[which] = tensor
        else:
            unread.append(key)
    _refuse_unread(path, unread)
    found = {}
    for name, pair in matrices.items():
        if len(pair) < 2:
            raise BunnyLoraError(f"{path} holds one of the two matrices of {name}, and not the other.")
        down = pair["down"]
        found[name.removeprefix(WRAPPER)] = Module(down, pair["up"], alpha(name, len(down)))
    if not found:
        raise BunnyLoraError(f"No LoRA in {path}: there is no tensor in it.")
    return found


def _refuse_unread(path: Path, names: Iterable[str]) -> None:
    """Refuse what plain LoRA does not have: pictures would be wrong without it."""
    if unread := sorted(names):
        raise BunnyLoraError(
            f"No LoRA in {path} that is read here: it holds {unread[0]} ({len(unread)} such tensors),"
            " which plain LoRA does not have."
        )


def _size(state: Mapping[str, torch.Tensor]) -> str:
    made_for = family(state)
    return f" (it has the size of {made_for})" if made_for else ""


def _refuse_misfit(
    path: Path, part: str, name: str, module: Module, layer: torch.nn.Module | None
) -> None:
    layer = getattr(layer, "base_layer", layer)  # where another adapter is in the model
    weight = layer.weight if isinstance(layer, LAYERS) else None
    down, up = tuple(module.down.shape), tuple(module.up.shape)
    ones = (1,) * (len(down) - 2)
    if min(len(down), len(up)) < 2 or 0 in down or up[1:] != (down[0], *ones):
        raise BunnyLoraError(f"{path} is damaged: the matrices of {name} are {down} and {up}.")
    if weight is None or weight.shape != (up[0], *down[1:]):
        base = recorded_base(path)
        raise BunnyLoraError(
            f"{path} was made for another base model than the one loaded"
            f"{f' ({base} is recorded in it)' if base else ''}: the {part} has no {name} of"
            f" {down[1]} inputs and {up[0]} outputs."
        )
