"""The second axis, what was asked for, by image and text in one space; and colour, the third number.

A LoRA that draws its character whatever the prompt says scores well on identity alone. So each image is
compared with its prompt, without the name, which no such model knows: CLIP-T of DreamBooth
(https://arxiv.org/abs/2208.12242, section 4.1). Encoders like DINOv2 are taught to ignore colour, which
is much of a cartoon character: palettes are compared besides, whatever the features are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from bunny_lora.config import Config
from bunny_lora.core.eval_result import Axis, Interval
from bunny_lora.data.images import open_rgb
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import metrics
from bunny_lora.evaluation.features import PALETTE, load_feature_extractor
from bunny_lora.evaluation.protocol import ImageSpec, without_name
from bunny_lora.evaluation.traits import clustered_interval
from bunny_lora.model.image_encoder import (
    FeatureExtractor,
    encoder_folder,
    image_embedding,
    load_encoder,
)
from bunny_lora.model.quiet import quiet

KEY = "evaluation.prompt_features"
CHUNK = 64  # images in memory at a time


class PromptReader:
    """A CLIP, or another model that has images and text in one space.

    Attributes:
        images: unit vectors of images.
        texts: unit vectors of texts, [N, D].
    """

    def __init__(self, name: str, device: str) -> None:
        """Load it.

        Raises:
            BunnyLoraError: there is no such model, or it reads no text.
        """
        folder = encoder_folder(name, KEY, others=("null",))
        model = load_encoder(folder, name, KEY, device)
        if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
            raise BunnyLoraError(
                f"{KEY} {name} has no space that text and images share: name a CLIP or a SigLIP, such"
                " as openai/clip-vit-base-patch32@refs/pr/66."
            )
        self.images = FeatureExtractor(name, image_embedding(model, folder, name, KEY))
        self.texts = _text_embedding(model, folder, name)


def _text_embedding(model: Any, folder: Path, name: str) -> Callable[[Sequence[str]], torch.Tensor]:
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BunnyLoraError(f"Could not load the tokenizer of {KEY} {name}: {reason}") from error
    length = model.config.text_config.max_position_embeddings

    def embed(texts: Sequence[str]) -> torch.Tensor:
        whole = [len(ids) for ids in tokenizer(list(texts))["input_ids"]]
        if cut := sum(n > length for n in whole):
            print(f"{KEY}: {cut} of {len(texts)} prompts are longer than it reads, and cut off")
        encoded = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        with torch.inference_mode():
            found = model.get_text_features(**encoded.to(model.device)).pooler_output
        return normalize(found.float().cpu(), dim=1)

    return embed


def following(
    run_dir: Path, config: Config, plan: Sequence[ImageSpec], reader: PromptReader | None
) -> tuple[Axis | None, dict[str, float]]:
    """Return how well the images of each model show what their prompts ask, and each image by its file.

    Args:
        run_dir: the run's folder.
        config: has the prompts.
        plan: images that name a character.
        reader: what tells; None where nothing is to.
    """
    if reader is None:
        return None, {}
    templates, subject = config.evaluation.prompts, config.prior_preservation.class_prompt
    asked = [without_name(template, subject) for template in templates]
    cosines = _vectors(run_dir, plan, reader.images) @ reader.texts(asked).T
    rows = torch.arange(len(plan))
    own = torch.tensor([spec.prompt_index for spec in plan])
    values = cosines[rows, own]
    other = torch.tensor([[text != asked[i] for text in asked] for i in own.tolist()])
    mismatched = float(cosines[other].mean()) if other.any() else None
    axis = axis_of(reader.images.name, plan, values, mismatched)
    return axis, {spec.file: value for spec, value in zip(plan, values.tolist(), strict=True)}


def colour(
    run_dir: Path, plan: Sequence[ImageSpec], crops: Mapping[str, Sequence[Image.Image]]
) -> Axis:
    """Return how alike the palettes of each model's images are to those of the character's crops.

    Args:
        run_dir: the run's folder.
        plan: images that name a character.
        crops: of each character.
    """
    palette = load_feature_extractor(PALETTE)
    references = {name: palette(images) for name, images in crops.items()}
    vectors = _vectors(run_dir, plan, palette)
    values = [
        metrics.fidelity(vector[None], references[spec.character])
        for vector, spec in zip(vectors, plan, strict=True)
    ]
    among = [metrics.consistency(rows) for rows in references.values()]
    own = torch.cat(among)
    return axis_of(PALETTE, plan, torch.cat(values), float(own.mean()) if len(own) else None)


def _vectors(run_dir: Path, plan: Sequence[ImageSpec], extractor: FeatureExtractor) -> torch.Tensor:
    files = [run_dir / "evaluation" / spec.file for spec in plan]
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    return torch.cat([extractor([open_rgb(file) for file in chunk]) for chunk in chunks])


def axis_of(
    features: str, plan: Sequence[ImageSpec], values: torch.Tensor, reference: float | None
) -> Axis:
    """Return the means of each model's images, and what `final` is more than `base`, pair by pair.

    Args:
        features: what measured.
        plan: N images of several models, "base" and "final" among them.
        values: their scores, [N].
        reference: what to read them against.
    """
    scored = list(zip(plan, values.tolist(), strict=True))
    models = {}
    for model in dict.fromkeys(spec.model for spec in plan):
        models[model] = _interval([(spec, value) for spec, value in scored if spec.model == model])
    base = {_pair(spec): value for spec, value in scored if spec.model == "base"}
    pairs = [(spec, value - base[_pair(spec)]) for spec, value in scored if spec.model == "final"]
    return Axis(features=features, models=models, change=_interval(pairs), reference=reference)


def _pair(spec: ImageSpec) -> tuple[str, int, int]:
    return spec.character, spec.prompt_index, spec.seed


def _interval(scored: Sequence[tuple[ImageSpec, float]]) -> Interval:
    clusters = [(spec.character, spec.prompt_index) for spec, _ in scored]
    return clustered_interval(torch.tensor([value for _, value in scored]), clusters)
