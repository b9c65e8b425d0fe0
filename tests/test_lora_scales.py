"""Samples of one batch at LoRA scales of their own are predicted as each would be alone."""

import pytest
import torch
from conftest import draw_frames
from peft.tuners.lora import LoraLayer
from test_preservation import loaded, moved

from bunny_lora.model.fast import lora as fast_lora
from bunny_lora.model.lora_scales import lora_scales

SCALES = [0.0, 1.0, 0.5, 1.0]


@pytest.fixture
def run(tiny_model, project):
    draw_frames(project / "data" / "instance_images", 4)
    lora = {"target_modules": "all", "train_text_encoder": True}
    run = loaded(tiny_model, 0.0, lora=lora)
    for model in run.state.models.values():
        moved(model)
    return run


@pytest.mark.parametrize("fast", [False, True])
def test_a_batch_of_several_scales_is_as_each_sample_alone(run, fast):
    if fast:
        fast_lora.install(run.parts.unet)
    batch = run.learner._batch(run.learner.images, 0)
    noise, timesteps = batch.noise[:1].repeat(4, 1, 1, 1), torch.tensor([10, 300, 600, 900])
    captions = ["ellie", "ellie, waving", "", "ellie"]
    together = run.learner.predict(noise, timesteps, captions, SCALES)
    alone = [
        run.learner.predict(noise[i : i + 1], timesteps[i : i + 1], captions[i : i + 1], [scale])
        for i, scale in enumerate(SCALES)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)
    as_it_is = run.learner.predict(noise, timesteps, captions, [1] * 4)
    moved_by = (together - as_it_is).detach().abs().amax((1, 2, 3))
    assert [by > 1e-2 for by in moved_by.tolist()] == [True, False, True, False]


def test_afterwards_the_model_is_as_before_whatever_happens(run):
    models = run.state.models.values()
    modules = [module for model in models for module in model.modules()]
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    settings = [dict(layer.scaling) for layer in layers]
    for scales in (SCALES, [0.0], [0.5, 0.5]):
        with pytest.raises(KeyError), lora_scales(models, scales):
            raise KeyError
    assert not any(module._forward_hooks for module in modules)
    assert [dict(layer.scaling) for layer in layers] == settings
    assert not any(layer.disable_adapters for layer in layers)
