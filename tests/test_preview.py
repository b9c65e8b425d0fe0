"""A small decoder draws a run's validation pictures, and nothing else."""

from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config
from diffusers import AutoencoderTiny

from bunny_lora.core.image_file import image_settings, read_metadata
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import components
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import validation

CPU = torch.device("cpu")


def write_decoder(folder: Path, depth: int = 4) -> str:
    torch.manual_seed(0)
    channels = (8,) * depth
    AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1,) * depth,
        num_decoder_blocks=(1,) * depth,
    ).save_pretrained(folder)
    return str(folder)


def config_with(model: str, decoder: str | None):
    training = {"max_train_steps": 1, "save_steps": 1, "validation_prompt": "ellie"}
    sampling = {"preview_decoder": decoder, "num_inference_steps": 2}
    return tiny_config(model, training=training, sampling=sampling)


def test_it_draws_the_samples_and_they_say_so(tiny_model: str, project: Path) -> None:
    draw_frames(project / "data" / "instance_images", 2)
    name = write_decoder(project / "taesd")
    config = config_with(tiny_model, name)
    LoRATrainer(config=config).train()
    [sample, *_] = validation.samples_of(project / "run", config.training, 1)
    assert (read_metadata(sample.path) or {})["decoder"] == config.sampling.preview_decoder == "taesd"
    assert not validation.missing_samples(project / "run", config, 1)
    assert validation.missing_samples(project / "run", config_with(tiny_model, None), 1)
    assert validation.settings_of(config, "ellie", 1).decoder is None  # of the evaluation


def test_the_picture_is_what_the_decoder_makes_of_the_same_latents(
    tiny_model: str, project: Path
) -> None:
    parts = components.load_components(tiny_model, CPU, torch.float32)
    pipe = components.pipeline_from(parts, tiny_model)
    own, size = pipe.vae, {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 1.0}
    settings = {"prompt": "rex", "seed": 5, "sampler": "PNDMScheduler", **size}
    name = write_decoder(project / "taesd")
    ours = components.generate(pipe, image_settings(**settings, decoder=name))
    assert pipe.vae is own
    pipe.vae = AutoencoderTiny.from_pretrained(name)
    theirs = components.generate(pipe, image_settings(**settings))
    apart = [abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes(), strict=True)]
    assert max(apart) <= 1  # another layout, other last bits


@pytest.mark.parametrize(
    ("depth", "words"), [(3, "latents of 4 channels and 1/4 of"), (None, "could not be loaded")]
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    depth: int | None, words: str, tiny_model: str, project: Path
) -> None:
    draw_frames(project / "data" / "instance_images", 2)
    name = write_decoder(project / "other", depth) if depth else "nobody/nothing"
    with pytest.raises(BunnyLoraError, match=rf"preview_decoder: .*{words}"):
        LoRATrainer(config=config_with(tiny_model, name)).train()
    assert not (project / "run" / "samples").exists()
