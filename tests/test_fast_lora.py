"""LoRA without casts computes what PEFT's layers do, and leaves no trace in the model."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from test_fast_attention import distance, prediction_and_gradients, together, unet_of

from bunny_lora.core.sections import LoRASection
from bunny_lora.model import adapters
from bunny_lora.model.fast.lora import install, lora_linear, remove
from bunny_lora.model.random_models import TINY

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def numbers(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (7, 5, 3, 2), (77, 40, 24, 8), (130, 33, 65, 4)], ids=str
)
@pytest.mark.parametrize("biased", [True, False])
def test_outputs_and_gradients_are_those_of_the_formula(size, dtype, biased):
    count, n_in, n_out, rank = size
    x = numbers(2, count, n_in, seed=0).to(dtype)
    weight = numbers(n_out, n_in, seed=1).to(dtype)
    bias = numbers(n_out, seed=2).to(dtype) if biased else None
    a, b = numbers(rank, n_in, seed=3), numbers(n_out, rank, seed=4)
    grad = numbers(2, count, n_out, seed=5).to(dtype)

    inputs = [y.clone().requires_grad_() for y in (x, a, b)]
    out = lora_linear(inputs[0], weight, bias, inputs[1], inputs[2], 1.5)
    ours = [out, *torch.autograd.grad(out, inputs, grad)]
    assert [y.dtype for y in ours] == [dtype, dtype, torch.float32, torch.float32]

    exact = [y.double().requires_grad_() for y in (x, a, b)]
    out = exact[0] @ weight.double().T + 1.5 * exact[0] @ exact[1].T @ exact[2].T
    out = out + bias.double() if biased else out
    true = [out, *torch.autograd.grad(out, exact, grad.double())]
    for y, z in zip(ours, true, strict=True):
        assert distance(y.detach(), z.detach()) < TOLERANCE[dtype], size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_unet_predicts_and_learns_the_same(dtype):
    unet = unet_of(dtype)
    plain = prediction_and_gradients(unet, dtype)
    install(unet)
    ours = prediction_and_gradients(unet, dtype)
    assert distance(ours[0], plain[0]) < TOLERANCE[dtype]
    assert 0 < distance(together(ours[1:]), together(plain[1:])) < TOLERANCE[dtype]
    assert all(grad.dtype == torch.float32 for grad in ours[1:])


def test_with_adapters_off_it_predicts_as_the_base_model():
    unet = unet_of(torch.float32)
    install(unet)
    for layer in filter(lambda x: isinstance(x, LoraLayer), unet.modules()):
        layer.enable_adapters(False)
    latents, words = torch.zeros(1, 4, 8, 8), torch.ones(1, 7, unet.config.cross_attention_dim)
    with torch.no_grad():
        without = unet(latents, 1, words).sample
        remove(unet)
        assert torch.equal(unet(latents, 1, words).sample, without)


def test_dropout_is_left_to_peft():
    unet = UNet2DConditionModel(**TINY.unet).requires_grad_(False)
    adapters.attach(unet, "unet", LoRASection(rank=2, dropout=0.5), base_model="none", seed=0)
    install(unet)
    assert not any("forward" in layer.__dict__ for layer in unet.modules())


def test_removing_leaves_the_model_as_it_was():
    unet = unet_of(torch.bfloat16)
    plain, names = prediction_and_gradients(unet, torch.bfloat16), list(unet.state_dict())
    install(unet)
    install(unet)
    assert list(unet.state_dict()) == names
    remove(unet)
    again = prediction_and_gradients(unet, torch.bfloat16)
    assert all(torch.equal(x, y) for x, y in zip(again, plain, strict=True))
