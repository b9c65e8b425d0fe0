import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from bunny_lora.errors import BunnyLoraError
from bunny_lora.world.learner import learning_rate
from bunny_lora.world.pretrain_data import Renders, batches
from bunny_lora.world.pretrain_vae import pretrain_vae

TINY_VAE = {
    "size": 32,
    "channels": (8, 8, 8, 8),
    "batch_size": 2,
    "max_steps": 4,
    "report": lambda _: None,
}


def state_of(folder, name):
    return load_file(folder / name)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_rate_rises_and_falls_to_zero():
    rates = [learning_rate(step, 3000, 1.0) for step in range(3000)]
    assert rates[0] < 0.01 and rates[1000] == 1.0 and rates[-1] < 0.01
    assert max(rates) == 1.0


def test_batches_do_not_depend_on_where_one_starts():
    renders = Renders(0, 32)
    everything = [images for images, _ in batches(renders, 0, 4, 2)]
    later = [images for images, _ in batches(renders, 2, 4, 2)]
    assert len(everything) == 4 and everything[0].shape == (2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(everything[2:], later, strict=True))


def test_vae_training_resumes_as_if_never_stopped(tmp_path):
    pretrain_vae(tmp_path / "whole", **TINY_VAE)
    pretrain_vae(tmp_path / "parts", **TINY_VAE, stop_at=2)
    folder = pretrain_vae(tmp_path / "parts", **TINY_VAE)
    name = "vae_state.safetensors"
    assert same(state_of(tmp_path / "whole", name), state_of(tmp_path / "parts", name))
    vae = AutoencoderKL.from_pretrained(folder)
    assert vae.config.latent_channels == 4 and vae.config.scaling_factor > 0
    latents = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode()
    assert latents.shape == (1, 4, 4, 4)


def test_other_settings_are_refused(tmp_path):
    pretrain_vae(tmp_path, **TINY_VAE, stop_at=1)
    with pytest.raises(BunnyLoraError, match="other settings"):
        pretrain_vae(tmp_path, **TINY_VAE, seed=1)
