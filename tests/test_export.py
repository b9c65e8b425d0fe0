"""Exports: what is written, what is refused, and that nothing is left when a check fails."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import draw_frames, tiny_config
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapters import attached, shake
from test_scores import make_result

from bunny_lora import cli, export, inference
from bunny_lora.core import eval_result, files
from bunny_lora.errors import BunnyLoraError
from bunny_lora.export import model_card, names, writers
from bunny_lora.model import adapters, components, formats, hub, random_models
from bunny_lora.model.formats import Module
from bunny_lora.training import handover

MODULE = Module(torch.ones(1, 1), torch.ones(1, 1), 1.0)
FAST = {"num_inference_steps": 2, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def run_dir(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on six frames, judged, as far as an export looks at it."""
    root = tmp_path_factory.mktemp("project")
    folder = root / "my_run"
    parts = components.load_components(tiny_model, torch.device("cpu"), torch.float32)
    for part in adapters.PARTS:
        handle = attached(getattr(parts, part), part)
        shake(getattr(parts, part))
        adapters.save_adapter(handle, folder / "final" / part)
    data_dir = draw_frames(root / "data" / "instance_images", 6)
    images = [
        {"file_name": p.name, "characters": ["ellie"], "faces": []} for p in data_dir.glob("*.png")
    ]
    files.write_json(data_dir.parent / "data_summary.json", {"schema_version": 1, "images": images})
    config = tiny_config(tiny_model, data_dir=str(data_dir))
    files.write_text(folder / "config.yaml", config.to_yaml())
    handover.write_handover(folder, config)
    pipe = inference.load_lora_pipeline(lora_weights_dir=folder)
    image = inference.generate_image(pipe, "ellie", **FAST)
    inference.save_image(image, folder / "evaluation" / "images" / "final" / "ellie-0-1.png")
    eval_result.write(folder, make_result(["ellie"]))
    return folder


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    paths = export.export(run_dir, folder, kinds=["peft", "diffusers", "kohya", "merged"])
    names = ["peft", "pytorch_lora_weights.safetensors", "my_run.safetensors", "merged", "README.md"]
    assert [path.name for path in paths] == names and all(path.exists() for path in paths)
    return folder


def test_every_format_draws_the_picture_that_training_would(
    run_dir: Path, exported: Path, tiny_model: str
) -> None:
    pipe = inference.load_lora_pipeline(lora_weights_dir=run_dir)
    ours = inference.generate_image(pipe, "ellie", seed=3, **FAST)
    expected = torch.tensor(list(ours.tobytes())).float()
    for name in ("pytorch_lora_weights.safetensors", "my_run.safetensors", "merged"):
        plain = StableDiffusionPipeline.from_pretrained(
            exported / name if name == "merged" else tiny_model
        )
        if name != "merged":
            plain.load_lora_weights(exported / name)
        picture = plain("ellie", generator=torch.Generator("cpu").manual_seed(3), **FAST).images[0]
        difference = torch.tensor(list(picture.tobytes())).float() - expected
        assert difference.abs().max() <= 1, name


def test_a_whole_pipeline_does_not_tell_where_it_was_made(exported: Path, tiny_model: str) -> None:
    texts = [path.read_text() for path in (exported / "merged").rglob("*.json")]
    assert len(texts) > 5 and not any(str(tiny_model) in text for text in texts)


def test_a_change_that_is_small_beside_the_weights_is_merged_too(
    run_dir: Path, tmp_path: Path, tiny_model: str
) -> None:
    weights = tmp_path / "small"
    shutil.copytree(run_dir / "final", weights)
    for path in weights.glob("*/adapter_model.safetensors"):
        state = load_file(path)
        save_file({n: t * (1e-4 if "lora_B" in n else 1) for n, t in state.items()}, path)
    export.export(weights, tmp_path / "out", kinds=["merged", "kohya"], base_model=tiny_model)


def test_other_tools_find_what_they_show(exported: Path) -> None:
    with safe_open(exported / "my_run.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "4" and metadata["ss_network_alpha"] == "8.0"
    assert json.loads(metadata["ss_tag_frequency"]) == {"training": {"ellie": 6}}
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.trigger_phrase"] == "ellie"
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert metadata["ss_steps"] == "4" and metadata["ss_num_train_images"] == "6"


def test_a_lora_of_stable_diffusion_2_says_so(run_dir: Path, tiny_model: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "sd2", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, change in (
        ("unet/config.json", {"cross_attention_dim": 1024}),
        ("text_encoder/config.json", {"hidden_size": 1024}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
    ):
        path = tmp_path / "sd2" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    lora = {"unet": {"x": Module(torch.ones(1, 2), torch.ones(2, 1), 1.0)}}
    about = model_card.About.of_run(run_dir / "final", str(tmp_path / "sd2"), lora)
    told = about.kohya_metadata()
    assert (told["ss_v2"], told["ss_base_model_version"]) == ("True", "sd_v2_v")
    assert told["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert told["modelspec.prediction_type"] == "v"


def test_the_model_card_says_what_it_is(exported: Path, tiny_model: str) -> None:
    text = (exported / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    told = yaml.safe_load(front)
    assert "base_model" not in told, "the hub takes only names of its own there"
    assert told["instance_prompt"] == "ellie" and f"for {model_card._plain(tiny_model)}," in body
    assert "| ellie | 6 |" in body and "| fidelity | 0.500 | 0.750 |" in body
    assert "for 4 steps on 6 images" in body


def test_the_model_card_says_how_to_draw(run_dir: Path, tiny_model: str, tmp_path: Path) -> None:
    run_dir, lora = Path(shutil.copytree(run_dir, tmp_path / "run")), {"unet": {"x": MODULE}}

    def said(weights: str) -> str:
        about = model_card.About.of_run(run_dir / weights, tiny_model, lora)
        return model_card.model_card(about, ["x.safetensors"])

    assert "Draw with LoRA scale 1, guidance" in said("final")
    assert "as the run's own samples were drawn." in said("final")
    path = run_dir / "handover.json"
    handover = json.loads(path.read_text())
    handover |= {"why": "because", "weights": "checkpoint-1"}
    handover["recommended"] |= {"lora_scale": 0.7, "guidance_scale": 2.5}
    path.write_text(json.dumps(handover))
    assert "Draw with" not in said("final")  # Not what the run hands on
    shutil.copytree(run_dir / "final", run_dir / "checkpoint-1", dirs_exist_ok=True)
    assert "Draw with LoRA scale 0.7, guidance 2.5 and" in (text := said("checkpoint-1"))
    assert "as `choose` found." in text


def test_a_model_card_takes_any_name(run_dir: Path, tiny_model: str) -> None:
    about = model_card.About.of_run(run_dir / "final", tiny_model, {"unet": {"x": MODULE}})
    strange_names = [
        "ellie | rex",
        "a\n# b",
        "<b>__init__</b>",
        "лиса: 'x'",
        "🦊",
        "[x](y) `z`",
        "- no",
        "---",
    ]
    for name in strange_names:
        strange = dataclasses.replace(
            about, title=name, characters={name: 3}, base_model="owner/name", scores=None
        )
        _, front, body = model_card.model_card(strange, ["x.safetensors"]).split("---\n", 2)
        told = yaml.safe_load(front)
        assert told["instance_prompt"] == name and told["base_model"] == "owner/name"
        shown = re.sub(r"\\([\W_])", r"\1", body)
        assert f"# {' '.join(name.split())}\n\nLoRA of rank" in shown, name
        assert f"\n| {' '.join(name.split())} | 3 |\n" in shown, name
        assert len(re.findall(r"(?<!\\)\|", body)) == 9, "three rows of two columns"


@pytest.mark.parametrize(
    ("weights", "run", "title"),
    [
        ("outputs/lora_weights/final", "outputs/lora_weights", "ellie-rex-mimi"),
        ("outputs/bunny film/lora_weights/final", "outputs/bunny film/lora_weights", "bunny film"),
        ("outputs/foxes/checkpoint-20", "outputs/foxes", "foxes-step20"),
        ("lora_weights/final", "lora_weights", "ellie-rex-mimi"),
        ("outputs/pytorch_lora_weights/final", "outputs/pytorch_lora_weights", "ellie-rex-mimi"),
        ("style.safetensors", None, "style"),
        ("style.safetensors.safetensors", None, "style"),
        ("someone/pytorch_lora_weights.safetensors", None, "someone"),
        ("two  lines\nof it", None, "two lines of it"),
        ("\udcff", None, "?"),
    ],
)
def test_a_lora_is_named_after_what_says_something(
    weights: str, run: str | None, title: str, project: Path
) -> None:
    characters = ["ellie", "rex", "mimi", "zoe"]
    folder = project / run if run else None
    assert names.title_of(project / weights, folder, characters) == title
    assert names.title_of(project / "outputs" / "final", None, []) == "lora"


@pytest.mark.parametrize(
    ("title", "stem"),
    [
        ("bunny film", "bunny film"),
        ("a/b: <c>?", "a_b_ _c__"),
        ("con", "con_"),
        ("NUL.txt", "NUL_.txt"),
        ("лиса 🦊", "лиса 🦊"),
        ("я" * 200, "я" * 60),
        (" ... ", "lora"),
    ],
)
def test_files_are_named_as_every_system_allows(title: str, stem: str) -> None:
    assert names.file_stem(title) == stem


def test_kohyas_file_never_takes_the_place_of_diffusers(run_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "pytorch_lora_weights"
    shutil.copytree(run_dir, run)
    written = export.export(run, tmp_path / "out", kinds=["diffusers", "kohya"])
    assert [path.name for path in written[:2]] == [formats.DIFFUSERS_NAME, "ellie.safetensors"]
    assert all(path.is_file() for path in written)


def test_a_title_that_is_diffusers_name_gets_another_file(run_dir: Path, tiny_model: str) -> None:
    about = model_card.About.of_run(run_dir / "final", tiny_model, {"unet": {"x": MODULE}})
    about = dataclasses.replace(about, title="PyTorch_LoRA_Weights")
    job = writers._Job({}, tiny_model, None, about)
    assert writers._kohya_path(job, run_dir).name == "PyTorch_LoRA_Weights-kohya.safetensors"


def test_what_a_name_is_after_is_said(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "outputs" / "lora_weights"
    shutil.copytree(run_dir, run)
    export.export(run, tmp_path / "out", kinds=["kohya"])
    assert "name lora_weights says nothing: the LoRA is called ellie." in capsys.readouterr().out


def test_files_of_an_export_record_their_base_model(exported: Path, tiny_model: str) -> None:
    for name in ("peft", "pytorch_lora_weights.safetensors", "my_run.safetensors"):
        assert inference.recorded_base_model(exported / name) == tiny_model


def test_a_kohya_file_records_the_revision_of_its_base_model(
    run_dir: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "local", lambda name: Path(tiny_model))
    lora = {"unet": {"x": MODULE}}
    for name in ("owner/name@0a1b", "owner/name"):
        about = model_card.About.of_run(run_dir / "final", name, lora)
        formats.write_kohya(lora, tmp_path / "x.safetensors", about.kohya_metadata())
        assert inference.recorded_base_model(tmp_path / "x.safetensors") == name


def test_a_file_that_its_loader_reads_differently_is_not_written(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = formats.write_kohya

    def forgets_alpha(lora: formats.LoRA, path: Path, metadata: dict) -> None:
        weak = {
            part: {name: Module(m.down, m.up, float(m.rank)) for name, m in modules.items()}
            for part, modules in lora.items()
        }
        honest(weak, path, metadata)

    monkeypatch.setattr(formats, "write_kohya", forgets_alpha)
    with pytest.raises(BunnyLoraError, match="was not written: its own loader changes"):
        export.export(run_dir, tmp_path / "out", kinds=["peft", "kohya"])
    assert not any(tmp_path.iterdir())

    def forgets_half(lora: formats.LoRA, path: Path, metadata: dict) -> None:
        honest(
            {"unet": dict(list(lora["unet"].items())[1:])} | {"text_encoder": lora["text_encoder"]},
            path,
            metadata,
        )

    monkeypatch.setattr(formats, "write_kohya", forgets_half)
    with pytest.raises(BunnyLoraError, match="other modules"):
        export.export(run_dir, tmp_path / "out", kinds=["kohya"])
    assert not any(tmp_path.iterdir())


def test_the_file_for_full_stable_diffusion_is_read_back_too(
    run_dir: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA of BK-SDM-Tiny's shapes, through the loader of a Stable Diffusion 1.x without weights."""
    parts = components.load_components(tiny_model, torch.device("cpu"), torch.float32)
    pipe = components.pipeline_from(parts, tiny_model)
    with torch.device("meta"):
        pipe.unet = UNet2DConditionModel(**random_models.BK_SDM_TINY.unet)
    random = torch.Generator().manual_seed(0)
    lora = {
        "unet": {
            name: Module(
                torch.randn(2, layer.in_features, generator=random),
                torch.randn(layer.out_features, 2, generator=random),
                3.0,
            )
            for name, layer in pipe.unet.named_modules()
            if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
        }
    }
    about = model_card.About.of_run(run_dir / "final", tiny_model, lora)
    job = writers._Job(lora, tiny_model, pipe, about)
    path = writers._kohya_sd1(job, tmp_path)
    assert path.name.endswith("-experimental-for-sd1.safetensors")
    assert len(load_file(path)) == 3 * 72
    assert len(pipe.unet.config.block_out_channels) == 3, "the pipeline is as it was"

    monkeypatch.setattr(formats, "for_sd1", lambda lora: lora)  # what no reader finds its blocks in
    with pytest.raises((BunnyLoraError, RuntimeError)):
        writers._kohya_sd1(job, tmp_path)


def test_wrong_orders_are_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BunnyLoraError, match="Unknown format gguf: choose from peft"):
        export.export(run_dir, tmp_path / "out", kinds=["gguf"])
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(BunnyLoraError, match="not empty"):
        export.export(run_dir, tmp_path)
    with pytest.raises(BunnyLoraError, match="other blocks"):
        export.export(run_dir, tmp_path / "out", kinds=["kohya-sd1"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_weights_without_their_run_are_exported_too(
    run_dir: Path, tmp_path: Path, tiny_model: str
) -> None:
    shutil.copytree(run_dir / "final", tmp_path / "alone")
    paths = export.export(tmp_path / "alone", tmp_path / "out", kinds=["kohya"], base_model=tiny_model)
    assert paths[0].name == "alone.safetensors"
    assert "trigger word" not in paths[-1].read_text()


def test_nothing_is_uploaded_unless_asked_and_a_refusal_is_explained(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    uploaded = []

    class Hub:
        def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
            assert private and exist_ok
            return f"https://hub/{repository}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            if repo_id == "me/full":
                raise OSError("no space")
            uploaded.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(writers, "HfApi", Hub)
    order = ["export", "--lora-weights", str(run_dir), "--format", "peft", "--out"]
    assert cli.main([*order, str(tmp_path / "quiet")]) == 0 and not uploaded
    assert cli.main([*order, str(tmp_path / "loud"), "--hub", "me/mine"]) == 0
    assert uploaded == [("me/mine", ["README.md", "peft"])]
    assert "https://hub/me/mine" in capsys.readouterr().out
    assert cli.main([*order, str(tmp_path / "again"), "--hub", "me/full"]) == 2
    assert "hf auth login" in capsys.readouterr().err
