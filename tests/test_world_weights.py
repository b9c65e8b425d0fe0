"""The shipped weights: what is in them, that standard code loads them, and that they are good."""

import json

import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from transformers import CLIPModel, CLIPProcessor

from bunny_lora import inference
from bunny_lora.evaluation.features import load_feature_extractor
from bunny_lora.model import components
from bunny_lora.model.components import WORLD_WEIGHTS
from bunny_lora.world.attributes import CAMERAS, HEROES
from bunny_lora.world.pretraining.clip import hero_views, image_vectors, same_hero_auc
from bunny_lora.world.pretraining.data import heldout, hero_images
from bunny_lora.world.pretraining.sd import PROMPTS
from bunny_lora.world.pretraining.vae import psnr
from bunny_lora.world.traits import QUESTIONS

CLIP = WORLD_WEIGHTS / "clip"


def test_the_weights_are_small_float16_and_no_pickle() -> None:
    files = [path for path in WORLD_WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md", ".png"}
    for path in (path for path in files if path.suffix == ".safetensors"):
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, path


def test_the_autoencoder_keeps_pictures_of_any_character() -> None:
    vae = AutoencoderKL.from_pretrained(WORLD_WEIGHTS / "sd" / "vae").eval()
    assert vae.config.latent_channels == 4 and vae.config.sample_size == 128
    unseen = heldout(7, 128, 16)
    assert psnr(vae, unseen) > 29
    assert psnr(vae, hero_images(7, 128, 4)) > 28
    with torch.no_grad():
        latents = vae.encode(unseen.float() / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
    assert latents.shape == (16, 4, 16, 16) and 0.8 < latents.std() < 1.2


def test_the_judge_tells_heroes_apart_that_it_never_saw() -> None:
    clip = CLIPModel.from_pretrained(CLIP).eval()
    images, pictures = hero_views(7, 128, 20)
    assert same_hero_auc(image_vectors(clip, images), pictures) > 0.97


def test_the_base_model_draws_what_it_is_asked_for() -> None:
    """The judge, which reads both, finds each picture's prompt among all of them."""
    prompts = PROMPTS[:7]  # the last one names a hero, which says nothing yet
    parts = components.load_components("bunny-world", torch.device("cpu"), torch.float32)
    pipe = components.pipeline_from(parts, "bunny-world")
    settings = {"seed": 1, "num_inference_steps": 12, "guidance_scale": 4.0}
    settings |= {"width": 128, "height": 128}
    images = [inference.generate_image(pipe, prompt, **settings) for prompt in prompts]
    processor = CLIPProcessor.from_pretrained(CLIP)
    inputs = processor(text=list(prompts), images=images, return_tensors="pt", padding="max_length")
    with torch.no_grad():
        found = CLIPModel.from_pretrained(CLIP)(**inputs).logits_per_image.argmax(1)
    assert sum(int(i) == row for row, i in enumerate(found)) >= 6


def test_evaluation_finds_the_judge_by_its_name() -> None:
    images, pictures = hero_views(8, 128, 10)
    extractor = load_feature_extractor("bunny-world")
    vectors = extractor([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images])
    names = [picture.characters[0].name for picture in pictures]
    similarity = vectors @ vectors.T
    similarity.fill_diagonal_(-1)
    nearest = [names[int(i)] for i in similarity.argmax(1)]
    assert sum(a == b for a, b in zip(names, nearest, strict=True)) >= 36
    assert set(names) == set(HEROES)


def test_pictures_and_captions_go_through_the_processor() -> None:
    processor = CLIPProcessor.from_pretrained(CLIP)
    inputs = processor(text=["a grey rabbit"], images=Image.new("RGB", (640, 360)), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 128, 128) and inputs["input_ids"].shape[1] == 5
    with torch.no_grad():
        assert CLIPModel.from_pretrained(CLIP)(**inputs).logits_per_image.shape == (1, 1)


def test_the_model_card_says_what_was_measured() -> None:
    card = (WORLD_WEIGHTS / "README.md").read_text(encoding="utf-8")
    told = json.loads((WORLD_WEIGHTS / "quality.json").read_text(encoding="utf-8"))
    assert f"{told['vae']['psnr_db']:.2f} dB" in card
    assert f"{told['vae']['psnr_heroes_db']:.2f} dB" in card
    assert f"{told['clip']['same_hero_auc']:.4f}" in card
    shares = told["base_model"]["follows_the_prompt"]
    assert " | ".join(f"{share:.1%}" for share in shares.values()) in card
    for name, hero in told["heroes"].items():
        assert f"| {name} | {' | '.join(f'{value:.3f}' for value in hero.values())} |" in card


def test_the_model_card_says_how_well_the_reader_reads() -> None:
    card = (WORLD_WEIGHTS / "README.md").read_text(encoding="utf-8")
    shares = json.loads((WORLD_WEIGHTS / "reader" / "accuracy.json").read_text(encoding="utf-8"))
    for kind, said in (("renders", "renders"), ("reconstructions", "given back")):
        for camera in CAMERAS:
            row = " | ".join(f"{shares[kind][camera][name]:.1%}" for name in QUESTIONS)
            assert f"| {said}, {camera} | {row} |" in card


def test_the_weights_do_not_tell_where_they_were_made() -> None:
    assert not [path for path in WORLD_WEIGHTS.rglob("*.json") if "_name_or_path" in path.read_text()]
