"""The figures of the model card, measured on models too small to be any good."""

import json

import pytest
from conftest import open_image

from bunny_lora.world.attributes import HEROES
from bunny_lora.world.pretraining import quality
from bunny_lora.world.pretraining.clip import pretrain_clip
from bunny_lora.world.pretraining.reader import pretrain_reader
from bunny_lora.world.pretraining.sd import pretrain_sd
from bunny_lora.world.pretraining.vae import pretrain_vae

SMALL = {"size": 32, "max_steps": 1, "batch_size": 2, "report": lambda _: None}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    pretrain_vae(folder, **SMALL, n_pictures=12, channels=(8, 8, 8, 8), n_heldout=4)
    pretrain_sd(folder, **SMALL, n_pictures=12, channels=(32, 32, 32), n_sample_steps=1)
    pretrain_clip(folder, **SMALL, width=16, n_layers=1, n_characters=8, n_heldout=2)
    pretrain_reader(folder, **SMALL, n_pictures=12, n_heldout=2)
    return folder


def test_every_figure_is_measured_and_measured_alike_again(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "N_STEPS", 2)
    small = {"n_images": 12, "n_heldout": 8, "n_pairs": 8, "report": lambda _: None}
    found = quality.measure(weights, tmp_path, **small)
    assert found == json.loads((tmp_path / "quality.json").read_text())
    assert 0 < found["vae"]["psnr_db"] < 30 and 0 < found["vae"]["psnr_heroes_db"] < 30
    assert 0 <= found["clip"]["same_hero_auc"] <= 1
    follows = found["base_model"]["follows_the_prompt"]
    assert set(follows) == set(quality.ASKED) and all(0 <= share <= 1 for share in follows.values())
    assert found["heroes"].keys() == HEROES.keys()
    assert open_image(tmp_path / "samples.png").size == (12 * 32, 32)
    assert open_image(tmp_path / "reconstructions.png").size == (12 * 32, 2 * 32)
    again = quality.measure(weights, tmp_path / "again", **small)
    assert again == found
