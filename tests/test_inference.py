"""Pictures from trained weights: by seed alone, from the run's own folder, carrying their settings."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from PIL import Image
from test_adapters import attached, shake

from bunny_lora import inference
from bunny_lora.config import Config
from bunny_lora.core import files
from bunny_lora.core.image_file import ImageSettings, image_settings, read_metadata
from bunny_lora.core.sections import Sampler
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, components, formats, samplers
from bunny_lora.model.fast import drawing, native
from bunny_lora.model.fast.attention import NativeAttnProcessor, Shape
from bunny_lora.training.handover import Recommended

FAST = {"num_inference_steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def run_dir(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    parts = components.load_components(tiny_model, torch.device("cpu"), torch.float32)
    for part in adapters.PARTS:
        peft_model = attached(getattr(parts, part), part)
        shake(getattr(parts, part))
        adapters.save_adapter(peft_model, folder / "final" / part)
    config = Config(base_model=tiny_model, training={"mixed_precision": "no"})
    files.write_text(folder / "config.yaml", config.to_yaml())
    return folder


@pytest.fixture(scope="module")
def pipe(run_dir: Path) -> StableDiffusionPipeline:
    return inference.load_lora_pipeline(lora_weights_dir=run_dir)


def settings_of(pipe: StableDiffusionPipeline, seed: int, **changes: object) -> ImageSettings:
    return image_settings(prompt="ellie", seed=seed, **inference.settings_with(pipe, **FAST | changes))


@pytest.mark.parametrize("changes", [{}, {"lora_scale": 0.5}, {"reference": True}])
def test_pictures_drawn_at_once_are_those_that_one_thread_draws_one_by_one(
    pipe: StableDiffusionPipeline, changes: dict[str, object]
) -> None:
    wanted = [settings_of(pipe, seed, **changes) for seed in range(3)]
    with drawing.threads(1):
        one_by_one = [components.generate(pipe, settings).tobytes() for settings in wanted]
    n_threads, own = torch.get_num_threads(), pipe.scheduler
    together = components.generate_together(drawing.twins(pipe, 3), wanted)
    assert [image.tobytes() for image in together] == one_by_one
    assert len(set(one_by_one)) == 3
    assert (torch.get_num_threads(), pipe.scheduler) == (n_threads, own)


@pytest.mark.parametrize(("colour", "is_said"), [((0, 0, 0), True), ((0, 0, 1), False)])
def test_a_black_picture_is_said(
    pipe: StableDiffusionPipeline,
    colour: tuple[int, int, int],
    is_said: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    drawn = SimpleNamespace(images=[Image.new("RGB", (64, 64), colour)])
    monkeypatch.setattr(type(pipe), "__call__", lambda *_, **__: drawn)
    components.generate(pipe, settings_of(pipe, 7))
    said = capsys.readouterr().out
    assert ("All black" in said and "'ellie', seed 7" in said) == is_said


def test_small_pictures_are_drawn_at_once_on_a_cpu_and_large_ones_one_by_one() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with drawing.threads(2):
        assert drawing.n_at_once(cpu, 128) == 2
        assert drawing.n_at_once(cpu, 512) == drawing.n_at_once(gpu, 128) == 1


def test_diffusers_and_peft_alone_draw_the_same_picture(
    pipe: StableDiffusionPipeline, run_dir: Path, tiny_model: str
) -> None:
    ours = inference.generate_image(pipe, "ellie", seed=11, reference=True, **FAST)
    plain = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    plain.unet = PeftModel.from_pretrained(plain.unet, run_dir / "final" / "unet")
    plain.text_encoder = PeftModel.from_pretrained(
        plain.text_encoder, run_dir / "final" / "text_encoder"
    )
    generator = torch.Generator("cpu").manual_seed(11)
    theirs = plain("ellie", generator=generator, guidance_scale=7.5, **FAST).images[0]
    assert ours.tobytes() == theirs.tobytes()


def mean_difference(a: Image.Image, b: Image.Image) -> float:
    """Of the values of two images, of 255."""
    first, second = (torch.tensor(list(image.tobytes())).float() for image in (a, b))
    return float((first - second).abs().mean())


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_fast_path_draws_the_same_picture_and_leaves_nothing_behind(
    pipe: StableDiffusionPipeline, scale: float
) -> None:
    models = (pipe.unet, pipe.text_encoder, pipe.vae)

    def state() -> list:
        return [(n, t.clone(), t.stride()) for m in models for n, t in m.state_dict().items()]

    before, reference = state(), None
    for sampler in ("own", "dpm++-2m-karras"):
        fast = inference.generate_image(
            pipe, "ellie", seed=11, lora_scale=scale, sampler=sampler, **FAST
        )
        settings = image_settings(**json.loads(fast.info["parameters"]) | {"path": "reference"})
        reference = components.generate(pipe, settings)
        assert mean_difference(fast, reference) < 0.5, "2 is what is promised"
        assert fast.tobytes() != Image.new("RGB", fast.size).tobytes()
        assert json.loads(fast.info["parameters"])["path"] == "fast"
        assert json.loads(reference.info["parameters"])["path"] == "reference"
    after = state()
    assert [(n, stride) for n, _, stride in before] == [(n, stride) for n, _, stride in after]
    assert all(torch.equal(a, b) for (_, a, _), (_, b, _) in zip(before, after, strict=True))
    assert type(pipe.scheduler).__name__ == "PNDMScheduler"


def test_large_attention_is_native_in_bfloat16_and_the_picture_stays_the_same(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = inference.load_lora_pipeline(lora_weights_dir=run_dir, dtype=torch.bfloat16)
    monkeypatch.setattr(drawing, "MANY_TOKENS", 64)
    shapes = drawing.large_shapes(pipe.unet, 8, 8)
    assert shapes == [Shape(64, 64, 8)]
    if not drawing.has_native_attention(pipe.unet):
        pytest.skip("no AVX512-BF16, or no compiler")
    computed = []
    forward = native.forward
    monkeypatch.setattr(
        native, "forward", lambda *inputs: computed.append(inputs[0].shape) or forward(*inputs)
    )
    fast = inference.generate_image(pipe, "ellie", sampler="own", **FAST)
    assert computed and all(shape[2:] == (64, 8) for shape in computed)
    assert not any(isinstance(p, NativeAttnProcessor) for p in pipe.unet.attn_processors.values())
    reference = inference.generate_image(pipe, "ellie", reference=True, **FAST)
    assert mean_difference(fast, reference) < 2


def test_layers_are_back_in_their_places_after_a_failure(pipe: StableDiffusionPipeline) -> None:
    before = dict(pipe.unet.named_modules())
    with pytest.raises(RuntimeError), drawing.prepared(pipe, 1.0, 64, 64):
        assert not any(isinstance(module, LoraLayer) for module in pipe.unet.modules())
        raise RuntimeError
    assert dict(pipe.unet.named_modules()) == before


def test_the_reference_takes_the_models_own_sampler_and_steps_that_suit_it(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    karras = Recommended(
        lora_scale=1.0, num_inference_steps=12, guidance_scale=4.0, width=64, height=64,
        sampler="DPMSolverMultistepScheduler", sampler_options={"use_karras_sigmas": True},
    )  # fmt: skip
    monkeypatch.setattr(pipe, "recommended", karras)
    drawn = inference.settings_with(pipe)
    assert (drawn["sampler"], drawn["num_inference_steps"]) == ("dpm++-2m-karras", 12)
    drawn = inference.settings_with(pipe, reference=True)
    assert (drawn["sampler"], drawn["num_inference_steps"]) == ("PNDMScheduler", 50)
    assert inference.settings_with(pipe, reference=True, num_inference_steps=7) == drawn | {
        "num_inference_steps": 7
    }
    assert inference.settings_with(pipe, sampler="ddim")["sampler"] == "DDIMScheduler"
    with pytest.raises(BunnyLoraError, match=r"own sampler, PNDMScheduler: leave out ddim"):
        inference.settings_with(pipe, sampler="ddim", reference=True)
    with pytest.raises(BunnyLoraError, match=r"No sampler 'ddmi'"):
        inference.generate_image(pipe, "ellie", sampler="ddmi", **FAST)


def test_an_image_depends_on_its_seed_and_not_on_its_batch(pipe: StableDiffusionPipeline) -> None:
    many = list(inference.generate_images(pipe, ["ellie", "rex"], [1, 2], **FAST))
    assert inference.generate_image(pipe, "rex", seed=2, **FAST).tobytes() == many[3].tobytes()
    assert len({image.tobytes() for image in many}) == 4


def test_scale_zero_is_the_base_and_scale_one_what_was_trained(
    pipe: StableDiffusionPipeline, tiny_model: str
) -> None:
    base = inference.generate_image(inference.load_lora_pipeline(tiny_model), "ellie", **FAST)
    images = {
        scale: inference.generate_image(pipe, "ellie", lora_scale=scale, **FAST)
        for scale in (0.0, 0.5, 1.0)
    }
    assert images[0.0].tobytes() == base.tobytes()
    assert len({image.tobytes() for image in images.values()}) == 3
    again = inference.generate_image(pipe, "ellie", **FAST)
    assert again.tobytes() == images[1.0].tobytes(), "an earlier scale stayed behind"


def test_the_png_carries_prompt_seed_and_settings(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    image = inference.generate_image(pipe, "ellie, naïve 🙂", seed=9, negative_prompt="blurry", **FAST)
    inference.save_image(image, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as saved:
        parameters = json.loads(saved.text["parameters"])
        assert saved.tobytes() == image.tobytes()
    assert parameters["prompt"] == "ellie, naïve 🙂" and parameters["seed"] == 9
    assert parameters["negative_prompt"] == "blurry" and parameters["num_inference_steps"] == 2


def test_the_base_model_is_read_from_the_run_or_the_adapter(run_dir: Path, tmp_path: Path) -> None:
    assert inference.recorded_base_model(run_dir / "final") != "random-tiny"
    (tmp_path / "unet").symlink_to(run_dir / "final" / "unet")
    assert inference.recorded_base_model(tmp_path) == "random-tiny"
    with pytest.raises(BunnyLoraError, match="--base-model"):
        inference.recorded_base_model(None)


def test_a_base_model_of_other_shapes_is_refused(run_dir: Path, tmp_path: Path) -> None:
    other = components.random_models
    shape = other.Shape(
        **(vars(other.TINY) | {"unet": other.TINY.unet | {"block_out_channels": (16, 32)}})
    )
    other.build_pipeline(shape).save_pretrained(tmp_path / "other")
    with pytest.raises(BunnyLoraError, match="made for another base model"):
        inference.load_lora_pipeline(str(tmp_path / "other"), run_dir)


@pytest.mark.parametrize("size", [(65, 64), (64, 0), (-8, 64)])
def test_sizes_that_cannot_be_drawn_are_refused(pipe: StableDiffusionPipeline, size: tuple) -> None:
    with pytest.raises(BunnyLoraError, match=r"multiple of 8|greater than or equal to 8"):
        inference.generate_image(pipe, "ellie", width=size[0], height=size[1])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_that_torch_does_not_take_are_refused(pipe: StableDiffusionPipeline, seed: int) -> None:
    with pytest.raises(BunnyLoraError, match=f"cannot be drawn: seed {seed}: "):
        inference.generate_image(pipe, "ellie", seed=seed, **FAST)


def test_a_prompt_with_halves_of_characters_is_drawn_and_recorded(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    inference.save_image(inference.generate_image(pipe, "rex \udc80", **FAST), tmp_path / "out.png")
    settings = read_metadata(tmp_path / "out.png")
    assert settings is not None and settings["prompt"] == "rex ?"


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, None, "nan"])
def test_a_png_without_readable_settings_has_none(tmp_path: Path, text: str | None) -> None:
    image = Image.new("RGB", (8, 8))
    if text is not None:
        image.info["parameters"] = text
    inference.save_image(image, tmp_path / "out.png")
    assert read_metadata(tmp_path / "out.png") is None
    assert read_metadata(tmp_path / "absent.png") is None


def test_files_of_other_tools_draw_as_the_run_does(
    pipe: StableDiffusionPipeline, run_dir: Path, tiny_model: str, tmp_path: Path
) -> None:
    ours = inference.generate_image(pipe, "ellie", seed=4, **FAST)
    models = {part: getattr(pipe, part) for part in adapters.PARTS}
    plain = {
        part: getattr(StableDiffusionPipeline.from_pretrained(tiny_model), part) for part in models
    }
    formats.write_kohya(formats.read_lora(run_dir / "final", plain), tmp_path / "k.safetensors", {})
    other = inference.load_lora_pipeline(tiny_model, tmp_path / "k.safetensors")
    assert inference.generate_image(other, "ellie", seed=4, **FAST).tobytes() == ours.tobytes()
    with pytest.raises(BunnyLoraError, match="name it: base_model"):
        inference.load_lora_pipeline(lora_weights_dir=tmp_path / "k.safetensors")


def test_a_lora_and_its_opposite_are_the_base_model(
    run_dir: Path, tiny_model: str, tmp_path: Path
) -> None:
    plain = StableDiffusionPipeline.from_pretrained(tiny_model)
    models = {part: getattr(plain, part) for part in adapters.PARTS}
    lora = formats.read_lora(run_dir / "final", models)
    formats.write_diffusers(lora, tmp_path / "same.safetensors")
    mixed = {run_dir: 1.0, tmp_path / "same.safetensors": -1.0}
    nothing = inference.load_lora_pipeline(lora_weights_dir=mixed)
    base = inference.load_lora_pipeline(tiny_model)
    half = inference.load_lora_pipeline(lora_weights_dir={run_dir: 0.5})
    whole = inference.load_lora_pipeline(lora_weights_dir=run_dir)
    drawn = [inference.generate_image(p, "ellie", seed=4, **FAST) for p in (nothing, base, half, whole)]
    pixels = [torch.tensor(list(image.tobytes())).float() for image in drawn]
    assert (pixels[0] - pixels[1]).abs().max() <= 1
    assert (pixels[2] - pixels[1]).abs().max() > 1 and (pixels[2] - pixels[3]).abs().max() > 1
    scaled = inference.generate_image(whole, "ellie", seed=4, lora_scale=0.5, **FAST)
    assert (torch.tensor(list(scaled.tobytes())).float() - pixels[2]).abs().max() <= 1


def test_every_sampler_of_the_configuration_is_one_of_diffusers() -> None:
    known = get_args(Sampler)
    assert set(known) == {samplers.OWN, *samplers.SAMPLERS}
    classes = {kind for kind, _ in samplers.SAMPLERS.values()}
    assert classes <= {scheduler.name for scheduler in KarrasDiffusionSchedulers}
    for name in samplers.SAMPLERS:
        assert samplers.recorded(samplers.called(*samplers.described(name))) == samplers.recorded(name)
