"""Images to unit vectors by any image encoder of transformers: CLIP, SigLIP, DINOv2, ViT and others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch.nn.functional import normalize
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoModel

from bunny_lora.core import paths
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import hub
from bunny_lora.model.components import BUNNY_WORLD, WORLD_WEIGHTS
from bunny_lora.model.quiet import quiet

BATCH_SIZE = 16
TAKES = "an image encoder of transformers, as CLIP, SigLIP, DINOv2 and ViT are"
POOLER = "pooler."  # Of models that were taught with another head: random until it is taught.

Embed = Callable[[list[Image.Image]], torch.Tensor]


class FeatureExtractor:
    """A named way of turning images into vectors.

    Attributes:
        name: as the configuration names it.
    """

    def __init__(self, name: str, embed: Embed) -> None:
        self.name = name
        self._embed = embed

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return one row an image: float32 [N, D] on the CPU, every row of length 1.

        Raises:
            ValueError: there are no images.
        """
        if not images:
            raise ValueError("no images to look at")
        upright = [ImageOps.exif_transpose(image).convert("RGB") for image in images]
        batches = [upright[i : i + BATCH_SIZE] for i in range(0, len(upright), BATCH_SIZE)]
        rows = torch.cat([self._embed(batch).float().cpu() for batch in batches])
        return normalize(rows, dim=1)


def load_image_encoder(
    name: str, key: str, device: str = "cpu", others: Sequence[str] = ()
) -> FeatureExtractor:
    """Return the image encoder called `name`: Bunny World's, or any that transformers knows.

    Args:
        name: "bunny-world", or a CLIP, SigLIP, DINOv2 or ViT: a local folder (from the project root, or
            else from the working folder) or a hub name such as facebook/dinov2-small, with @ and a
            revision where one is meant.
        key: of the configuration, that messages speak of.
        device: where it runs.
        others: what else the key takes, for its messages.

    Raises:
        BunnyLoraError: there is no such model, it cannot be loaded, or it is no image encoder.
    """
    folder = encoder_folder(name, key, others)
    return FeatureExtractor(
        name, image_embedding(load_encoder(folder, name, key, device), folder, name, key)
    )


def encoder_folder(name: str, key: str, others: Sequence[str] = ()) -> Path:
    """Return where an encoder lies, which a hub's is downloaded to where it is not yet here.

    Raises:
        BunnyLoraError: there is no such model.
    """
    if here := folder_here(name):
        return here
    if "/" not in name:
        choices = ", ".join([*others, BUNNY_WORLD])
        raise BunnyLoraError(
            f'Unknown {key} "{name}": choose {choices}, or {TAKES} (a folder, or a hub name such as'
            " facebook/dinov2-small)."
        )
    try:
        return hub.local_encoder(name)
    except BunnyLoraError as error:
        without = f" With no download, {key} takes {' and '.join([*others, BUNNY_WORLD])}."
        raise BunnyLoraError(f"Could not load {key} {name}: {error}{without}") from error


def folder_here(name: str) -> Path | None:
    """Return the folder of an encoder that needs no download."""
    if name == BUNNY_WORLD:
        return WORLD_WEIGHTS / "clip"
    folders = (path for path in (paths.resolve(name), Path(name)) if path.is_dir())
    return next((path.absolute() for path in folders), None)


def load_encoder(folder: Path, name: str, key: str, device: str) -> Any:
    """Return a model of transformers that takes pictures, frozen, from safetensors alone.

    Args:
        folder: where it lies.
        name: what the user calls it.
        key: of the configuration, that messages speak of.
        device: where it runs.

    Raises:
        BunnyLoraError: it cannot be loaded, or takes no pictures.
    """
    with quiet(), _explaining(name, key):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = MODEL_MAPPING.get(type(config), None)
        if "image" not in _listed(getattr(kind, "input_modalities", ())):
            called = type(config).__name__.removesuffix("Config")
            raise _no_encoder(name, key, f"it is a {called} model")
        model, about = AutoModel.from_pretrained(
            folder,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    if lacking := sorted(key for key in about["missing_keys"] if not key.startswith(POOLER)):
        raise _no_encoder(name, key, f"its weights lack {len(lacking)} layers, {lacking[0]} among them")
    model.pooler_is_taught = not any(key.startswith(POOLER) for key in about["missing_keys"])
    return model.eval().requires_grad_(False).to(device)


def _listed(value: Any) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


@contextlib.contextmanager
def _explaining(name: str, key: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BunnyLoraError(f"Could not load {key} {name}: {reason}") from error


def _no_encoder(name: str, key: str, reason: str) -> BunnyLoraError:
    return BunnyLoraError(f"{key} {name} is no image encoder: {reason}. It takes {TAKES}.")


def image_embedding(model: Any, folder: Path, name: str, key: str) -> Embed:
    """Return what turns pictures into vectors: a model of `load_encoder` and its own processor.

    The same processor everywhere: which one the plain name stands for depends on torchvision's being
    there, and the two differ in the last digits.
    """
    with quiet(), _explaining(name, key):
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)

    def embed(images: list[Image.Image]) -> torch.Tensor:
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device)
        with torch.inference_mode():
            return pooled(model, pixels)

    return embed


def pooled(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return one row a picture, [N, D]: what the model was taught to say of it as a whole.

    That is the projected embedding where text has one too (https://arxiv.org/abs/2103.00020, section
    2.3), else what its pooling layer gives; the class token where there is no such layer, or none that
    was taught; and the mean over the picture where there is no class token either.
    """
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=pixel_values).pooler_output.flatten(1)
    output = model(pixel_values=pixel_values)
    if output.get("pooler_output") is not None and model.pooler_is_taught:
        return output.pooler_output.flatten(1)
    tokens = output.last_hidden_state
    if tokens.ndim == 4:
        return tokens.mean((2, 3))
    parameters = (name for name, _ in model.named_parameters())
    has_class = any(name.endswith(("cls_token", "class_embedding")) for name in parameters)
    return tokens[:, 0] if has_class else tokens.mean(1)
