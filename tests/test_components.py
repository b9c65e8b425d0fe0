"""Loading and using the parts of a Stable Diffusion, against diffusers' own pipeline."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from bunny_lora.core.image_file import image_settings
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import components, devices, random_models, variants

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tiny_model: str) -> components.Components:
    return components.load_components(tiny_model, CPU, torch.float32)


def test_everything_is_frozen_in_the_asked_precision(tiny_model: str) -> None:
    loaded = components.load_components(tiny_model, CPU, torch.bfloat16)
    for model in (loaded.unet, loaded.vae, loaded.text_encoder):
        assert not model.training and model.dtype == torch.bfloat16
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_latents_are_scaled_once_as_the_pipeline_expects(parts: components.Components) -> None:
    pixel_values = torch.rand(1, 3, 64, 64) * 2 - 1
    mean, std = components.encode_images(parts.vae, pixel_values)
    distribution = parts.vae.encode(pixel_values).latent_dist
    torch.testing.assert_close(mean, distribution.mean * parts.vae.config.scaling_factor)
    torch.testing.assert_close(std, distribution.std * parts.vae.config.scaling_factor)
    assert mean.shape == (1, 4, 8, 8)


def test_prompts_are_encoded_as_by_the_pipeline(tiny_model: str, parts: components.Components) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    prompts = ["ellie in a forest", "a caption far too long for the text encoder " * 20]
    for prompt in prompts:
        expected, _ = pipe.encode_prompt(prompt, CPU, 1, do_classifier_free_guidance=False)
        torch.testing.assert_close(components.encode_prompts(parts, [prompt]), expected)


def test_a_picture_is_the_one_that_plain_diffusers_draws(
    tiny_model: str, parts: components.Components
) -> None:
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "width": 64, "height": 48}
    settings |= {"negative_prompt": "blurry"}
    pipe = components.pipeline_from(parts, tiny_model)
    ours = components.generate(
        pipe,
        image_settings(prompt="rex", seed=5, sampler="PNDMScheduler", path="reference", **settings),
    )
    plain = StableDiffusionPipeline.from_pretrained(tiny_model)
    generator = torch.Generator("cpu").manual_seed(5)
    theirs = plain("rex", generator=generator, **settings).images[0]
    assert ours.size == (64, 48) and ours.tobytes() == theirs.tobytes()


def variant_of(tiny_model: str, folder: Path, variant: str | None) -> Path:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipe.to(torch.float16).save_pretrained(folder, variant=variant)
    return folder


@pytest.mark.parametrize("variant", ["fp16", "ema"])
def test_a_folder_of_variants_alone_is_read_and_said_so_once(
    variant: str, tiny_model: str, project: Path, capsys: pytest.CaptureFixture
) -> None:
    variant_of(tiny_model, project / variant, variant)
    for _ in range(2):
        loaded = components.load_components(variant, CPU, torch.float32)
    said = [line for line in capsys.readouterr().out.splitlines() if "variants" in line]
    assert said == [
        f"{variant} holds variants of its weights, no plain ones; read are {variant} of the"
        f" text_encoder, {variant} of the unet, {variant} of the vae."
    ]
    expected = components.load_components(tiny_model, CPU, torch.float16)
    for name in ("unet", "vae", "text_encoder"):
        theirs = getattr(expected, name).state_dict()
        for key, tensor in getattr(loaded, name).state_dict().items():
            assert torch.equal(tensor, theirs[key].float())


def test_plain_weights_are_read_before_any_variant_and_fp16_before_others(tmp_path: Path) -> None:
    names = ["diffusion_pytorch_model.ema.safetensors", "diffusion_pytorch_model.fp16.safetensors"]
    for name in [*names, "unrelated.fp16.safetensors"]:
        (tmp_path / "unet").mkdir(exist_ok=True)
        (tmp_path / "unet" / name).touch()
    assert variants.variants(tmp_path) == {"unet": "fp16", "vae": None, "text_encoder": None}
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").touch()
    assert variants.variants(tmp_path)["unet"] is None


def test_a_missing_model_is_explained_with_ways_out(project: Path) -> None:
    ways_out = r"nobody/nothing(.|\n)*nota-ai/bk-sdm-tiny(.|\n)*bunny-world(.|\n)*random-tiny"
    with pytest.raises(BunnyLoraError, match=ways_out):
        components.load_components("nobody/nothing", CPU, torch.float32)
    with pytest.raises(BunnyLoraError, match=ways_out):
        components.load_tokenizer("nobody/nothing")


def test_a_relative_model_folder_starts_at_the_project_root(
    project: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (project / "models", project / "notebooks" / "models"):
        folder.mkdir()
        (folder / "mine").symlink_to(tiny_model)
    monkeypatch.chdir(project / "notebooks")
    assert components.resolve_base_model("models/mine") == str(project / "models" / "mine")


def test_devices_and_precisions_resolve_to_what_is_there() -> None:
    assert devices.resolve_device("cpu") == CPU
    assert devices.resolve_dtype("no", CPU) == torch.float32
    assert devices.resolve_dtype("bf16", CPU) == torch.bfloat16
    assert devices.resolve_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused() -> None:
    assert devices.resolve_device("auto") == CPU
    with pytest.raises(BunnyLoraError, match="no CUDA GPU"):
        devices.resolve_device("cuda")


def test_the_standin_has_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        unet = random_models.UNet2DConditionModel(**random_models.BK_SDM_TINY.unet)
        vae = random_models._build_vae(random_models.BK_SDM_TINY)
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(323e6, rel=0.005)
    assert sum(p.numel() for p in vae.parameters()) == pytest.approx(84e6, rel=0.005)


def test_a_standin_is_the_same_each_time_it_is_built(tiny_model: str) -> None:
    again = random_models.build_pipeline(random_models.TINY)
    first = StableDiffusionPipeline.from_pretrained(tiny_model)
    for name in ("unet", "vae", "text_encoder"):
        old, new = getattr(first, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(old[key], new[key]) for key in new)


def test_a_standins_tokenizer_is_the_same_in_another_process() -> None:
    """Hash seeds differ from process to process, and must not decide which pieces words fall into."""
    code = "from bunny_lora.model.random_models import build_tokenizer as build; "
    code += "print(build().backend_tokenizer.to_str())"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and len(runs[0]) > 1000


def test_the_standins_tokenizer_keeps_any_text() -> None:
    tokenizer = random_models.build_tokenizer()
    ids = tokenizer("Ellie, ünïcode 🙂").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["ellie", ",", "ünïcode", "🙂"]


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_that_only_emulates_bfloat16_gets_float16(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert devices.resolve_dtype("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(("kind", "n_waits"), [("cuda", 1), ("cpu", 0)])
def test_only_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch, kind: str, n_waits: int) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    devices.synchronize(torch.device(kind))
    assert len(waits) == n_waits
