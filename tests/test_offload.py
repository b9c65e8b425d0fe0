"""Parts that leave memory while nobody uses them: back to the bit, and no result hangs on it."""

import tempfile
from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config
from diffusers import StableDiffusionPipeline

from bunny_lora.core.image_file import ImageSettings, image_settings
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, components, offload
from bunny_lora.model.components import Components
from bunny_lora.model.fast import drawing
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import fingerprint, latents, setup
from bunny_lora.training.fingerprint import Fingerprint

CPU = torch.device("cpu")


@pytest.fixture
def parts(tiny_model: str, project: Path) -> Components:
    return components.load_components(tiny_model, CPU, torch.float32)


def weights_bytes(model: torch.nn.Module) -> int:
    return sum(p.untyped_storage().nbytes() for p in model.parameters())


@pytest.mark.parametrize("away", [False, True])
def test_nothing_is_brought_back_or_laid_out_anew_while_threads_draw(
    parts: Components, project: Path, tiny_model: str, away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads that did so at once drew black pictures, once in some hundred."""
    pipe = components.pipeline_from(parts, tiny_model)
    if away:
        offload.offload(pipe.vae, project)
    seen = []

    def generate(twin: StableDiffusionPipeline, settings: ImageSettings) -> None:
        weight = twin.vae.decoder.conv_in.weight
        seen.append((offload.is_away(twin.vae), len(twin.vae.decoder._forward_pre_hooks)))
        seen.append(weight.is_contiguous(memory_format=torch.channels_last))

    monkeypatch.setattr(components, "_generate", generate)
    settings = image_settings(
        prompt="ellie",
        seed=1,
        width=64,
        height=64,
        num_inference_steps=1,
        guidance_scale=1,
        sampler="own",
    )
    components.generate_together(drawing.twins(pipe, 2), [settings] * 2)
    assert seen == [(False, 0), True] * 2


def test_weights_leave_and_come_back_before_they_are_used(parts: Components, project: Path) -> None:
    latents = torch.linspace(-1, 1, 4 * 64).view(1, 4, 8, 8)
    for model, use in (
        (parts.vae, lambda: parts.vae.decode(latents).sample),
        (parts.vae, lambda: parts.vae.encode(torch.ones(1, 3, 64, 64)).latent_dist.mean),
        (parts.text_encoder, lambda: components.encode_prompts(parts, ["ellie"])),
        (parts.unet, lambda: parts.unet.state_dict()["conv_in.weight"]),
    ):
        before, shapes = use(), [p.shape for p in model.parameters()]
        offload.offload(model, project)
        assert offload.is_away(model)
        assert weights_bytes(model) < 1000
        assert [p.shape for p in model.parameters()] == shapes
        assert torch.equal(use(), before)
        assert not offload.is_away(model)
    assert not any(project.glob("tmp*")), "the file has no name"


def test_a_lora_stays_while_what_it_changes_is_away(parts: Components, project: Path) -> None:
    lora = tiny_config("x").lora
    adapters.attach(parts.unet, "unet", lora, base_model="x", seed=1)
    for name, parameter in adapters.trainable_parameters(parts.unet).items():
        parameter.data += 0.01 * ("lora_B" in name)
    inputs = torch.ones(1, 4, 8, 8), 3, torch.ones(1, 77, parts.unet.config.cross_attention_dim)
    before = parts.unet(*inputs).sample
    offload.offload(parts.unet, project)
    parameter.data *= 2
    parameter.data /= 2
    assert torch.equal(parts.unet(*inputs).sample, before)


def test_a_picture_is_the_same_with_all_away(parts: Components, tiny_model: str, project: Path) -> None:
    adapters.attach(parts.unet, "unet", tiny_config("x").lora, base_model="x", seed=1)
    for parameter in adapters.trainable_parameters(parts.unet).values():
        parameter.data += 0.05
    pipe = components.pipeline_from(parts, tiny_model)
    for path in ("fast", "reference"):
        wanted = image_settings(
            prompt="ellie", seed=1, width=64, height=64, num_inference_steps=2, guidance_scale=4.0,
            sampler=type(pipe.scheduler).__name__, path=path,
        )  # fmt: skip
        before = components.generate(pipe, wanted)
        for model in (parts.unet, parts.vae, parts.text_encoder):
            offload.offload(model, project)
        assert components.generate(pipe, wanted).tobytes() == before.tobytes()


def test_without_room_on_the_disk_it_stays(
    parts: Components, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Full:
        def write(self, _: object) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    offload.offload(parts.vae, project)
    assert not offload.is_away(parts.vae)
    assert "AutoencoderKL stays in memory" in capsys.readouterr().out


def test_what_cannot_be_read_again_is_an_error(parts: Components, project: Path) -> None:
    offload.offload(parts.vae, project)
    offload._FILES[parts.vae].truncate(10)
    with pytest.raises(BunnyLoraError, match=r"waited on the disk .* goes on from the last checkpoint"):
        parts.vae.state_dict()
    with pytest.raises(BunnyLoraError):
        parts.vae.decode(torch.zeros(1, 4, 8, 8))


# In a run


def trainer_of(model: str, project: Path, **overrides: object) -> LoRATrainer:
    draw_frames(project / "data" / "instance_images", 3)
    training = {"max_train_steps": 2, "save_steps": 1, "validation_prompt": "ellie"}
    training |= overrides.pop("training", {})
    return LoRATrainer(config=tiny_config(model, training=training, **overrides))


def away(trainer: LoRATrainer) -> set[str]:
    parts = trainer.setup.parts
    return {part for part in ("unet", "text_encoder", "vae") if offload.is_away(getattr(parts, part))}


def test_training_needs_neither_vae_nor_text_encoder(tiny_model: str, project: Path) -> None:
    trainer = trainer_of(tiny_model, project, held_out=0.4)
    trainer.load()
    trainer.setup.set_training_mode(True)
    assert away(trainer) == {"text_encoder", "vae"}
    trainer.setup.learner.loss(0).backward()
    assert away(trainer) == {"text_encoder", "vae"}
    trainer.generate_image("ellie")
    assert away(trainer) == {"text_encoder", "vae"}


@pytest.mark.parametrize(
    "overrides", [{"training": {"caption_tag_dropout": 0.9}}, {"lora": {"train_text_encoder": True}}]
)
def test_a_text_encoder_with_work_to_do_is_there(
    tiny_model: str, project: Path, overrides: dict
) -> None:
    trainer = trainer_of(tiny_model, project, **overrides)
    trainer.load()
    trainer.setup.set_training_mode(True)
    for position in range(4):
        trainer.setup.learner.loss(position)
    assert away(trainer) == {"vae"}


def test_low_memory_has_in_memory_what_computes_and_gives_the_same_bytes(
    tiny_model: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, loaded, while_encoding = [], [], []
    encode, load = latents.encode_images, setup.load_parts

    def watched(vae: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean_and_std = encode(vae, pixels)
        while_encoding.append(offload.is_away(loaded[-1].unet))
        return mean_and_std

    monkeypatch.setattr(latents, "encode_images", watched)
    monkeypatch.setattr(setup, "load_parts", lambda config: loaded.append(load(config)) or loaded[-1])
    extra = {"prior_preservation": {"enabled": True, "num_class_images": 1, "class_data_dir": "class"}}
    for low_memory in (False, True):
        training = {"low_memory": low_memory, "caption_tag_dropout": 0.5}
        folder = f"run-{low_memory}"
        trainer = trainer_of(tiny_model, project, output_dir=folder, training=training, **extra)
        for file in project.rglob("latents/*"):
            file.unlink()
        trainer.train()
        files = [p for p in sorted(trainer.run_dir.rglob("*")) if p.suffix in (".png", ".safetensors")]
        assert len(files) >= 5
        found.append([(p.relative_to(trainer.run_dir), p.read_bytes()) for p in files])
    assert found[0] == found[1]
    assert while_encoding == 4 * [False] + 4 * [True], "three frames and a class image each"


def test_it_is_the_same_run_with_and_without(tiny_model: str, project: Path) -> None:
    without, with_it = (
        Fingerprint.of(tiny_config(tiny_model, training={"low_memory": x}), "") for x in (False, True)
    )
    assert not fingerprint.mathematical_differences(without, with_it)
    assert not fingerprint.environment_differences(without, with_it)


def test_a_plan_is_made_with_low_memory(tiny_model: str, project: Path) -> None:
    trainer = trainer_of(tiny_model, project, resolution=64, training={"low_memory": True})
    assert trainer.plan().memory_gb > 0
