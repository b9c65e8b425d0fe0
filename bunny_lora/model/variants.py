"""Which file of a part's weights is read: the plain one, or a variant where there is no plain one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

WEIGHTS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
PREFERRED = "fp16"


def weights_file(names: Iterable[str], part: str) -> str | None:
    """Return the safetensors file, of all that a model has, that a part is read from.

    Args:
        names: paths from the model's folder, with slashes.
        part: of `WEIGHTS`.
    """
    stem = re.escape(f"{part}/{WEIGHTS[part]}")
    found = [name for name in names if re.fullmatch(rf"{stem}(\.\w+)?\.safetensors", name)]

    def rank(name: str) -> tuple[bool, bool, str]:
        return variant_of(name) is not None, variant_of(name) != PREFERRED, name

    return min(found, key=rank, default=None)


def variant_of(name: str) -> str | None:
    """Return "fp16" of `unet/diffusion_pytorch_model.fp16.safetensors`, None of a plain name."""
    inner = Path(name).name.split(".")[1:-1]
    return inner[0] if inner else None


def variants(folder: Path) -> dict[str, str | None]:
    """Return, by part, the variant to load, as `from_pretrained` takes it; None is the plain one."""
    found: dict[str, str | None] = {}
    for part, stem in WEIGHTS.items():
        in_shards = (folder / part / f"{stem}.safetensors.index.json").is_file()
        names = [f"{part}/{path.name}" for path in (folder / part).glob("*.safetensors")]
        name = weights_file(names, part)
        found[part] = variant_of(name) if name and not in_shards else None
    return found


def tell(model: str, found: Mapping[str, str | None]) -> None:
    """Say in one line, once, which parts are read from a variant of their weights."""
    _tell(model, tuple((part, variant) for part, variant in sorted(found.items()) if variant))


@cache
def _tell(model: str, found: tuple[tuple[str, str], ...]) -> None:
    if found:
        parts = ", ".join(f"{variant} of the {part}" for part, variant in found)
        print(f"{model} holds variants of its weights, no plain ones; read are {parts}.")
