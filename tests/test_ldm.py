"""A model in one file, as other programs read it: its names, its weights, what it says of itself."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from test_adapters import attached, shake

from bunny_lora import export, inference
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, bpe, components, ldm, random_models
from bunny_lora.model.random_models import Shape

FAST = {"num_inference_steps": 2, "width": 32, "height": 32}
# Stable Diffusion 1.x but for its widths: every layer is there, under its name.
SMALL = Shape(
    unet={
        "sample_size": 8,
        "block_out_channels": (8, 8, 16, 16),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    vae_channels=(8, 8, 8, 8),
    vae_layers=2,
    vae_groups=4,
    text=random_models.TINY.text | {"vocab_size": 49408},
    text_tokens=77,
)


def build_small() -> StableDiffusionPipeline:
    """Return a model of that shape in half precision."""
    pipe = random_models.build_pipeline(SMALL, tokenizer=bpe.build_clip_tokenizer())
    return pipe.to(torch.float16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Stable Diffusion 1.x's layout in diffusers' folders, with CLIP's vocabulary."""
    folder = tmp_path_factory.mktemp("models") / "small"
    build_small().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of that model, in UNet and text encoder."""
    folder = tmp_path_factory.mktemp("weights") / "small_lora"
    parts = components.load_components(str(base), torch.device("cpu"), torch.float32)
    for part in adapters.PARTS:
        handle = attached(getattr(parts, part), part)
        shake(getattr(parts, part))
        adapters.save_adapter(handle, folder / part)
    return folder


@pytest.fixture(scope="module")
def checkpoint(base: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "out"
    export.export(weights, folder, kinds=["checkpoint"], base_model=str(base))
    return folder / "small_lora-checkpoint.safetensors"


def test_layers_of_the_full_model_are_named_as_their_tensors() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SMALL.unet)
    layers = ldm.unet_layers(unet)
    names = [name for name, tensor in unet.state_dict().items() if tensor.ndim > 1]
    assert len(names) > 200
    for name in names:
        assert layers[ldm.unet_name(name).removesuffix(".weight")] == name.removesuffix(".weight")


def difference(first, second) -> float:
    pixels = [torch.tensor(list(image.tobytes())).float() for image in (first, second)]
    return float((pixels[0] - pixels[1]).abs().max())


def test_a_checkpoint_draws_in_diffusers_what_the_lora_draws_on_its_base(
    base: Path, weights: Path, checkpoint: Path
) -> None:
    plain = StableDiffusionPipeline.from_single_file(
        str(checkpoint), config=str(base), local_files_only=True
    )
    theirs = plain("rex", generator=torch.Generator("cpu").manual_seed(3), **FAST).images[0]
    ours = inference.generate_image(
        inference.load_lora_pipeline(str(base), weights), "rex", seed=3, **FAST
    )
    alone = inference.generate_image(inference.load_lora_pipeline(str(base)), "rex", seed=3, **FAST)
    assert difference(theirs, ours) <= 2 < 8 < difference(alone, ours)


def test_a_checkpoint_is_in_half_precision_and_says_what_it_is(checkpoint: Path, weights: Path) -> None:
    with safe_open(checkpoint, "pt") as file:
        told = file.metadata()
    assert told["modelspec.architecture"] == "stable-diffusion-v1"
    assert told["lora"] == "small_lora" and told["base_model"].endswith("small")
    assert told["lora_weights_sha256"] == adapters.adapter_digest(weights)
    state = load_file(checkpoint)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    start = "cond_stage_model.transformer.text_model."
    assert f"{start}embeddings.position_embedding.weight" in state
    assert not [name for name in state if name.startswith("cond_") and not name.startswith(start)]


def test_stable_diffusion_1_has_as_many_tensors_as_its_published_file() -> None:
    """The UNet 686, the VAE 248, CLIP 196: v1-5-pruned-emaonly.safetensors, but for position_ids."""
    with torch.device("meta"):
        pipe = random_models.build_pipeline(random_models.SD1)
    names = list(ldm.tensors(pipe))
    counts = [sum(name.startswith(start) for name in names) for start in ldm.PREFIXES.values()]
    assert counts == [686, 248, 196] and ldm.is_full(pipe.unet)


def test_bk_sdm_tiny_has_the_names_that_stable_diffusion_cpp_knows() -> None:
    """Its numbers leave out those that the blocks of full Stable Diffusion would have."""
    with torch.device("meta"):
        pipe = random_models.build_pipeline(random_models.BK_SDM_TINY)
    assert not ldm.is_full(pipe.unet)
    names = {ldm.unet_name(name) for name in pipe.unet.state_dict()}
    assert len(names) == len(pipe.unet.state_dict())
    layers = sorted({".".join(name.split(".")[:3]) for name in names if not name.startswith("up_")})
    assert layers == [
        "input_blocks.0.0", "input_blocks.1.0", "input_blocks.1.1", "input_blocks.3.0",
        "input_blocks.4.0", "input_blocks.4.1", "input_blocks.6.0", "input_blocks.7.0",
        "input_blocks.7.1", "out.0.bias", "out.0.weight", "out.2.bias", "out.2.weight",
        "output_blocks.0.0", "output_blocks.1.0", "output_blocks.2.1", "output_blocks.3.0",
        "output_blocks.3.1", "output_blocks.4.0", "output_blocks.4.1", "output_blocks.5.2",
        "output_blocks.6.0", "output_blocks.6.1", "output_blocks.7.0", "output_blocks.7.1",
        "time_embed.0.bias", "time_embed.0.weight", "time_embed.2.bias", "time_embed.2.weight",
    ]  # fmt: skip
    others = {".".join(name.split(".")[:4]) for name in names if name.startswith("up_blocks")}
    assert others == {"up_blocks.0.attentions.0", "up_blocks.0.attentions.1"}
    assert "input_blocks.3.0.op.weight" in names and "output_blocks.2.1.conv.weight" in names
    assert "output_blocks.7.0.skip_connection.weight" in names


def test_what_no_program_knows_in_one_file_is_refused(tiny_model: str, weights: Path) -> None:
    pipe = components.pipeline_from(
        components.load_components(tiny_model, torch.device("cpu"), torch.float32), tiny_model
    )
    with pytest.raises(BunnyLoraError, match="other programs know by their blocks"):
        ldm.is_full(pipe.unet)
    pipe.unet.conv_in.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(BunnyLoraError, match=r"input_blocks\.0\.0\.weight is too large for float16"):
        ldm.state_dict(pipe)
