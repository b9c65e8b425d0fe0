"""Latents: encoded once, cached by everything that matters, drawn by position."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_frames
from diffusers import AutoencoderKL
from PIL import Image

from bunny_lora.core.files import write_json
from bunny_lora.data.summary import SCHEMA_VERSION, SUMMARY
from bunny_lora.dataset import ImageDataset
from bunny_lora.training import latents

N_IMAGES = 5


@pytest.fixture(scope="module")
def vae(tiny_model: str) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_model, subfolder="vae").requires_grad_(False).eval()


def encode(vae: AutoencoderKL, folder: Path, **options: object) -> latents.EncodedImages:
    center_crop = options.pop("center_crop", True)
    images = ImageDataset(folder, resolution=32, center_crop=center_crop)
    return latents.encode_dataset(vae, images, folder.parent / "cache", **options)


def moments(encoded: latents.EncodedImages) -> list[torch.Tensor]:
    return [view.latent_dist for views in encoded.views for view in views]


def without_noise(encoded: latents.EncodedImages) -> latents.EncodedImages:
    """Sampling from these latents gives their means."""
    views = [
        [
            replace(v, latent_dist=torch.stack([v.latent_dist[0], torch.zeros_like(v.latent_dist[1])]))
            for v in image
        ]
        for image in encoded.views
    ]
    return replace(encoded, views=views)


@pytest.fixture
def folder(project: Path) -> Path:
    return draw_frames(project / "data" / "instance_images", N_IMAGES)


def test_latents_are_what_the_vae_says(vae: AutoencoderKL, folder: Path) -> None:
    encoded = encode(vae, folder)
    pixels = ImageDataset(folder, resolution=32, center_crop=True)[2][None]
    expected = vae.encode(pixels).latent_dist
    mean, std = encoded.views[2][0].latent_dist
    torch.testing.assert_close(mean, expected.mean[0] * vae.config.scaling_factor)
    torch.testing.assert_close(std, expected.std[0] * vae.config.scaling_factor)


def test_a_second_run_reads_the_cache_and_gets_the_same(
    vae: AutoencoderKL, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(vae, folder)
    monkeypatch.setattr(latents, "encode_images", None)
    second = encode(vae, folder)
    assert all(torch.equal(a, b) for a, b in zip(moments(first), moments(second), strict=True))


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
    assert all(torch.equal(a, b) for a, b in zip(moments(plain), moments(loaded), strict=True))


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
    assert all(len(views) == 2 for views in encoded.views)
    pixels = ImageDataset(folder, resolution=32, center_crop=True)[0].flip(-1)[None]
    mirrored = vae.encode(pixels).latent_dist.mean[0] * vae.config.scaling_factor
    torch.testing.assert_close(encoded.views[0][1].latent_dist[0], mirrored)


def test_without_centre_crop_the_whole_frame_is_seen(vae: AutoencoderKL, folder: Path) -> None:
    encoded = encode(vae, folder, center_crop=False)
    whole = moments(encoded)[0]
    assert whole.shape == (2, 4, 4, 7), "96 x 54 frames at 32 px are 56 x 32"
    still = without_noise(encoded)
    crops = {still.batch(0, p, 1, 1000).latents.numpy().tobytes() for p in range(0, 200)}
    assert len(crops) == 4 * N_IMAGES, "each of the four places of the square in the frame comes up"


# ---------------------------------------------------------------------------- faces


def know(folder: Path, **facts: tuple[list[str], list[list[float]]]) -> None:
    """Write down who is in some of the 96 x 54 frames, and where the faces are."""
    images = [
        {"file_name": f"{name}.png", "characters": who, "faces": faces, "size": [96, 54]}
        for name, (who, faces) in facts.items()
    ]
    summary = {"schema_version": SCHEMA_VERSION, "images": images}
    write_json(folder.parent / SUMMARY, summary)


def names(folder: Path) -> list[str]:
    images = ImageDataset(folder, resolution=32, center_crop=True)
    return [sample.path.stem for sample in images.samples]


def test_a_square_of_a_frame_holds_all_faces_or_one(vae: AutoencoderKL, folder: Path) -> None:
    """Latents are 7 x 4, squares 4 x 4: what is at the left and right edges does not fit in one."""
    right, both, near = names(folder)[:3]
    at_right, at_left = [75.0, 10.0, 85.0, 20.0], [2.0, 10.0, 12.0, 20.0]
    in_third, in_fifth = [30.0, 10.0, 40.0, 20.0], [60.0, 30.0, 66.0, 40.0]
    know(folder, **{
        right: (["ellie"], [at_right]), both: ([], [at_right, at_left]),
        near: ([], [in_fifth, in_third]),
    })  # fmt: skip
    for mirrored in (False, True):
        encoded = encode(vae, folder, center_crop=False, random_flip=mirrored)
        for index, places in ((0, {3}), (1, {0, 3}), (2, {1, 2})):
            view = encoded.views[index][int(mirrored)]
            mean = view.latent_dist[0]
            drawn = {encoded._place(mean, view.faces, rng(i)) for i in range(40)}
            left = {3 - place if mirrored else place for place in places}
            assert drawn == {(x, 0) for x in left}


def test_latents_that_an_older_version_cached_are_found_again(folder: Path) -> None:
    """The key is what commit 942fb87 made of the same; another one costs an encoding of everything."""
    for picture in folder.glob("*.png"):
        picture.write_bytes(picture.name.encode())
    first = names(folder)[0]
    know(folder, **{first: (["ellie"], [[60, 20.5, 68, 28]])})
    images = ImageDataset(folder, resolution=32, center_crop=False)
    views = [latents.View(0, False, False), latents.View(1, False, True)]
    vae: Any = SimpleNamespace(
        dtype=torch.float32,
        config=SimpleNamespace(scaling_factor=0.18215),
        state_dict=lambda: {"weight": torch.arange(4.0)},
    )
    assert latents._key(vae, images, views) == "69f20d248735629df9a70de33fdf025f"
    views.append(latents.View(0, True, False))  # Views from near were wider then.
    assert latents._key(vae, images, views) != "9a0076da150174c0ef0052f0fb49df56"


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_zooming_shows_the_only_face_from_near(vae: AutoencoderKL, folder: Path) -> None:
    alone, two, nameless, faceless = names(folder)[:4]
    face = [60.0, 20.0, 68.0, 28.0]
    know(folder, **{
        alone: (["ellie"], [face]), two: (["ellie"], [face, face]), nameless: ([], [face]),
        faceless: (["rex"], []),
    })  # fmt: skip
    encoded = encode(vae, folder, zoom_on_faces=True, center_crop=False)
    assert [len(views) for views in encoded.views] == [2, 1, 1, 1, 1]
    near = ImageDataset(folder, resolution=32, center_crop=False).zoomed(0)
    with Image.open(folder / f"{alone}.png") as frame:
        by_hand = frame.convert("RGB").crop((48, 8, 80, 40))
    torch.testing.assert_close(
        (near + 1) * 127.5, torch.tensor(np.array(by_hand)).permute(2, 0, 1).float()
    )
    expected = vae.encode(near[None]).latent_dist.mean[0] * vae.config.scaling_factor
    torch.testing.assert_close(encoded.views[0][1].latent_dist[0], expected, rtol=1e-4, atol=1e-4)
    plain = encode(vae, folder, center_crop=False)
    assert [len(views) for views in plain.views] == [1] * N_IMAGES
    only = encode(vae, folder, zoom_on_faces="only", center_crop=False)
    assert [[view.zoomed for view in views] for views in only.views] == [[True], *[[False]] * 4]
    assert torch.equal(only.views[0][0].latent_dist, encoded.views[0][1].latent_dist)


def test_pictures_come_as_often_as_they_repeat(vae: AutoencoderKL, folder: Path) -> None:
    images = ImageDataset(folder, resolution=32, center_crop=True)
    captions = [sample.caption for sample in images.samples]
    repeats = [3, 1, 2, 1, 1]
    encoded = latents.encode_dataset(vae, images, folder.parent / "cache", repeats=repeats)
    for epoch in range(2):
        seen = Counter(encoded.batch(0, 8 * epoch, 8, 1000).captions)
        assert [seen[caption] for caption in captions] == repeats
    assert seen == Counter(encoded.batch(0, 8, 8, 1000).captions)


def test_who_is_rare_is_shown_more_often(folder: Path) -> None:
    who = [["ellie"], ["ellie", "phil"], ["ellie"], [], ["ellie", "rex"]]
    know(folder, **{name: (seen, []) for name, seen in zip(names(folder), who, strict=True)})
    images = ImageDataset(folder, resolution=32, center_crop=True)
    assert images.repeats() == [1, 4, 1, 1, 4]
    images.samples = [replace(sample, characters=()) for sample in images.samples]
    assert images.repeats() == [1] * N_IMAGES


def test_parts_of_captions_are_left_out_but_never_the_first(vae: AutoencoderKL, folder: Path) -> None:
    images = ImageDataset(folder, resolution=32, center_crop=True)
    caption = "ellie, bunny, snow, running"
    images.samples = [replace(sample, caption=caption) for sample in images.samples]
    cache = folder.parent / "cache"
    encoded = latents.encode_dataset(vae, images, cache, tag_dropout=0.5)
    seen = encoded.batch(0, 0, 400, 1000).captions
    assert all(caption.split(", ")[0] == "ellie" for caption in seen) and len(set(seen)) == 8
    assert 0.45 < sum("snow" in caption for caption in seen) / 400 < 0.55
    assert seen == encoded.batch(0, 0, 400, 1000).captions
    whole = latents.encode_dataset(vae, images, cache)
    assert whole.batch(0, 0, 20, 1000).captions == [caption] * 20
    assert torch.equal(whole.batch(0, 0, 20, 1000).noise, encoded.batch(0, 0, 20, 1000).noise)


def test_whole_captions_are_left_out_and_nothing_else_changes(vae: AutoencoderKL, folder: Path) -> None:
    cache = folder.parent / "cache"
    options = {"tag_dropout": 0.3, "random_flip": True}
    images = ImageDataset(folder, resolution=32, center_crop=False)
    plain, dropping = (
        latents.encode_dataset(vae, images, cache, caption_dropout=chance, **options)
        for chance in (0.0, 0.25)
    )
    before, now = (encoded.batch(0, 0, 400, 1000) for encoded in (plain, dropping))
    assert "" not in before.captions and 0.2 < now.captions.count("") / 400 < 0.3
    assert all(b in ("", a) for a, b in zip(before.captions, now.captions, strict=True))
    assert torch.equal(before.latents, now.latents) and torch.equal(before.noise, now.noise)
    assert dropping.batch(0, 100, 9, 1000).captions == now.captions[100:109]


def test_a_part_with_a_known_name_is_never_left_out(vae: AutoencoderKL, folder: Path) -> None:
    images = ImageDataset(folder, resolution=32, center_crop=True)
    caption = "ellie, snow, Rex the fox, trex, phil"
    names = [("ellie", "rex"), *[("phil",)] * (N_IMAGES - 1)]
    pairs = zip(images.samples, names, strict=True)
    images.samples = [replace(sample, caption=caption, characters=who) for sample, who in pairs]
    encoded = latents.encode_dataset(vae, images, folder.parent / "cache", tag_dropout=0.9)
    drawn = encoded.batch(0, 0, 100, 1000).captions
    seen = Counter(part for text in drawn for part in text.split(", "))
    assert seen["ellie"] == seen["Rex the fox"] == seen["phil"] == 100
    assert seen["snow"] < 30 and seen["trex"] < 30


@pytest.mark.parametrize(
    "comma", [", ", ",", "\N{FULLWIDTH COMMA}", "\N{IDEOGRAPHIC COMMA}", " ,", ",, "]
)
def test_parts_are_found_between_commas_of_every_kind(
    vae: AutoencoderKL, folder: Path, comma: str
) -> None:
    images = ImageDataset(folder, resolution=32, center_crop=True)
    parts = ["ellie", "bunny", "1,000 flakes", "running"]
    images.samples = [replace(sample, caption=comma.join(parts)) for sample in images.samples]
    cache = folder.parent / "cache"
    encoded = latents.encode_dataset(vae, images, cache, tag_dropout=0.5)
    seen = set(encoded.batch(0, 0, 400, 1000).captions)
    kept = [
        [part for i, part in enumerate(parts) if not i or bits >> i & 1] for bits in range(0, 16, 2)
    ]
    assert encoded.has_parts and seen == {comma.join(some) for some in kept}


@pytest.mark.parametrize("caption", ["ellie in the snow", "1,000 flakes", "ellie, and ellie", "ellie,"])
def test_captions_with_nothing_to_leave_out_are_known(
    vae: AutoencoderKL, folder: Path, caption: str
) -> None:
    images = ImageDataset(folder, resolution=32, center_crop=True)
    images.samples = [replace(s, caption=caption, characters=("ellie",)) for s in images.samples]
    encoded = latents.encode_dataset(vae, images, folder.parent / "cache", tag_dropout=0.9)
    assert not encoded.has_parts
    assert encoded.batch(0, 0, 5, 1000).captions == [caption] * 5
