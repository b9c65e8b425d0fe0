"""How good the shipped models are: every figure of the model card, measured anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from transformers import CLIPModel

from bunny_lora.core.files import atomic_path, write_json
from bunny_lora.core.seeding import generator
from bunny_lora.model.quiet import quiet
from bunny_lora.world import attributes
from bunny_lora.world.attributes import HEROES, REGULARS
from bunny_lora.world.captions import plain_caption
from bunny_lora.world.pretraining.clip import hero_views, image_vectors, same_hero_auc
from bunny_lora.world.pretraining.data import heldout, heldout_seed, hero_images
from bunny_lora.world.pretraining.lessons import made_up_name
from bunny_lora.world.pretraining.reader import shares_right, single_picture
from bunny_lora.world.pretraining.vae import psnr, reconstruct
from bunny_lora.world.traits import load_reader

GUIDANCE_SCALE, N_STEPS = 4.0, 20
ASKED = ("species", "fur", "eyes", "outfit", "outfit_colour", "place", "light", "pose")
"""What a plain caption says of a picture."""
_BATCH = 10


def measure(
    weights_dir: Path,
    out_dir: Path,
    *,
    n_images: int = 500,
    n_heldout: int = 250,
    n_pairs: int = 100,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the models in `weights_dir` and return what `quality.json` then holds.

    Args:
        weights_dir: where `sd/`, `clip/` and `reader/` lie.
        out_dir: receives `quality.json`, `samples.png`, `reconstructions.png`.
        n_images: pictures to have drawn from prompts, read by the reader.
        n_heldout: renders that nothing was trained on, for the autoencoder.
        n_pairs: pictures of each hero, and with each hero's name.
        seed: that of pretraining; everything here comes from seeds that it never used.
        report: receives a line of progress now and then.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with quiet():
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            weights_dir / "sd", safety_checker=None, requires_safety_checker=False
        )
        clip = CLIPModel.from_pretrained(weights_dir / "clip").eval()
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.vae.config.sample_size

    found: dict[str, Any] = {"vae": _measure_vae(pipeline, seed, size, n_heldout, out_dir)}
    report(f"vae: {found['vae']}")
    heroes, truths = hero_views(seed, size, n_pairs)
    vectors = image_vectors(clip, heroes)
    found["clip"] = {"same_hero_auc": round(same_hero_auc(vectors, truths), 4), "n_images": len(heroes)}
    report(f"clip: {found['clip']}")

    reader = load_reader(weights_dir / "reader")
    asked = [single_picture(heldout_seed(seed) + 1, index) for index in range(n_images)]
    images = _draw_all(pipeline, [plain_caption(picture) for picture in asked], seed, report)
    follows = shares_right(reader.read(images), asked)
    found["base_model"] = {
        "n_images": n_images,
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": N_STEPS,
        "follows_the_prompt": {name: follows[name] for name in ASKED},
    }
    report(f"base model: {found['base_model']}")
    save_sheet(images[:48], out_dir / "samples.png", n_columns=12)
    found["heroes"] = _measure_names(pipeline, clip, vectors, n_pairs, seed, report)
    write_json(out_dir / "quality.json", found)
    return found


def _measure_vae(
    pipeline: diffusers.StableDiffusionPipeline, seed: int, size: int, n: int, out_dir: Path
) -> dict[str, float]:
    unseen, heroes = heldout(seed, size, n), hero_images(seed, size, -(-n // 4))
    shown = torch.cat([unseen[:6], heroes[:: len(heroes) // 6][:6]])
    save_sheet(
        torch.cat([shown, reconstruct(pipeline.vae, shown)]),
        out_dir / "reconstructions.png",
        n_columns=12,
    )
    return {
        "psnr_db": round(psnr(pipeline.vae, unseen), 2),
        "psnr_heroes_db": round(psnr(pipeline.vae, heroes), 2),
        "n_images": n,
    }


def _measure_names(
    pipeline: diffusers.StableDiffusionPipeline,
    clip: CLIPModel,
    vectors: torch.Tensor,
    n_each: int,
    seed: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Return how like each hero the base model's pictures are, by the hero's name and by others.

    `vectors` are those of `n_each` renders of each hero. All names get the same scenes and noise: the
    hero's, those of the regulars, and names made up on the spot, which mean a random character.
    """
    rng = attributes.generator(seed, "made-up names", 0)
    others = {
        "made_up": [made_up_name(rng) for _ in range(n_each)],
        "regulars": list(REGULARS.values()),
    }
    found = {}
    for row, hero in enumerate(HEROES):
        of_hero = vectors[row * n_each : (row + 1) * n_each]
        centre = torch.nn.functional.normalize(of_hero.mean(0), dim=0)

        def similarity(
            names: Sequence[str], row: int = row, centre: torch.Tensor = centre
        ) -> torch.Tensor:
            prompts = list(_name_prompts(names, n_each, seed))
            return image_vectors(clip, _draw_all(pipeline, prompts, seed + 1 + row, report)) @ centre

        by_own = similarity([hero])
        found[hero] = {"likeness_by_own_name": round(float(by_own.mean()), 3)}
        for kind, names in others.items():
            by_others = similarity(names)
            gain = by_own - by_others
            found[hero] |= {
                f"likeness_by_{kind}_names": round(float(by_others.mean()), 3),
                f"gain_over_{kind}_95_percent": round(1.96 * float(gain.std()) / len(gain) ** 0.5, 3),
            }
        found[hero]["likeness_of_renders"] = round(float((of_hero @ centre).mean()), 3)
    report(f"heroes: {found}")
    return found


def _name_prompts(names: Sequence[str], n: int, seed: int) -> Iterator[str]:
    for index in range(n):
        picture = single_picture(heldout_seed(seed) + 2, index)
        (character,) = picture.characters
        name = names[index % len(names)]
        yield f"{name}, animated character, {character.pose}, {picture.scene.place}, medium shot"


def _draw_all(
    pipeline: diffusers.StableDiffusionPipeline,
    prompts: list[str],
    seed: int,
    report: Callable[[str], None],
) -> torch.Tensor:
    """Return one picture a prompt, uint8 [N, 3, H, W]; each has a seed of its own."""
    images = []
    for first in range(0, len(prompts), _BATCH):
        chunk = prompts[first : first + _BATCH]
        rngs = [generator(seed, "world quality", first + slot) for slot in range(len(chunk))]
        drawn = pipeline(
            chunk,
            num_inference_steps=N_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=rngs,
            output_type="pt",
        ).images
        images.append((drawn * 255).round().to(torch.uint8))
        if (first + _BATCH) % 100 == 0:
            report(f"drew {first + _BATCH} of {len(prompts)}")
    return torch.cat(images)


def save_sheet(images: torch.Tensor, path: Path, n_columns: int) -> None:
    """Write uint8 images [N, 3, H, W] as one PNG, row by row."""
    rows = [torch.cat(list(row), dim=2) for row in images.split(n_columns)]
    sheet = torch.cat([row for row in rows if row.shape == rows[0].shape], dim=1)
    with atomic_path(path) as part:
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(part, format="PNG")
