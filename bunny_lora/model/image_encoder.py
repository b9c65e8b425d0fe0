"""Images to unit vectors by a CLIP model's image encoder, so that similarity is a dot product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.nn.functional import normalize

from bunny_lora.core import paths
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model.components import BUNNY_WORLD, WORLD_WEIGHTS
from bunny_lora.model.quiet import quiet

BATCH_SIZE = 16


class FeatureExtractor:
    """A named way of turning images into vectors.

    Attributes:
        name: as the configuration names it.
    """

    def __init__(self, name: str, embed: Callable[[list[Image.Image]], torch.Tensor]) -> None:
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
    """Return the image encoder called `name`, of Bunny World or of any CLIP model.

    Args:
        name: "bunny-world", or a CLIP model: a local folder (from the project root, or else from the
            working folder) or a hub name such as openai/clip-vit-base-patch32.
        key: of the configuration, that messages speak of.
        device: where it runs.
        others: what else the key takes, for its messages.

    Raises:
        BunnyLoraError: there is no such model, or it cannot be loaded.
    """
    if name == BUNNY_WORLD:
        return FeatureExtractor(name, _clip(str(WORLD_WEIGHTS / "clip"), key, device))
    folder = next((path for path in (paths.resolve(name), Path(name)) if path.is_dir()), None)
    if "/" not in name and folder is None:
        choices = ", ".join([*others, BUNNY_WORLD])
        raise BunnyLoraError(
            f'Unknown {key} "{name}": choose {choices}, or a CLIP model (a folder, or a hub name such'
            " as openai/clip-vit-base-patch32)."
        )
    return FeatureExtractor(
        name, _clip(name if folder is None else str(folder.absolute()), key, device)
    )


def _clip(name: str, key: str, device: str) -> Callable[[list[Image.Image]], torch.Tensor]:
    """CLIP's projected image embedding, https://arxiv.org/abs/2103.00020, section 2.3."""
    # Not the plain name: whether that one means this processor depends on torchvision being there.
    from transformers import CLIPImageProcessorPil, CLIPModel

    try:
        with quiet():
            processor = CLIPImageProcessorPil.from_pretrained(name)
            model = CLIPModel.from_pretrained(name).eval().requires_grad_(False).to(device)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BunnyLoraError(f"Could not load {key} {name} as CLIP: {reason}") from error

    def embed(images: list[Image.Image]) -> torch.Tensor:
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        with torch.inference_mode():
            return model.get_image_features(pixel_values=pixels).pooler_output

    return embed
