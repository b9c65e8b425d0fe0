"""What an exported LoRA is called: after its run if that says something, fit for any file system."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from bunny_lora.core import paths

# Folders of this name are everybody's: ours by default, PEFT's, diffusers' and the hub's.
_SAYS_NOTHING = re.compile(
    r"(pytorch_)?lora([_-]weights)?|weights|models?|outputs?|final|checkpoint-\d+|unet|text_encoder"
    r"|peft|adapter_model|kohya|",
    re.IGNORECASE,
)
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # on Windows
_MAX_NAME = 120  # bytes, of the 255 that file systems take, since other programs add to it
N_CHARACTERS = 3


def title_of(weights: Path, run: Path | None, characters: Iterable[str]) -> str:
    """Return the name of a LoRA: of its run, the folder around it, or the characters that it knows.

    Args:
        weights: the folder or file that holds it.
        run: the run that it lies in, if it lies in one.
        characters: the names it was trained on.
    """
    place = run or weights
    name = place.name
    while name.lower().endswith(".safetensors"):
        name = name[: -len(".safetensors")]
    around = place.parent.name if place.parent != paths.project_root() else ""
    names = [name, around, "-".join(list(characters)[:N_CHARACTERS]), "lora"]
    chosen = next(name for name in names if not _SAYS_NOTHING.fullmatch(name) or name == "lora")
    step = f"-step{weights.name.partition('-')[2]}" if weights.name.startswith("checkpoint-") else ""
    return " ".join(chosen.encode("utf-8", "replace").decode().split()) + step


def file_stem(title: str) -> str:
    """Return a title as the name of a file, on Windows too, without its ending."""
    stem = re.sub(r'[<>:"/\\|?*`\x00-\x1f\x7f]', "_", title)
    stem = stem.encode()[:_MAX_NAME].decode("utf-8", "ignore").strip(" .") or "lora"
    return re.sub(r"^[^.]+", r"\g<0>_", stem) if _RESERVED.fullmatch(stem) else stem
