"""The native attention computes what torch's does, and leaves no trace in the model."""

import itertools
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import scaled_dot_product_attention

from bunny_lora.core.sections import LoRASection
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters
from bunny_lora.model.fast import native
from bunny_lora.model.fast.attention import (
    NativeAttnProcessor,
    Shape,
    attention,
    install,
    is_known,
    remove,
)
from bunny_lora.model.random_models import TINY

# batch, heads, queries, keys, features; the kernel's tiles are 128 keys by 48 or 96 queries.
SIZES = [
    (1, 2, 64, 64, 8),
    (2, 3, 77, 77, 40),
    (1, 1, 1, 1, 1),
    (1, 2, 1, 5, 7),
    (1, 8, 100, 77, 80),
    (2, 1, 131, 67, 13),
    (1, 2, 96, 128, 160),
    (1, 1, 97, 300, 24),
]
# Twice and more what both were measured to be off by.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True, scope="module")
def _built(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUNNY_LORA_ROOT", str(tmp_path_factory.mktemp("kernels")))
        native.library.cache_clear()
        try:
            native.library()
        except BunnyLoraError as error:
            pytest.skip(str(error))
        yield


def tokens(size: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[batch, heads, tokens, features], with heads side by side in memory as diffusers has them."""
    batch, heads, count, features = size
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, count, heads, features, generator=generator) * 1.5
    return x.to(dtype).transpose(1, 2)


def results(function, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """The output and the three gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in inputs)]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the length of b."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-6)).item()


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_gradients_are_those_of_torch(size, dtype):
    batch, heads, n_queries, n_keys, features = size
    counts = (n_queries, n_keys, n_keys, n_queries)
    *inputs, grad = (tokens((batch, heads, n, features), dtype, i) for i, n in enumerate(counts))
    exact = results(scaled_dot_product_attention, [x.double() for x in inputs], grad.double())
    ours = results(attention, inputs, grad)
    assert all(x.dtype == dtype for x in ours)
    lengths = [x.norm().item() for x in exact]
    for local_shard, true, length in zip(ours, exact, lengths, strict=True):
        assert distance(local_shard, true) < TOLERANCE[dtype] or length < 1e-6, size


def test_large_and_equal_scores_neither_overflow_nor_vanish():
    query, key, value = (tokens((1, 1, 70, 16), torch.float32, i) for i in range(3))
    grad = torch.ones_like(query)
    for scale in (0.0, 100.0):
        inputs = [scale * query, key, value]
        exact = results(scaled_dot_product_attention, [x.double() for x in inputs], grad.double())
        for local_shard, true in zip(results(attention, inputs, grad), exact, strict=True):
            torch.testing.assert_close(local_shard.double(), true, rtol=1e-3, atol=1e-3)


def test_scores_that_grow_from_key_to_key_lose_nothing():
    """The softmax's reference follows the largest score late, and never too late."""
    query, value = torch.ones(1, 1, 3, 8), tokens((1, 1, 400, 8), torch.float32, 0)
    key = torch.linspace(-300, 300, 400)[None, None, :, None].expand(1, 1, 400, 8)
    grad = torch.ones_like(query)
    exact = results(
        scaled_dot_product_attention, [x.double() for x in (query, key, value)], grad.double()
    )
    for ours, true in zip(results(attention, [query, key, value], grad), exact, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("place", range(3))
def test_what_is_no_number_stays_none(place):
    inputs = [tokens((1, 1, 150, 16), torch.bfloat16, i) for i in range(3)]
    inputs[place][0, 0, 140] = torch.nan
    out, *grads = results(attention, inputs, torch.ones_like(inputs[0]))
    assert out.isnan().any()
    assert grads[place].isnan().any() or place == 2


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_how_many_threads_share_a_head_makes_no_difference_but_rounding(dtype):
    n_threads = torch.get_num_threads()
    inputs = [tokens((1, 1, 200, 24), dtype, i) for i in range(3)]
    grad = tokens((1, 1, 200, 24), dtype, 3)
    found = []
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            found.append(results(attention, inputs, grad))
    finally:
        torch.set_num_threads(n_threads)
    alone, shared, again = found
    for a, b, c in zip(alone, shared, again, strict=True):
        assert distance(b, a) < TOLERANCE[dtype]
        assert torch.equal(b, c), "the same threads give the same bits"


def test_inputs_of_any_layout_are_taken():
    inputs = [tokens((2, 2, 30, 12), torch.float32, i) for i in range(3)]
    odd = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]
    grad = torch.ones(1).expand(2, 2, 30, 12)
    for a, b in zip(results(attention, odd, grad), results(attention, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


# In a UNet

ALL = [Shape(q, k, f) for q, k, f in itertools.product((16, 64), (16, 64, 7), (4, 8, 16, 32))]


def unet_of(dtype: torch.dtype) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY.unet).to(dtype).requires_grad_(False)
    adapters.attach(unet, "unet", LoRASection(rank=2), base_model="none", seed=0)
    for parameter in adapters.trainable_parameters(unet).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


def prediction_and_gradients(unet: UNet2DConditionModel, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
    words = torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator).to(dtype)
    predicted = unet(latents, torch.tensor([10]), words).sample
    predicted.float().square().mean().backward()
    parameters = adapters.trainable_parameters(unet).values()
    found = [predicted.detach(), *(p.grad.clone() for p in parameters)]
    unet.zero_grad()
    return found


def together(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.double().flatten() for x in tensors])


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_a_unet_predicts_and_learns_the_same(dtype):
    unet = unet_of(dtype)
    plain = prediction_and_gradients(unet, dtype)
    install(unet, ALL)
    assert any(isinstance(p, NativeAttnProcessor) for p in unet.attn_processors.values())
    ours = prediction_and_gradients(unet, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert distance(ours[0], plain[0]) < tolerance
    assert 0 < distance(together(ours[1:]), together(plain[1:])) < tolerance


def test_gradient_checkpointing_gives_the_same(monkeypatch):
    unet = unet_of(torch.float32).train()
    install(unet, ALL)
    plain = prediction_and_gradients(unet, torch.float32)
    unet.enable_gradient_checkpointing()
    for a, b in zip(prediction_and_gradients(unet, torch.float32), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_that_were_not_chosen_go_the_plain_way(monkeypatch):
    unet = unet_of(torch.float32)
    plain = prediction_and_gradients(unet, torch.float32)
    install(unet, [Shape(5, 5, 5)])
    monkeypatch.setattr(native, "forward", lambda *_: pytest.fail("was called"))
    ours = prediction_and_gradients(unet, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_wide_picture_goes_the_way_of_the_square_of_its_area():
    """With `aspect_buckets` no whole frame of a film has the tokens of a square."""
    square = [Shape(64, 64, 8), Shape(64, 77, 8)]
    assert is_known(Shape(60, 60, 8), square)
    assert is_known(Shape(60, 77, 8), square)
    assert not is_known(Shape(60, 77, 8), square[:1]), "words were tried on their own"
    assert not is_known(Shape(60, 60, 8), square[1:])
    assert not is_known(Shape(60, 60, 16), square)
    assert not is_known(Shape(15, 15, 8), square), "the next level"


def test_removing_leaves_the_model_as_it_was():
    unet = unet_of(torch.float32)
    processors, names = dict(unet.attn_processors), list(unet.state_dict())
    install(unet, ALL)
    install(unet, ALL)
    assert list(unet.state_dict()) == names
    remove(unet)
    assert unet.attn_processors == processors


# Building


@pytest.fixture
def nothing_built(project, monkeypatch):
    native.library.cache_clear()
    yield project / "outputs" / "kernels"
    native.library.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "there is no C\\+\\+ compiler no-such-compiler"), ("false", "refuses")],
)
def test_without_a_compiler_the_reason_is_said_and_nothing_is_left(
    nothing_built, monkeypatch, compiler, reason
):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BunnyLoraError, match=reason):
        native.library()
    assert not nothing_built.exists()


def test_it_is_compiled_once_and_again_where_the_source_or_the_processor_is_another(
    nothing_built, monkeypatch
):
    compiled, answer = [], b"a processor"

    def compile_nothing(*arguments):
        if "-o" in arguments:
            compiled.append(arguments[-1])
            Path(arguments[-1]).write_bytes(b"")
        return answer

    monkeypatch.setattr(native, "_compile", compile_nothing)
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: path)
    first = native.library()
    native.library.cache_clear()
    assert native.library() == first
    assert len(compiled) == 1
    native.library.cache_clear()
    answer = b"another processor"
    assert native.library() != first
    assert len(compiled) == 2
    assert len(list(nothing_built.iterdir())) == 2
