"""Copies are found, and pictures that are none are not taken for them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from test_shots import film
from torch.nn.functional import normalize

from bunny_lora.core.seeding import generator
from bunny_lora.data.frames import Sample
from bunny_lora.evaluation import copies
from bunny_lora.evaluation.features import load_feature_extractor
from bunny_lora.evaluation.protocol import NEUTRAL, ImageSpec

CLUSTERS = [row // 4 for row in range(40)]


def vectors(n: int, name: str, around: torch.Tensor | None = None, spread: float = 1.0) -> torch.Tensor:
    noise = torch.randn((n, 16), generator=generator(0, name))
    return normalize(spread * noise + (around if around is not None else 1.0), dim=1)


def test_pictures_like_held_out_frames_are_5_percent_copies_and_copies_are_all() -> None:
    shot = [row // 2 for row in range(400)]
    scenes = vectors(200, "scenes").repeat_interleave(2, dim=0)
    views = vectors(400, "views", around=scenes, spread=0.02)
    held_out = copies.held_out_similarity(views, shot)
    fresh = torch.cat([vectors(40, f"fresh {i}") @ views.T for i in range(10)]).max(1).values
    found = copies.share_above(fresh, CLUSTERS * 10, held_out, shot)
    assert 0.01 < found.mean < 0.15 and found.low < found.mean < found.high
    near = (vectors(40, "copies", around=views[:40], spread=0.02) @ views.T).max(1).values
    found = copies.share_above(near, CLUSTERS, held_out, shot)
    assert found.mean == found.low == 1
    assert not len(copies.held_out_similarity(views[:3], [0, 0, 0]))


def test_the_same_picture_for_every_prompt_is_above_the_data() -> None:
    different, alike = vectors(40, "different"), vectors(40, "alike", vectors(1, "one"), 0.05)
    loose, same = (copies.cross_similarity(rows, CLUSTERS) for rows in (different, alike))
    assert loose.high < same.low and same.n == 40
    assert copies.cross_similarity(alike[:4], CLUSTERS[:4]) is None


def test_views_are_the_squares_faces_and_mirror_images_that_training_draws(tmp_path: Path) -> None:
    image = Image.new("RGB", (96, 48))
    for x in range(96):
        image.paste((int(2.5 * x), 0, 0), (x, 0, x + 1, 48))
    image.save(path := tmp_path / "ramp.png")
    sample = Sample("ramp", path, "rex", ("rex",), faces=((40, 10, 50, 20),), size=(96, 48))
    config = tiny_config("random-tiny", resolution=48, center_crop=False)
    mean = [
        float(np.asarray(view)[..., 0].mean())
        for view in copies.views_of(copies.dataset_of([sample], config), config, 0)
    ]
    assert mean == sorted(mean) and len(mean) == copies.N_SQUARES
    assert mean[0] == pytest.approx(59, abs=3) and mean[-1] == pytest.approx(179, abs=3)
    for changes, n in (
        ({"zoom_on_faces": True}, 6),
        ({"zoom_on_faces": True, "random_flip": True}, 12),
        ({"zoom_on_faces": "only", "random_flip": True}, 2),
        ({"center_crop": True}, 1),
    ):
        config = tiny_config("random-tiny", **{"resolution": 48, "center_crop": False} | changes)
        views = copies.views_of(copies.dataset_of([sample], config), config, 0)
        assert len(views) == n and {view.size for view in views} == {(48, 48)}


def test_a_frame_learnt_by_heart_is_named_with_the_view_that_it_is(tmp_path: Path) -> None:
    samples = film(tmp_path / "film", [("rex",)] * 5)
    config = tiny_config("random-tiny", resolution=48)
    extractor = load_feature_extractor("palette")
    plan, images = [], []
    for model in ("base", "final"):
        for prompt in range(4):
            plan.append(ImageSpec(model, "rex", prompt, f"prompt {prompt}", 1))
            views = copies.views_of(copies.dataset_of(samples, config), config, 3 * prompt)
            grey = Image.new("RGB", (48, 48), (90, 90, 90 + 30 * prompt))
            images.append(views[0] if model == "final" else grey)
        plan.append(ImageSpec(model, NEUTRAL, 0, "nobody", 1))
        images.append(images[-1])
    found = copies.copies_of(tmp_path, config, samples, extractor, plan, extractor(images))
    assert found.above["base"].mean < found.above["final"].mean == 1
    assert {view.frame for view in found.nearest} == {f"{shot:02d}_0.png" for shot in range(4)}
    assert all(view.similarity == pytest.approx(1, abs=1e-3) for view in found.nearest)
    assert all((tmp_path / "evaluation" / view.view).is_file() for view in found.nearest)
    assert found.sameness["rex"].pictures.n == 4 and found.sameness["rex"].training is not None
