"""What measures similarity: images to unit vectors. One name, one feature extractor.

"palette" needs no weights: it sees colours and where they lie, hardly shape, and nothing of meaning.
"bunny-world" is the CLIP that comes with the package; it knows nothing but that world. Any other name
is an image encoder of transformers, a local folder or a hub name, that sees what is in the picture.
"""

from __future__ import annotations

from bunny_lora.evaluation.palette import _palette
from bunny_lora.model.image_encoder import FeatureExtractor, load_image_encoder

PALETTE = "palette"

__all__ = ["PALETTE", "FeatureExtractor", "load_feature_extractor"]


def load_feature_extractor(name: str, device: str = "cpu") -> FeatureExtractor:
    """Return the feature extractor called `name`.

    Args:
        name: "palette", "bunny-world", or an image encoder of transformers: a local folder (from the
            project root, or else from the working folder) or a hub name, facebook/dinov2-small.
        device: where an encoder runs; the palette always runs on the CPU.

    Raises:
        BunnyLoraError: no such features, or the encoder cannot be loaded.
    """
    if name == PALETTE:
        return FeatureExtractor(name, _palette)
    return load_image_encoder(name, "evaluation.features", device, others=(PALETTE,))
