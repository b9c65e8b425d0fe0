"""Wide pictures trained on uncut: sizes, batches of one size each, and a run that goes on."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT, draw_frames, tiny_config
from PIL import Image
from safetensors.torch import load_file

from bunny_lora.config import Config, load_config
from bunny_lora.core.files import write_json
from bunny_lora.data.buckets import bucket_of
from bunny_lora.data.summary import SCHEMA_VERSION, SUMMARY
from bunny_lora.dataset import ImageDataset
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import plan, sampler, setup
from bunny_lora.training.latents import EncodedImages


@pytest.mark.parametrize(
    "size, resolution, bucket",
    [
        ((640, 360), 512, (704, 384)),
        ((1920, 1080), 1024, (1344, 768)),
        ((360, 640), 512, (384, 704)),
        ((500, 500), 512, (512, 512)),
        ((500, 500), 520, (520, 520)),
        ((320, 176), 128, (160, 96)),
        ((400, 100), 512, (1024, 256)),
        ((96, 54), 32, (40, 24)),
    ],
)
def test_a_bucket_has_about_the_area_and_the_nearest_shape(
    size: tuple[int, int], resolution: int, bucket: tuple[int, int]
) -> None:
    assert bucket_of(size, resolution) == bucket
    assert 0.8 < bucket[0] * bucket[1] / resolution**2 < 1.25


PICTURES = {(4, 4): [0, 1, 2], (7, 4): [3, 4, 5, 6, 6]}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_picture_comes_equally_often_in_batches_of_one_size(count: int) -> None:
    n_batches = 8  # an era: as many as pictures
    seen: Counter[int] = Counter()
    for era in range(2):
        for batch in range(n_batches):
            position = (era * n_batches + batch) * count
            size, indices = sampler.bucketed_indices(1, PICTURES, position, count)
            assert len(indices) == count and set(indices) <= set(PICTURES[size])
            assert (size, indices) == sampler.bucketed_indices(1, PICTURES, position, count)
            seen.update(indices)
        assert seen == {i: (era + 1) * count * (2 if i == 6 else 1) for i in range(7)}
    orders = [[sampler.bucketed_indices(s, PICTURES, p, 1) for p in range(8)] for s in (1, 2)]
    assert orders[0] != orders[1]


@pytest.fixture
def data(project: Path) -> Path:
    """Two wide pictures, of which the first has a face to show from near, a tall and a square one."""
    folder = draw_frames(project / "data" / "instance_images", 4)
    pictures = sorted(folder.glob("*.png"))
    for path, size in zip(pictures[2:], [(54, 96), (60, 60)], strict=True):
        Image.new("RGB", size, "teal").save(path)
    images = [{"file_name": pictures[0].name, "characters": ["ellie"], "size": [96, 54]}]
    images[0]["faces"] = [[40, 10, 48, 18]]
    write_json(folder.parent / SUMMARY, {"schema_version": SCHEMA_VERSION, "images": images})
    return folder


BUCKETS = {"aspect_buckets": True, "zoom_on_faces": True}


def encoded(tiny_model: str, **changes: object) -> EncodedImages:
    return setup.set_up(tiny_config(tiny_model, **BUCKETS | changes)).learner.images


def test_samples_of_one_image_are_of_all_its_views(tiny_model: str, data: Path) -> None:
    images = encoded(tiny_model, **BUCKETS)
    for index, views in enumerate(images.views):
        batches = images.draws(0, index, 6, 1000, at_most=2)
        assert sum(len(batch.latents) for batch in batches) == 6
        assert max(len(batch.latents) for batch in batches) == 2
        assert {batch.latents.shape[2:] for batch in batches} == {
            v.latent_dist.shape[2:] for v in views
        }
        again = images.draws(0, index, 6, 1000, at_most=2)
        assert all(torch.equal(a.noise, b.noise) for a, b in zip(batches, again, strict=True))


def test_pictures_are_shown_whole_and_faces_in_squares(tiny_model: str, data: Path) -> None:
    images = encoded(tiny_model)
    sizes = [[view.size for view in views] for views in images.views]
    assert sizes == [[(5, 3), (4, 4)], [(5, 3)], [(3, 5)], [(4, 4)]]
    seen: Counter[tuple] = Counter()
    for number in range(16):
        batch = images.batch(0, 2 * number, 2, 1000)
        assert len(batch.captions) == 2 and batch.noise.shape == batch.latents.shape
        seen.update((caption, batch.latents.shape[2:]) for caption in batch.captions)
    first, *others = images.captions
    assert {n for (caption, _), n in seen.items() if caption in others} == {8}
    assert seen[first, (3, 5)] == seen[first, (4, 4)] == 4
    pixels = ImageDataset(data, resolution=32, center_crop=True, aspect_buckets=True)[0]
    assert pixels.shape == (3, 24, 40) and (pixels[:, 12, 5] != pixels[:, 0, 0]).any()


def test_class_images_of_another_size_have_a_loss_of_their_own(tiny_model: str, data: Path) -> None:
    learner = setup.set_up(tiny_config(tiny_model, **BUCKETS)).learner
    plain = [learner.loss(position) for position in range(6)]
    square = replace(learner.images, buckets=False, views=learner.images.views[3:], samples=
                     learner.images.samples[3:], repeats=None, stream="class")  # fmt: skip
    learner.class_images = square
    both = [learner.loss(position) for position in range(6)]
    assert all(torch.isfinite(loss) for loss in both) and all(
        a < b for a, b in zip(plain, both, strict=True)
    )


def test_latents_in_buckets_are_cached_apart(tiny_model: str, data: Path) -> None:
    encoded(tiny_model)
    encoded(tiny_model, aspect_buckets=False)
    encoded(tiny_model)
    assert len(list((data.parent / "latents").iterdir())) == 2


def test_near_duplicates_share_the_weight_of_one(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    pictures = sorted(data.glob("*.png"))
    for path in pictures[1:3]:
        path.write_bytes(pictures[0].read_bytes())
    config = tiny_config(tiny_model, thin_duplicates=True)
    images = setup.set_up(config).learner.images
    assert "thin_duplicates: 4 pictures count as 2" in capsys.readouterr().out
    assert images.repeats == [1, 1, 1, 3]
    pictures = ImageDataset(data, resolution=32, center_crop=True)
    assert plan.often(config, pictures, 12)[0] == [2, 2, 2, 6]


def test_characters_are_balanced_by_what_is_seen_of_them(data: Path) -> None:
    """Rex is named as often as ellie, but a middle square cuts him off in three of four."""
    images = ImageDataset(data, resolution=32, center_crop=True)
    at_left, middle = (0.0, 10.0, 8.0, 18.0), (44.0, 10.0, 52.0, 18.0)
    first = replace(images.samples[0], characters=("ellie", "rex"), size=(96, 54))
    images.samples = [replace(first, faces=(middle, at_left))] * 3 + [
        replace(first, faces=(middle,) * 2)
    ]
    assert images.repeats() == [1] * 4
    images.face_names = [("ellie", "rex")] * 4
    assert images.repeats() == [1, 1, 1, 4]
    assert images.repeats(balance=False) == [1] * 4
    assert images.repeats(groups=[0, 0, 2, 3]) == [1, 1, 2, 6]
    assert images.repeats(zoom=True) == [2] * 4  # rex, half as often as ellie, is now in all of them


def own_film(tiny_model: str) -> Config:
    """What `params/cpu.yaml` sets, on a model of toy size."""
    tiny = tiny_config(tiny_model, training={"mixed_precision": "no"}).model_dump(mode="json")
    keys = ("base_model", "data_dir", "output_dir", "resolution")
    training = {"max_train_steps": 1, "gradient_accumulation_steps": 1, "validation_prompt": []}
    overrides = {key: tiny[key] for key in keys} | {"training": training, "lora": {"rank": 2}}
    return load_config(CHECKOUT / "params" / "cpu.yaml", overrides)


def test_the_settings_for_a_film_of_ones_own_use_what_it_has(tiny_model: str, data: Path) -> None:
    learner = setup.set_up(own_film(tiny_model)).learner
    assert learner.images.buckets and [len(views) for views in learner.images.views] == [2, 1, 1, 1]
    assert all(torch.isfinite(learner.loss(position)) for position in range(4))


def test_what_they_find_nothing_to_work_on_is_said_and_does_no_harm(
    tiny_model: str, project: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = draw_frames(project / "data" / "instance_images", 2)
    (folder / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{path.name}", "text": "a bunny"}}\n' for path in folder.glob("*.png"))
    )
    LoRATrainer(config=own_film(tiny_model)).train()
    said = capsys.readouterr().out
    for key in ("zoom_on_faces", "balance_characters", "thin_duplicates", "caption_tag_dropout"):
        assert f"{key} does nothing: " in said


def test_a_run_in_buckets_goes_on_to_what_it_would_have_been(
    tiny_model: str, data: Path, project: Path
) -> None:
    def train(folder: str, steps: int) -> dict[str, torch.Tensor]:
        training = {"max_train_steps": steps, "batch_size": 2}
        config = tiny_config(tiny_model, output_dir=folder, training=training, **BUCKETS)
        return load_file(LoRATrainer(config=config).train() / "unet" / "adapter_model.safetensors")

    train("stopped", 2)
    whole, resumed = train("whole", 4), train("stopped", 4)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
