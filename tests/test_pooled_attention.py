"""`training.pooled_attention`: the average that it says, in training alone, part of the identity."""

import re
from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.functional import scaled_dot_product_attention

from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import components
from bunny_lora.model.fast import choice, native, pooled
from bunny_lora.model.fast.attention import Shape
from bunny_lora.model.fast.choice import FastPath
from bunny_lora.model.fast.pooled import PooledAttnProcessor
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import approximation, fingerprint
from bunny_lora.training.fingerprint import Fingerprint

CPU = torch.device("cpu")


def trainer_of(model: str, project: Path, **training: object) -> LoRATrainer:
    if not (project / "data").exists():
        draw_frames(project / "data" / "instance_images", 3)
    wanted = {"max_train_steps": 2, "save_steps": 1, "validation_prompt": "ellie"} | training
    return LoRATrainer(config=tiny_config(model, resolution=64, training=wanted))


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)])
def test_it_averages_squares_and_what_is_left_of_them_at_the_edges(size: tuple[int, int]) -> None:
    height, width = size
    tokens = torch.randn(2, height * width, 3, generator=torch.Generator().manual_seed(1))
    found = pooled.averaged(tokens, size, 2)
    maps = tokens.view(2, height, width, 3)
    expected = [
        maps[:, y : y + 2, x : x + 2].flatten(1, 2).mean(1)
        for y in range(0, height, 2)
        for x in range(0, width, 2)
    ]
    assert pooled.n_averaged(size, 2) == len(expected)
    torch.testing.assert_close(found, torch.stack(expected, 1))


class Explicit(AttnProcessor2_0):
    """Keys and values computed for all tokens and averaged then, in plain torch."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = height, width

    def __call__(self, attn, hidden_states, *args, **kwargs):
        if args or hidden_states.shape[1] != self.size[0] * self.size[1]:
            return super().__call__(attn, hidden_states, *args, **kwargs)
        height, width = self.size

        def mean(x):
            squares = x.view(len(x), height // 2, 2, width // 2, 2, x.shape[-1])
            return squares.mean((2, 4)).flatten(1, 2)

        query, key, value = (
            x.view(len(x), -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)
            for x in (
                attn.to_q(hidden_states),
                mean(attn.to_k(hidden_states)),
                mean(attn.to_v(hidden_states)),
            )
        )
        out = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[0](out) / attn.rescale_output_factor


@pytest.mark.parametrize("is_native", [False, True])
def test_predictions_and_gradients_are_those_of_averaged_keys_and_values(
    tiny_model: str, project: Path, is_native: bool
) -> None:
    if is_native:
        try:
            native.library()
        except BunnyLoraError as error:
            pytest.skip(str(error))
    unet = components.load_components(tiny_model, CPU, torch.float32).unet
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 12, generator=random).requires_grad_()
    words = torch.randn(1, 77, unet.config.cross_attention_dim, generator=random).requires_grad_()

    def computed() -> list[torch.Tensor]:
        out = unet(latents, 5, words).sample
        return [out, *torch.autograd.grad(out.square().sum(), [latents, words])]

    exact, plain = computed(), unet.attn_processors
    features = unet.config.block_out_channels[0] // unet.config.attention_head_dim
    shapes = [Shape(96, 24, features)] if is_native else []
    choice.install(unet, FastPath(shapes, lora=False), 2)
    found = computed()
    choice.remove(unet)
    assert unet.attn_processors == plain
    assert not unet._forward_pre_hooks
    assert all(torch.equal(a, b) for a, b in zip(computed(), exact, strict=True))
    unet.set_attn_processor(
        {name: Explicit(8, 12) if "attn1" in name else p for name, p in plain.items()}
    )
    for a, b, c in zip(found, computed(), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(a, c, rtol=1e-3, atol=1e-4)


def test_the_fast_path_knows_how_many_keys_are_left(tiny_model: str) -> None:
    whole, left = (choice.shapes_of(Path(tiny_model), 64, factor) for factor in (1, 2))
    assert [(s.queries, s.keys) for s in whole[:2]] == [(64, 64), (64, 77)]
    assert [(s.queries, s.keys) for s in left[:2]] == [(64, 16), (64, 77)]
    assert whole[2:] == left[2:]


def test_training_averages_and_drawing_does_not(
    tiny_model: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, generate = [], components.generate

    def is_pooled(unet: torch.nn.Module) -> bool:
        return any(isinstance(p, PooledAttnProcessor) for p in unet.attn_processors.values())

    def watched(pipe, settings):
        seen.append(is_pooled(pipe.unet))
        return generate(pipe, settings)

    monkeypatch.setattr(components, "generate", watched)
    losses = []
    for factor in (None, 2):
        trainer = trainer_of(tiny_model, project, pooled_attention=factor)
        trainer.load()
        trainer.setup.set_training_mode(True)
        assert is_pooled(trainer.setup.parts.unet) == (factor == 2)
        losses.append(trainer.setup.learner.loss(0).item())
        trainer.generate_image("ellie")
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
    assert seen == [False, False]


def test_it_is_part_of_a_runs_identity(tiny_model: str) -> None:
    exact, averaged = (
        Fingerprint.of(tiny_config(tiny_model, training={"pooled_attention": x}), "") for x in (None, 2)
    )
    assert fingerprint.mathematical_differences(exact, averaged) == [
        "training.pooled_attention: None before, 2 now"
    ]
    before = {k: v for k, v in exact.settings.items() if k != "training.pooled_attention"}
    older = Fingerprint(before, "", exact.environment)
    assert not fingerprint.mathematical_differences(older, exact), "runs of before go on"


def test_a_model_with_nothing_to_average_is_refused(project: Path) -> None:
    draw_frames(project / "data" / "instance_images", 2)
    config = tiny_config("bunny-world", resolution=128, training={"pooled_attention": 2})
    with pytest.raises(BunnyLoraError, match="pooled_attention: 2 does nothing: bunny-world"):
        LoRATrainer(config=config).load()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_plan_says_how_far_it_moves_what_is_learnt(
    tiny_model: str, project: Path, precision: str
) -> None:
    trainer = trainer_of(tiny_model, project, pooled_attention=2, mixed_precision=precision)
    trainer.load()
    trainer.setup.set_training_mode(True)
    weights = trainer.setup.parts.unet.state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    text = approximation.describe(trainer.setup)
    moved = r"predictions by (\d+\.\d)% and LoRA gradients by (\d+\.\d)%"
    own = f"; bfloat16 itself, {moved}" * (precision == "bf16")
    found = re.fullmatch(f"pooled_attention: 2 moves {moved}{own}", text)
    assert found
    assert 0 < float(found[1]) < 100
    assert 0 < float(found[2]) < 100
    if own:
        assert float(found[3]) < float(found[1])
    after = trainer.setup.parts.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(
        isinstance(p, PooledAttnProcessor) for p in trainer.setup.parts.unet.attn_processors.values()
    )
    assert not trainer.setup.parts.unet.is_gradient_checkpointing


def test_an_exact_run_has_nothing_to_say(tiny_model: str, project: Path) -> None:
    trainer = trainer_of(tiny_model, project)
    trainer.load()
    assert approximation.describe(trainer.setup) == ""
