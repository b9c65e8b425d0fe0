"""Latents: encoded once, cached by everything that matters, drawn by position."""

from pathlib import Path

import pytest
import torch
from conftest import draw_frames
from diffusers import AutoencoderKL

from bunny_lora import latents
from bunny_lora.dataset import ImageDataset

N_IMAGES = 5


@pytest.fixture(scope="module")
def vae(tiny_model: str) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_model, subfolder="vae").requires_grad_(False).eval()


def encode(vae: AutoencoderKL, folder: Path, **options: object) -> latents.EncodedImages:
    center_crop = options.pop("center_crop", True)
    images = ImageDataset(folder, resolution=32, center_crop=center_crop)
    return latents.encode_dataset(vae, images, images.captions, folder.parent / "cache", **options)


@pytest.fixture
def folder(project: Path) -> Path:
    return draw_frames(project / "data" / "instance_images", N_IMAGES)


def test_latents_are_what_the_vae_says(vae: AutoencoderKL, folder: Path) -> None:
    encoded = encode(vae, folder)
    pixels = ImageDataset(folder, resolution=32, center_crop=True)[2][None]
    expected = vae.encode(pixels).latent_dist
    mean, std = encoded.moments[2][0]
    torch.testing.assert_close(mean, expected.mean[0] * vae.config.scaling_factor)
    torch.testing.assert_close(std, expected.std[0] * vae.config.scaling_factor)


def test_a_second_run_reads_the_cache_and_gets_the_same(
    vae: AutoencoderKL, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(vae, folder)
    monkeypatch.setattr(latents, "encode_images", None)
    second = encode(vae, folder)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first.moments, second.moments, strict=True))


def test_a_changed_picture_crop_or_vae_is_encoded_anew(vae: AutoencoderKL, folder: Path) -> None:
    cache = folder.parent / "cache"
    encode(vae, folder)
    draw_frames(folder, N_IMAGES, seed=1)
    encode(vae, folder)
    assert len(list(cache.iterdir())) == 2
    encode(vae, folder, center_crop=False)
    encode(vae, folder, random_flip=True)
    assert len(list(cache.iterdir())) == 4
    other = AutoencoderKL.from_config(vae.config).requires_grad_(False).eval()
    encode(other, folder)
    assert len(list(cache.iterdir())) == 5


def test_workers_and_pinned_memory_change_no_value(vae: AutoencoderKL, folder: Path) -> None:
    plain = encode(vae, folder)
    (folder.parent / "cache").rename(folder.parent / "first")
    loaded = encode(vae, folder, num_workers=1, pin_memory=True)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain.moments, loaded.moments, strict=True))


def test_a_batch_is_its_samples_whatever_the_batch_size(vae: AutoencoderKL, folder: Path) -> None:
    encoded = encode(vae, folder)
    batch = encoded.batch(seed=1, position=3, count=4, num_train_timesteps=1000)
    singles = [encoded.batch(1, position, 1, 1000) for position in range(3, 7)]
    for name in ("latents", "noise", "timesteps"):
        joined = torch.cat([getattr(single, name) for single in singles])
        assert torch.equal(getattr(batch, name), joined)
    assert batch.captions == [single.captions[0] for single in singles]


def test_each_epoch_shows_every_image_once(vae: AutoencoderKL, folder: Path) -> None:
    encoded = encode(vae, folder)
    for epoch in range(3):
        captions = encoded.batch(0, epoch * N_IMAGES, N_IMAGES, 1000).captions
        assert sorted(captions) == sorted(encoded.captions)


def test_seed_position_and_stream_each_change_the_noise(vae: AutoencoderKL, folder: Path) -> None:
    training, other = encode(vae, folder), encode(vae, folder, stream="class")
    noises = [
        encoded.batch(seed, position, 1, 1000).noise
        for encoded, seed, position in [
            (training, 0, 0),
            (training, 1, 0),
            (training, 0, 1),
            (other, 0, 0),
        ]
    ]
    assert len({noise.numpy().tobytes() for noise in noises}) == 4


def test_noise_is_standard_normal_and_timesteps_cover_the_schedule(
    vae: AutoencoderKL, folder: Path
) -> None:
    batch = encode(vae, folder).batch(0, 0, 1000, 1000)
    assert batch.noise.mean().abs() < 0.02 and (batch.noise.std() - 1).abs() < 0.02
    assert batch.timesteps.min() < 20 and batch.timesteps.max() > 980
    assert (batch.timesteps.float().mean() - 499.5).abs() < 40


def test_random_flip_draws_both_mirror_images(vae: AutoencoderKL, folder: Path) -> None:
    encoded = encode(vae, folder, random_flip=True)
    assert all(len(variants) == 2 for variants in encoded.moments)
    pixels = ImageDataset(folder, resolution=32, center_crop=True)[0].flip(-1)[None]
    mirrored = vae.encode(pixels).latent_dist.mean[0] * vae.config.scaling_factor
    torch.testing.assert_close(encoded.moments[0][1][0], mirrored)


def test_without_centre_crop_the_whole_frame_is_seen(vae: AutoencoderKL, folder: Path) -> None:
    encoded = encode(vae, folder, center_crop=False)
    whole = encoded.moments[0][0]
    assert whole.shape == (2, 4, 4, 7), "96 x 54 frames at 32 px are 56 x 32"
    no_noise = [[torch.stack([m[0][0], torch.zeros_like(m[0][1])])] for m in encoded.moments]
    still = latents.EncodedImages(no_noise, encoded.captions, 4, "training")
    crops = {still.batch(0, p, 1, 1000).latents.numpy().tobytes() for p in range(0, 200)}
    assert len(crops) == 4 * N_IMAGES, "each of the four places of the square in the frame comes up"
