"""LoRA on UNet and text encoder through PEFT: attach, name what is trainable, save, load.

PEFT puts its layers into the model in place, so the model keeps its class and goes on working inside
a diffusers pipeline; the `PeftModel` around it is only the handle for saving and loading.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file

from bunny_lora.core import files
from bunny_lora.core.sections import LoRASection
from bunny_lora.core.seeding import derive_seed
from bunny_lora.core.values import split_revision
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import targets
from bunny_lora.model.adapter_files import (
    PARTS,
    adapter_parts,
    check_adapter,
    find_weights,
    read_weights,
)
from bunny_lora.model.formats import LoRA, Module, peft_config

__all__ = [
    "PARTS",
    "adapter_digest",
    "adapter_parts",
    "attach",
    "attach_modules",
    "check_adapter",
    "find_weights",
    "load_weights",
    "save_adapter",
    "trainable_parameters",
]


def attach(
    model: torch.nn.Module, part: str, lora: LoRASection, *, base_model: str, seed: int
) -> PeftModel:
    """Put fresh LoRA layers into `model`, in place; they start as no change (B is zero).

    Args:
        model: a frozen UNet or text encoder.
        part: "unet" or "text_encoder"; decides the target modules and the random stream.
        lora: rank, alpha, dropout and target modules.
        base_model: recorded in `adapter_config.json`.
        seed: of the run; A is drawn from it.

    Raises:
        BunnyLoraError: one of the target modules is no layer of the model.
    """
    names = targets.resolve_targets(model, part, target_names(part, lora))
    lora_config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(derive_seed(seed, f"lora {part}"))
        try:
            peft_model = get_peft_model(model, lora_config)
        except ValueError as error:
            raise BunnyLoraError(
                f"lora.{targets.KEYS[part]} {names} do not fit the {part}: {error}"
            ) from None
    lora_config.base_model_name_or_path, lora_config.revision = split_revision(base_model)
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()
    return peft_model


def target_names(part: str, lora: LoRASection) -> list[str]:
    """Return the configured target modules of a part, groups of them by their names."""
    return lora.target_modules if part == "unet" else lora.text_encoder_target_modules


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return exactly what training changes: LoRA's A and B, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, float32, as PEFT reads them.

    Written here rather than by `save_pretrained`, which adds a template model card, may ask the hub
    for the base model, and lists the target modules in an order that changes from run to run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    state = {name: tensor.detach().cpu().float().contiguous() for name, tensor in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA"} | peft_model.peft_config["default"].to_dict()
    config |= {"inference_mode": True, "target_modules": sorted(config["target_modules"])}
    files.write_json(folder / "adapter_config.json", config)


def attach_modules(model: torch.nn.Module, modules: Mapping[str, Module]) -> PeftModel:
    """Put trained LoRA layers into `model`, in place; they fit it, see `formats.read_lora`."""
    state = {}
    for name, module in modules.items():
        state[f"base_model.model.{name}.lora_A.weight"] = module.down
        state[f"base_model.model.{name}.lora_B.weight"] = module.up
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, peft_config(modules))
        _put(peft_model, state)
    peft_model.requires_grad_(False).eval()
    return peft_model


def start_from(peft_models: Mapping[str, PeftModel], lora: LoRA) -> None:
    """Make freshly attached adapters change the weights as `lora` does, for training to go on from.

    A LoRA of a lower rank fills a part of theirs, the rest of B stays zero; another alpha is folded in.

    Raises:
        BunnyLoraError: `lora` has parts, modules or ranks that these adapters do not have.
    """
    if not lora.keys() <= peft_models.keys():
        raise BunnyLoraError(
            "lora.start_from holds a LoRA of the text encoder as well: set"
            " lora.train_text_encoder: true."
        )
    for part, modules in lora.items():
        state = get_peft_model_state_dict(peft_models[part], save_embedding_layers=False)
        config = peft_models[part].peft_config["default"]
        for name, module in modules.items():
            prefix = f"base_model.model.{name}"
            if f"{prefix}.lora_A.weight" not in state:
                raise BunnyLoraError(
                    f"lora.start_from holds a LoRA of {name}, which lora.{targets.KEYS[part]} leaves"
                    f" out: add {targets.short_name(name)} to them."
                )
            if module.rank > config.r:
                raise BunnyLoraError(
                    f"lora.start_from holds a LoRA of rank {module.rank}, and lora.rank is {config.r}:"
                    f" set lora.rank: {module.rank} or more."
                )
            # alpha / rank of both, which PEFT multiplies with
            fold = (module.alpha / module.rank) / (config.lora_alpha / config.r)
            state[f"{prefix}.lora_A.weight"][: module.rank] = module.down
            state[f"{prefix}.lora_B.weight"][:, : module.rank] = fold * module.up
        _put(peft_models[part], state)


def load_weights(peft_model: PeftModel, folder: Path) -> None:
    """Overwrite the LoRA tensors of an attached adapter with those in `folder`.

    Raises:
        BunnyLoraError: the weights are missing, unreadable, or hold values that are not finite.
        ValueError: they do not fit: other names or other shapes; nothing is overwritten then.
    """
    _put(peft_model, read_weights(folder))


def _put(peft_model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    wanted = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    state = {_known_name(name, wanted): tensor for name, tensor in state.items()}
    if different := sorted(set(state) ^ set(wanted)):
        raise ValueError(f"{len(different)} tensors have no counterpart, {different[0]} among them")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
            raise ValueError(f"{name} has the shape {shapes}")
    set_peft_model_state_dict(peft_model, state)


def _known_name(name: str, wanted: dict[str, torch.Tensor]) -> str:
    """Older transformers wrapped CLIP's encoder in `text_model.`; newer ones do not."""
    shorter = name.replace("text_model.", "", 1)
    return shorter if name not in wanted and shorter in wanted else name


def adapter_digest(weights_dir: Path) -> str | None:
    """Return one digest over the adapters of all parts; None of a folder that is not whole."""
    try:
        parts = adapter_parts(weights_dir).values()
    except BunnyLoraError:
        return None
    return files.sha256(*(path for part in parts for path in sorted(part.glob("adapter_*"))))
