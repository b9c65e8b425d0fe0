"""What is wrong with a configuration, in words: one line for one mistake."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from bunny_lora.core.values import MAX_SHOWN, shown

NEAR = 0.8  # Of difflib's ratio: one letter wrong in five.

# What kohya's scripts, diffusers' examples, PEFT, OneTrainer and ai-toolkit call our keys, where the
# spelling alone would not tell; what follows a comma is what differs.
_STEPS = "training.max_train_steps"
_SOURCE = "source, or data_dir for pictures with a metadata.jsonl"
OTHER_NAMES = {
    "pretrained_model_name_or_path": "base_model",
    "name_or_path": "base_model",
    "model": "base_model",
    "model_name": "base_model",
    "train_data_dir": _SOURCE,
    "instance_data_dir": _SOURCE,
    "folder_path": _SOURCE,
    "dataset": _SOURCE,
    "reg_data_dir": "prior_preservation.class_data_dir",
    "with_prior_preservation": "prior_preservation.enabled",
    "diff_output_preservation": "preservation.share",
    "diff_output_preservation_multiplier": "preservation.weight",
    "diff_output_preservation_class": "prior_preservation.class_prompt",
    "output": "output_dir",
    "output_name": "output_dir",
    "trigger_word": "instance_prompt",
    "width": "resolution, one for both sides",
    "height": "resolution, one for both sides",
    "flip_aug": "random_flip",
    "enable_bucket": "aspect_buckets",
    "dataloader_num_workers": "num_workers",
    "max_data_loader_n_workers": "num_workers",
    "optimizer": "use_8bit_adam, the one choice beside AdamW",
    "optimizer_type": "use_8bit_adam, the one choice beside AdamW",
    "resume_from_checkpoint": "resume",
    "network": "lora",
    "network_dim": "lora.rank",
    "lora_rank": "lora.rank",
    "linear": "lora.rank",
    "r": "lora.rank",
    "network_alpha": "lora.alpha",
    "lora_alpha": "lora.alpha",
    "linear_alpha": "lora.alpha",
    "network_dropout": "lora.dropout",
    "lora_dropout": "lora.dropout",
    "network_weights": "lora.start_from",
    "network_train_unet_only": "lora.train_text_encoder, the other way round",
    "lr": "training.learning_rate",
    "unet_lr": "training.learning_rate",
    "text_encoder_lr": "training.text_encoder_learning_rate",
    "caption_dropout_rate": "training.caption_dropout",
    "max_steps": _STEPS,
    "steps": _STEPS,
    "epochs": f"{_STEPS}, in steps of the optimiser",
    "max_train_epochs": f"{_STEPS}, in steps of the optimiser",
    "num_train_epochs": f"{_STEPS}, in steps of the optimiser",
    "train_batch_size": "training.batch_size",
    "min_snr_gamma": "training.snr_gamma",
    "dtype": "training.mixed_precision",
    "precision": "training.mixed_precision",
    "save_every": "training.save_steps",
    "save_every_n_steps": "training.save_steps",
    "checkpointing_steps": "training.save_steps",
    "checkpoints_total_limit": "training.keep_checkpoints",
    "sample_prompts": "training.validation_prompt",
    "sample_every": "training.save_steps, at which validation pictures are drawn",
    "validation_steps": "training.save_steps, at which validation pictures are drawn",
    "sampling.steps": "sampling.num_inference_steps",
    "sample_steps": "sampling.num_inference_steps",
    "guidance": "sampling.guidance_scale",
    "cfg_scale": "sampling.guidance_scale",
}


def explain(item: Any, known_keys: Sequence[str]) -> str:
    """Return where and what is wrong by one of pydantic's errors; an unknown key names the nearest."""
    location = [str(part)[:MAX_SHOWN] for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        return f"{'.'.join(location)}: unknown key{_nearest(location, known_keys)}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "model_type":
        message = "is a section, with keys of its own below it"
    if not location:
        return message
    got = "" if item["type"] == "value_error" else f" (got {shown(item['input'])})"
    return f"{'.'.join(location)}: {message}{got}"


def _nearest(location: list[str], known_keys: Sequence[str]) -> str:
    dotted, leaf = (text.lower().replace("-", "_") for text in (".".join(location), location[-1]))
    by_leaf: dict[str, list[str]] = {}
    for key in known_keys:
        by_leaf.setdefault(key.split(".")[-1], []).append(key)
    if leaf in by_leaf:
        meant = " or ".join(by_leaf[leaf])
    elif name := next((name for name in (dotted, leaf) if name in OTHER_NAMES), None):
        meant = OTHER_NAMES[name]
    else:
        near = difflib.get_close_matches(leaf, by_leaf, 1, NEAR)
        meant = " or ".join(by_leaf[near[0]]) if near else ""
    return f"; did you mean {meant}?" if meant else ""
