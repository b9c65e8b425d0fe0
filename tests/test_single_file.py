"""Whole models in one file as base models: converted once, or refused for what they are."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from test_ldm import FAST, SMALL, build_small, difference

from bunny_lora import cli, inference
from bunny_lora.core import files
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import protocol
from bunny_lora.model import bpe, components, ldm, single_file
from bunny_lora.training.fingerprint import Fingerprint, mathematical_differences


@pytest.fixture(scope="module")
def model() -> StableDiffusionPipeline:
    return build_small()


@pytest.fixture
def small(model: StableDiffusionPipeline, project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in one file, in a project where Stable Diffusion 1.x is so small."""
    monkeypatch.setattr(single_file, "SD1", SMALL)
    path = project / "v1-5.safetensors"
    usual_beside = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model_ema.decay": torch.tensor(0.9999),
        "alphas_cumprod": torch.linspace(1, 0, 1000),
    }
    save_file(ldm.state_dict(model) | usual_beside, path, {"format": "pt"})
    return path


def test_the_vocabulary_is_clips() -> None:
    tokenizer = bpe.build_clip_tokenizer()
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    published = [49406, 320, 1125, 539, 320, 2368, 49407]  # Of OpenAI's own tokenizer.
    assert tokenizer("a photo of a cat").input_ids == published


def test_a_single_file_is_converted_once_and_draws_what_it_should(
    small: Path, model: StableDiffusionPipeline, project: Path, capsys: pytest.CaptureFixture
) -> None:
    model.save_pretrained(project / "folder")
    expected = inference.generate_image(inference.load_lora_pipeline("folder"), "rex", seed=3, **FAST)
    for _ in range(2):
        image = inference.generate_image(
            inference.load_lora_pipeline("v1-5.safetensors"), "rex", seed=3, **FAST
        )
        assert difference(image, expected) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "Converting" in line]
    digest = single_file._digest(small)
    assert said == [f"Converting v1-5.safetensors, once, to outputs/converted/v1-5-{digest[:8]}"]
    folder = project / "outputs" / "converted" / f"v1-5-{digest[:8]}"
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    assert (
        loaded.unet.dtype == torch.float32
        and load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype
        == torch.float16
    )
    texts = [path.read_text() for path in folder.rglob("*.json") if path.name != "tokenizer.json"]
    assert not [text for text in texts if tempfile.gettempdir() in text]
    assert protocol.base_digest("v1-5.safetensors") == f"sha256:{digest}"


def test_a_file_that_has_changed_is_converted_anew_and_one_that_has_moved_is_not(
    small: Path, project: Path
) -> None:
    first = components.base_identity("v1-5.safetensors")
    folder = components.resolve_base_model("v1-5.safetensors")
    moved = small.rename(project / "other.safetensors")
    assert components.resolve_base_model("other.safetensors") == folder

    state = load_file(moved)
    state["model.diffusion_model.out.2.bias"] += 1
    before = moved.stat()
    save_file(state, moved)
    os.utime(moved, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert components.resolve_base_model("other.safetensors") != folder
    second = components.base_identity("other.safetensors")
    assert first != second and len(list((project / "outputs" / "converted").glob("*/"))) == 2

    told = [
        Fingerprint({"base_model": name}, "", {}, digest)
        for name, digest in (("v1-5", first), ("other", first), ("other", second))
    ]
    assert not mathematical_differences(told[0], told[1])
    [line] = mathematical_differences(told[1], told[2])
    assert line.startswith("the base model: sha256:") and "name in base_model what it was" in line


def test_a_run_on_a_single_file_records_its_digest(small: Path, project: Path) -> None:
    draw_frames(project / "data" / "instance_images", 2)
    config = tiny_config("v1-5.safetensors", training={"max_train_steps": 1})
    files.write_text(project / "params" / "small.yaml", config.to_yaml())
    assert cli.main(["train", "--config", "params/small.yaml"]) == 0
    told = json.loads((project / "run" / "provenance.json").read_text())
    assert told["base_commit"] == f"sha256:{single_file._digest(small)}"
    handed = json.loads((project / "run" / "handover.json").read_text())
    assert (handed["base_model"], handed["base_revision"]) == ("v1-5.safetensors", None)
    image = inference.generate_image(inference.load_run("run"), "ellie", seed=1, **FAST)
    assert image.size == (32, 32)


def without(state: dict, start: str) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.startswith(start)}


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
SDXL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
TEXT = "cond_stage_model.transformer.text_model.final_layer_norm"
FLUX = "double_blocks.0.img_attn.norm.key_norm.scale"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state | {FIRST: torch.zeros(8, 9, 3, 3)}, "is an inpainting model"),
        (lambda state: state | {FIRST: torch.zeros(8, 8, 3, 3)}, "is a model that edits images"),
        (lambda state: state | {FIRST: torch.zeros(8, 5, 3, 3)}, "does not fit Stable Diffusion 1.x"),
        (lambda state: state | {SDXL: torch.zeros(1)}, r"is Stable Diffusion XL \(SDXL\)"),
        (lambda state: {FLUX: torch.zeros(1)}, "is Flux; of models in one file"),
        (lambda state: {"lora_unet_x.lora_down.weight": torch.zeros(1)}, "is a LoRA, no base model"),
        (lambda state: without(state, "first_stage"), r"it has no vae \(first_stage_model"),
        (lambda state: {"something": torch.zeros(1)}, "it has no unet and no vae and no text_enc"),
        (lambda state: without(state, "model.diffusion_model.output_blocks.11"), "BK-SDM-Tiny's is"),
        (lambda state: without(state, "model.diffusion_model.time_embed"), "it has no .*time_embed"),
        (lambda state: without(state, TEXT), f"it has no {TEXT}.*, 2 such tensors in all"),
        (lambda state: state | {"v_pred": torch.zeros(1)}, "v-prediction"),
    ],
)
def test_other_kinds_of_files_are_told_apart(change: object, message: str, small: Path) -> None:
    save_file(change(load_file(small)), small)
    with pytest.raises(BunnyLoraError, match=message):
        components.resolve_base_model("v1-5.safetensors")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("v1-5.safetensors", b"", "cannot be read as a checkpoint in a single file"),
        ("page.safetensors", b"<!doctype html><html></html>", "a web page, a Git LFS pointer"),
        ("v1-4.ckpt", b"PK", r"v1-4\.ckpt is a pickle(.|\n)*save_file\(told, .v1-4\.safetensors"),
        ("model.gguf", b"GGUF", "model.gguf is no .safetensors file"),
        ("gone.safetensors", None, "there is no such file(.|\n)*base_model takes"),
        ("folder", None, "has no model_index.json"),
    ],
)
def test_files_that_are_no_checkpoints_are_refused_in_true_words(
    name: str, content: bytes | None, message: str, project: Path
) -> None:
    if content is not None:
        (project / name).write_bytes(content)
    (project / "folder").mkdir()
    with pytest.raises(BunnyLoraError, match=message):
        components.load_components(name, torch.device("cpu"), torch.float32)
    assert not (project / "outputs").exists()
