"""Pretrain the judge: a CLIP that tells who is in a picture, whatever the scene and the pose.

It learns to match pictures with their captions, as CLIP does, and two pictures of the same character
with each other. No hero is ever shown to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from bunny_lora.core.files import atomic_path, read_json, write_json
from bunny_lora.core.seeding import derive_seed
from bunny_lora.data.images import crop_around
from bunny_lora.model import components
from bunny_lora.model.quiet import quiet
from bunny_lora.world import attributes
from bunny_lora.world.attributes import HEROES, Picture, Traits, hero_picture
from bunny_lora.world.captions import caption
from bunny_lora.world.pretraining.data import filled_rows, heldout_seed, to_unit
from bunny_lora.world.pretraining.learner import TrainState
from bunny_lora.world.pretraining.tokenizer import MAX_TOKENS, build_tokenizer
from bunny_lora.world.renderer import render

N_CHARACTERS = 12_000
_TWIN, _RECOLOURED = 0.5, 0.7
_FACE_CROP, _FACE_TO_CROP = 0.4, (2.0, 3.5)
_TEMPERATURE = 0.1
_IDENTITY_WEIGHT = 2.0


def build_clip(
    vocab_size: int, *, size: int = 128, width: int = 192, n_layers: int = 4, seed: int = 0
) -> CLIPModel:
    """Return an untrained CLIP for `size` x `size` pictures in patches of 16."""
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": 16,
    }
    text = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "world clip weights"))
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def character_traits(seed: int, index: int) -> Traits:
    """Return the traits of character `index`; every second one may be a twin of the one before.

    A twin differs in one trait, so that telling the two apart takes a second look.
    """
    rng = attributes.generator(seed, "character", index)
    if index % 2 == 0 or rng.random() > _TWIN:
        return attributes.random_traits(rng)
    sibling = character_traits(seed, index - 1)
    while True:
        other = attributes.random_traits(rng)
        name = attributes.pick(rng, ("species", "fur", "outfit", "outfit_colour", "mark"))
        twin = replace(sibling, **{name: getattr(other, name)})
        if twin.outfit not in attributes.BARE_CHEST:
            twin = replace(twin, mark="none")
        heros = twin.mark == attributes.HERO_MARKS.get(twin.species)
        if twin != sibling and twin.outfit_colour != twin.fur and not heros:
            return twin


def view(seed: int, index: int, number: int) -> tuple[Picture, np.random.Generator]:
    """Return one of the pictures of a character, alone in its own scene, and what draws the lots."""
    rng = attributes.generator(seed, "view", index, number)
    scene = attributes.random_scene(rng)
    traits = character_traits(seed, index)
    moment = attributes.random_moment(rng, attributes.random_name(rng), traits, scene.camera)
    return Picture(scene, attributes.stage(rng, [moment], scene.camera, 1.0), 1.0), rng


def view_of(picture: Picture, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a picture as uint8 [3, size, size], now and then cut to its face like an evaluation's."""
    if rng.random() < _FACE_CROP:
        drawn = render(picture, (2 * size, 2 * size))
        scale = rng.uniform(*_FACE_TO_CROP)
        image = crop_around(drawn.image, drawn.faces[0], scale)
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        image = render(picture, (size, size)).image
    return np.ascontiguousarray(np.array(image).transpose(2, 0, 1))


class _Views(Dataset[np.ndarray]):
    """Two pictures of character `index`, uint8 [2, 3, size, size]."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __getitem__(self, index: int) -> np.ndarray:
        seen = [view(self.seed, index, number) for number in range(2)]
        return np.stack([view_of(picture, self.size, rng) for picture, rng in seen])


def drawn_characters(
    out_dir: Path,
    n_characters: int,
    *,
    size: int,
    seed: int,
    n_workers: int = 0,
    report: Callable[[str], None] = print,
) -> np.ndarray:
    """Return two pictures of each character, uint8 [n_characters, 2, 3, size, size]; draw the missing.

    They lie memory-mapped in `out_dir/characters.npy`.
    """
    Path(out_dir).mkdir(parents=True, exist_ok=True)

    def blocks(first: int) -> Iterable[np.ndarray]:
        rest = range(first, n_characters)
        loader = DataLoader(_Views(seed, size), 25, sampler=rest, num_workers=n_workers)
        return (block.numpy() for block in loader)

    path, shape = Path(out_dir) / "characters.npy", (n_characters, 2, 3, size, size)
    return filled_rows(path, {"seed": seed}, shape, np.uint8, blocks, report)


def _contrast(first: torch.Tensor, second: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Return the symmetric InfoNCE loss of rows that belong together, https://arxiv.org/abs/2103.00020."""
    logits = scale * F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    labels = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))


def hues_turned(images: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the hues of most families, by one angle in both pictures of both twins.

    Furs come in seven colours, and a judge that knows no others cannot tell a new one from an old one.
    The first family always stays: there is then a caption that is true.

    Returns:
        uint8 [N, 2, 3, H, W] with changes, and whether each character kept its colours, bool [N].
    """
    images, kept = images.clone(), torch.ones(len(images), dtype=torch.bool)
    for first in range(2, len(images), 2):
        if rng.random() < _RECOLOURED:
            family = images[first : first + 2].float()
            turned = torch.einsum("ij,nvjhw->nvihw", hue_rotation(rng.uniform(0, 2 * np.pi)), family)
            images[first : first + 2] = turned.round().clamp(0, 255).to(torch.uint8)
            kept[first : first + 2] = False
    return images, kept


def hue_rotation(angle: float) -> torch.Tensor:
    """Return the matrix [3, 3] that turns RGB around the axis of the greys, by Rodrigues' formula."""
    cos, sin = np.cos(angle), np.sin(angle) / 3**0.5
    around = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return cos * torch.eye(3) + (1 - cos) / 3 * torch.ones(3, 3) + sin * around


def _loss(
    clip: CLIPModel, images: torch.Tensor, tokens: torch.Tensor, captions_hold: torch.Tensor
) -> torch.Tensor:
    """Return the loss of a batch.

    Args:
        clip: the model.
        images: two of each character, [N, 2, 3, H, W] from -1 to 1.
        tokens: the caption of each, [2 * N, T].
        captions_hold: the characters that the captions are true of, bool [N].
    """
    n = len(images)
    with torch.autocast(images.device.type, torch.bfloat16):
        seen = clip.get_image_features(pixel_values=images.flatten(0, 1)).pooler_output.float()
        said = clip.get_text_features(input_ids=tokens).pooler_output.float()
    pairs, true = seen.view(n, 2, -1), captions_hold.repeat_interleave(2)
    identity = _contrast(pairs[:, 0], pairs[:, 1], 1 / _TEMPERATURE)
    captions = _contrast(seen[true], said[true], clip.logit_scale.exp().clamp(max=100))
    return _IDENTITY_WEIGHT * identity + captions


def pretrain_clip(
    out_dir: Path,
    *,
    max_steps: int = 1500,
    batch_size: int = 32,
    peak_rate: float = 2e-3,
    n_characters: int = N_CHARACTERS,
    size: int = 128,
    width: int = 192,
    n_layers: int = 4,
    seed: int = 0,
    device: str = "cpu",
    n_workers: int = 0,
    stop_at: int | None = None,
    evaluate_every: int = 250,
    n_heldout: int = 50,
    report: Callable[[str], None] = print,
) -> Path:
    """Train the CLIP, or go on training it, and return the folder of its averaged weights.

    Args:
        out_dir: holds `characters.npy` (see `drawn_characters`), `clip_state.safetensors`, to go on
            from, and `clip/`, model and processor in float16.
        max_steps: length of the whole training; the learning rate ends at 0 there.
        batch_size: characters a step, two pictures each.
        stop_at: stop at this step already, as an interruption would.
        n_heldout: pictures of each hero to measure with.
        report: receives a line of progress at every evaluation.

    Raises:
        BunnyLoraError: the state in `out_dir` was made under other settings.
    """
    out_dir = Path(out_dir)
    pictures = drawn_characters(
        out_dir, n_characters, size=size, seed=seed, n_workers=n_workers, report=report
    )
    tokenizer = build_tokenizer()
    clip = build_clip(len(tokenizer), size=size, width=width, n_layers=n_layers, seed=seed).to(device)
    settings: dict[str, Any] = {"width": width, "n_layers": n_layers, "size": size, "seed": seed}
    settings |= {"batch_size": batch_size, "n_characters": n_characters}
    settings |= {"max_steps": max_steps, "peak_rate": peak_rate}
    state = TrainState(clip, settings, ema_decay=0.995)

    def loss_of(step: int) -> torch.Tensor:
        rng = attributes.generator(seed, "clip batch", step)
        # twins come together, or there would be nothing to tell apart
        families = np.sort(rng.choice(n_characters // 2, size=batch_size // 2, replace=False))
        chosen = (2 * families[:, None] + [0, 1]).reshape(-1)
        texts = [
            caption(view(seed, int(index), number)[0], int(rng.integers(2**31)))
            for index in chosen
            for number in range(2)
        ]
        images, captions_hold = hues_turned(torch.from_numpy(pictures[chosen]), rng)
        tokens = components.tokenize(tokenizer, texts).to(device)
        return _loss(clip, to_unit(images, device), tokens, captions_hold.to(device))

    for progress in state.train(
        loss_of,
        out_dir / "clip_state.safetensors",
        max_steps=max_steps,
        peak_rate=peak_rate,
        images_per_step=2 * batch_size,
        evaluate_every=evaluate_every,
        stop_at=stop_at,
    ):
        with state.averaged():
            heroes, truths = hero_views(seed, size, n_heldout)
            auc = same_hero_auc(image_vectors(clip, heroes), truths)
            save_clip(clip, out_dir / "clip", size)
        quality = f"loss {float(progress.losses[-1]):.3f}, same hero AUC {auc:.4f}"
        report(f"step {state.step}: {quality}, {progress.images_per_sec:.1f} images/s")
    return out_dir / "clip"


def hero_views(seed: int, size: int, n_each: int) -> tuple[torch.Tensor, list[Picture]]:
    """Return unseen pictures of each hero, uint8 [4 * n_each, 3, size, size], and their truth."""
    pictures = [hero_picture([name], heldout_seed(seed), i) for name in HEROES for i in range(n_each)]
    images = np.stack([np.array(render(p, (size, size)).image).transpose(2, 0, 1) for p in pictures])
    return torch.from_numpy(images), pictures


@torch.no_grad()
def image_vectors(clip: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Return unit vectors [N, D] of uint8 images [N, 3, H, W]."""
    clip.eval()
    rows = [
        clip.get_image_features(pixel_values=to_unit(part, str(clip.device))).pooler_output.cpu()
        for part in images.split(64)
    ]
    return F.normalize(torch.cat(rows), dim=1)


def same_hero_auc(vectors: torch.Tensor, pictures: Sequence[Picture]) -> float:
    """Return how often two pictures of one hero are more alike than two of different heroes.

    The area under the ROC curve over all pairs that differ in place and in pose; a tie counts half.
    `vectors` are of length 1, [N, D], one a picture of one character.
    """
    similarity = vectors @ vectors.T
    same: list[float] = []
    other: list[float] = []
    for (i, first), (j, second) in combinations(enumerate(pictures), 2):
        (one,), (two,) = first.characters, second.characters
        if first.scene.place != second.scene.place and one.pose != two.pose:
            (same if one.name == two.name else other).append(float(similarity[i, j]))
    ordered, asked = np.sort(other), np.array(same)
    below = np.searchsorted(ordered, asked, "left") + np.searchsorted(ordered, asked, "right")
    return float(below.mean() / 2 / len(ordered))


@quiet()
def save_clip(clip: CLIPModel, folder: Path, size: int) -> None:
    """Write model and processor in transformers' format with float16 weights."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    with atomic_path(folder) as part:
        CLIPProcessor(processor, build_tokenizer()).save_pretrained(part)
        weights = {name: tensor.half() for name, tensor in clip.state_dict().items()}
        clip.save_pretrained(part, state_dict=weights)
        config = part / "config.json"
        write_json(config, read_json(config) | {"dtype": "float32"})
