"""Base models of other kinds are told by their configuration, and those of our kind work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from bunny_lora import cli, inference
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import components, diffusion, kinds, random_models
from bunny_lora.trainer import LoRATrainer

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture
def configs(tiny_model: str, project: Path) -> Path:
    """The tiny model's configuration files without any weights."""
    folder = project / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("unet", {"in_channels": 9}, "an inpainting model: its UNet takes 9 channels"),
        ("unet", {"in_channels": 8}, "InstructPix2Pix does: its UNet takes 8 channels"),
        ("unet", {"in_channels": 5}, "depth-to-image"),
        ("unet", {"in_channels": 7}, "an upscaler"),
        ("unet", {"in_channels": 16, "out_channels": 16}, "another model: its UNet takes 16"),
        ("unet", {"addition_embed_type": "text_time"}, "SDXL.*addition_embed_type: text_time"),
        ("unet", {"time_cond_proj_dim": 256}, "latent consistency"),
        ("unet", {"encoder_hid_dim_type": "image_proj"}, "Kandinsky"),
        ("unet", {"_class_name": "UNet3DConditionModel"}, "its UNet is a UNet3DConditionModel"),
        ("unet", {"cross_attention_dim": 48}, "takes text 48 wide.*gives 32"),
        ("unet", {"cross_attention_dim": [32, 48]}, "takes text .32, 48. wide"),
        ("vae", {"latent_channels": 16}, "its latents have 16 channels"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "its VAE is a AutoencoderTiny"),
        ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "a flow-matching model"),
        ("scheduler", {"prediction_type": "flow_prediction"}, "a flow-matching model"),
        ("scheduler", {"prediction_type": "x"}, "it predicts x"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "zero terminal SNR needs v_prediction"),
        (
            "scheduler",
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            "its PNDMScheduler knows no such thing",
        ),
        ("", {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["a", "b"]}, "SDXL"),
        ("", {"_class_name": "StableDiffusion3Pipeline", "transformer": ["a", "b"]}, "Diffusion 3"),
        ("", {"_class_name": "FluxPipeline", "transformer": ["a", "b"]}, "a Flux"),
        ("", {"_class_name": "PixArtPipeline", "transformer": ["a", "b"]}, "another model .PixArt"),
        ("", {"text_encoder": ["transformers", "T5EncoderModel"]}, "text encoder is a T5EncoderModel"),
    ],
)
def test_another_kind_of_model_is_refused_by_its_name_before_its_weights_are_read(
    part: str, changes: dict, message: str, configs: Path
) -> None:
    names = {"": "model_index.json", "scheduler": "scheduler_config.json"}
    edit(configs / part / names.get(part, "config.json"), **changes)
    with pytest.raises(BunnyLoraError, match=rf"^model is .*{message}.*base_model takes Stable Diff"):
        components.load_components("model", torch.device("cpu"), torch.float32)


def test_a_schedule_without_betas_is_none_of_ours(configs: Path) -> None:
    schedule = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}
    (configs / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    with pytest.raises(BunnyLoraError, match=r"its schedule \(EDMEulerScheduler\) has no betas"):
        components.load_noise_scheduler("model")


def test_every_door_refuses_before_any_work(
    configs: Path, project: Path, capsys: pytest.CaptureFixture
) -> None:
    edit(configs / "unet" / "config.json", in_channels=9)
    data = ["--set", "base_model=model", "--set", f"data_dir={draw_frames(project / 'data', 1)}"]
    for arguments in (
        ["generate", "--base-model", "model", "--prompt", "x"],
        ["prepare", "--source", str(project / "data"), *data],
        ["train", "--output-dir", "run", *data],
    ):
        assert cli.main(arguments) == 2
        assert "model is an inpainting model" in capsys.readouterr().err
    assert not (project / "run").exists()


@pytest.fixture(scope="module")
def sd2_like(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model made as Stable Diffusion 2.x, with v-prediction down to zero terminal SNR."""
    folder = tmp_path_factory.mktemp("models") / "sd2"
    pipe = random_models.build_pipeline(random_models.TINY)
    shape = random_models.TINY.unet | {"use_linear_projection": True, "attention_head_dim": [2, 4]}
    pipe.unet = UNet2DConditionModel(**shape)
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    settings |= {"timestep_spacing": "trailing", "clip_sample": False}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    pipe.save_pretrained(folder)
    return str(folder)


def test_stable_diffusion_2_with_zero_terminal_snr_is_drawn_with_as_by_diffusers(sd2_like: str) -> None:
    settings = {"num_inference_steps": 3, "width": 64, "height": 64}
    pipe = inference.load_lora_pipeline(sd2_like)
    ours = inference.generate_image(pipe, "rex", seed=5, reference=True, **settings)
    plain = StableDiffusionPipeline.from_pretrained(sd2_like)
    assert plain.scheduler.config.prediction_type == "v_prediction"
    theirs = plain("rex", generator=torch.Generator("cpu").manual_seed(5), **settings).images[0]
    assert ours.tobytes() == theirs.tobytes()


def test_v_prediction_is_trained_towards_what_diffusers_calls_velocity(
    sd2_like: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_frames(project / "data" / "instance_images", 2)
    velocity = DDPMScheduler.from_pretrained(sd2_like, subfolder="scheduler").get_velocity
    asked = []

    def target(kind, latents, noise, timesteps, alphas_cumprod):
        asked.append(timesteps)
        assert alphas_cumprod[-1] == 0
        found = honest(kind, latents, noise, timesteps, alphas_cumprod)
        torch.testing.assert_close(found, velocity(latents, noise, timesteps))
        return found

    honest = diffusion.target
    monkeypatch.setattr(diffusion, "target", target)
    training = {"max_train_steps": 1, "snr_gamma": 5.0}
    trainer = LoRATrainer(config=tiny_config(sd2_like, training=training))
    final = trainer.train()
    assert asked and (final / "unet").is_dir()
    loss = json.loads((project / "run" / "log.jsonl").read_text().splitlines()[0])["loss"]
    assert 0 < loss < 10


def test_what_stands_beside_the_weights_tells_a_models_version(configs: Path) -> None:
    assert not kinds.is_sd2(configs) and kinds.prediction_type(configs) == "epsilon"
    edit(configs / "text_encoder" / "config.json", hidden_size=1024)
    edit(configs / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert kinds.is_sd2(configs) and kinds.prediction_type(configs) == "v_prediction"
