"""The command line: each command does its work, and a mistake is one message without a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw_frames, tiny_config
from PIL import Image

from bunny_lora import cli, session
from bunny_lora.config import json_schema, load_config
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import hub
from bunny_lora.world.film import write_film


@pytest.fixture
def config_file(project: Path, tiny_model: str) -> Path:
    draw_frames(project / "data" / "instance_images", 3)
    path = project / "params" / "tiny.yaml"
    path.write_text(
        tiny_config(tiny_model, training={"max_train_steps": 1}, character_names=["ellie"]).to_yaml()
    )
    return path


def test_train_generate_and_evaluate_work_one_after_the_other(
    config_file: Path, project: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["train", "--config", str(config_file), "--set", "lora.rank=3"]) == 0
    adapter = json.loads((project / "run/final/unet/adapter_config.json").read_text())
    assert adapter["r"] == 3
    size = ["--width", "32", "--height", "32", "--steps", "2"]
    picture = ["generate", "--lora-weights", "run/final", "--prompt", "ellie", *size]
    assert cli.main([*picture, "--output", "one.png"]) == 0
    assert (
        cli.main([*picture, "--prompt", "rex", "--seed", "1", "--seed", "2", "--output", "many"]) == 0
    )
    with Image.open("one.png") as image:
        assert image.size == (32, 32)
    names = sorted(path.name for path in Path("many").iterdir())
    assert names == ["00-1.png", "00-2.png", "01-1.png", "01-2.png"]
    assert cli.main(["evaluate", "--config", str(config_file)]) == 0
    assert (project / "run/evaluation/eval.json").is_file()
    assert "fidelity" in capsys.readouterr().out.lower()


def test_prepare_reads_a_run_by_name_and_lists_what_it_left_out(
    project: Path, tiny_model: str, capsys: pytest.CaptureFixture
) -> None:
    write_film(project / "outputs" / "film", n_frames=12)
    setting = ["--set", f"base_model={tiny_model}", "--set", "data_dir=prepared/images"]
    (project / "params" / "cpu.yaml").write_text("finetuning: {}")
    assert cli.main(["prepare", "--source", "film", *setting]) == 0
    assert len((project / "prepared/images/metadata.jsonl").read_text().splitlines()) == 12
    assert "confidence" in capsys.readouterr().out


def test_config_prints_a_file_that_can_be_read_back(
    config_file: Path, capsys: pytest.CaptureFixture
) -> None:
    cli.main(["config", "--config", str(config_file), "--set", "training.seed=5"])
    printed = capsys.readouterr()
    config_file.write_text(printed.out)
    assert load_config(config_file).training.seed == 5
    assert "# Denoising steps a picture" in printed.out and "named by you" in printed.err


def test_config_prints_the_schema_alone(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_download_fetches_the_named_model_or_the_configurations(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fetched = []
    monkeypatch.setattr(hub, "fetch", fetched.append)
    assert cli.main(["download", "owner/name@v1"]) == 0
    assert cli.main(["download", "--set", "base_model=owner/other"]) == 0
    assert fetched == ["owner/name@v1", "owner/other"]
    assert cli.main(["download", "--config", str(config_file)]) == 0
    assert "needs no download" in capsys.readouterr().out and len(fetched) == 2


def test_a_mistake_is_one_message_and_status_2(project: Path) -> None:
    command = [sys.executable, "-m", "bunny_lora", "train", "--config", "params/none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project)
    assert done.returncode == 2
    assert "No configuration at" in done.stderr and "Traceback" not in done.stderr


def test_what_is_typed_starts_at_the_working_folder_and_yaml_at_the_root(
    config_file: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = project / "notebooks"
    (here / "prompts.txt").write_text("ellie\n")
    monkeypatch.chdir(here)
    size = ["--width", "32", "--height", "32", "--steps", "1"]
    assert cli.main(["train", "--config", "params/tiny.yaml"]) == 0
    assert (project / "run" / "final").is_dir(), "output_dir of the YAML starts at the root"
    assert cli.main(["train", "--config", "params/tiny.yaml", "--output-dir", "typed"]) == 0
    assert (here / "typed" / "final").is_dir()
    one = ["generate", "--lora-weights", "run", "--prompt", "ellie", *size]
    assert cli.main(one) == 0
    assert cli.main([*one, "--output", "made/two.png"]) == 0
    many = ["generate", "--lora-weights", "run/final", "--prompts", "prompts.txt", *size]
    assert cli.main([*many, "--out", "many"]) == 0
    assert (
        cli.main(["export", "--lora-weights", "run", "--output", "exported", "--format", "peft"]) == 0
    )
    made = {path.name for path in here.iterdir()} - {"prompts.txt"}
    assert made == {"out.png", "made", "many", "exported", "typed"}
    assert (here / "many" / "0000-42.png").is_file() and (here / "made" / "two.png").is_file()


def test_what_lies_in_both_is_taken_from_the_working_folder(
    config_file: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (project / "notebooks" / "params").mkdir()
    text = config_file.read_text()
    (project / "notebooks" / "params" / "tiny.yaml").write_text(text.replace("seed: 42", "seed: 7"))
    monkeypatch.chdir(project / "notebooks")
    assert cli.main(["config", "--config", "params/tiny.yaml"]) == 0
    assert "seed: 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (["--steps", "0"], "num_inference_steps 0"),
        (["--guidance", "nan"], "guidance_scale nan"),
        (["--lora-scale", "nan"], "lora_scale nan"),
        (["--width", "100"], "width 100"),
        (["--seed", "-1"], "seed -1"),
        (["--out", "picture.jpg"], "written as PNG"),
        (["--out", "keep.png"], "is a folder"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    project: Path, tiny_model: str, capsys: pytest.CaptureFixture, option: list, reason: str
) -> None:
    (project / "keep.png").mkdir()
    command = ["generate", "--base-model", tiny_model, "--prompt", "x"]
    size = ["--width", "32", "--height", "32", "--steps", "1"]
    assert cli.main([*command, *size, *option]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert reason in error and error.startswith("bunny-lora: ")
    assert (project / "keep.png").is_dir() and not list(project.glob("picture*"))


def test_wrong_settings_are_all_shown(config_file: Path, capsys: pytest.CaptureFixture) -> None:
    wrong = ["--set", "lora.rank=0", "--set", "training.max_steps=3"]
    assert cli.main(["train", "--config", str(config_file), *wrong]) == 2
    error = capsys.readouterr().err
    assert "lora.rank" in error and "did you mean training.max_train_steps?" in error


@pytest.mark.parametrize(
    "output, n_prompts, seeds, expected",
    [
        ("out.png", 1, [42], ["out.png"]),
        ("out.png", 1, [1, 2], ["out-00-1.png", "out-00-2.png"]),
        ("folder", 2, [7], ["folder/00-7.png", "folder/01-7.png"]),
    ],
)
def test_output_names(output: str, n_prompts: int, seeds: list[int], expected: list[str]) -> None:
    assert [path.as_posix() for path in cli.output_paths(Path(output), n_prompts, seeds)] == expected


def test_weights_of_a_lora_may_follow_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.weighted("outputs/run/final") == (str(tmp_path / "outputs/run/final"), 1.0)
    assert cli.weighted("a.safetensors=0.7") == (str(tmp_path / "a.safetensors"), 0.7)
    (tmp_path / "odd=name").mkdir()
    assert cli.weighted(str(tmp_path / "odd=name")) == (str(tmp_path / "odd=name"), 1.0)
    with pytest.raises(BunnyLoraError, match="strong is no number"):
        cli.weighted("a.safetensors=strong")


def test_all_models_that_a_configuration_names_can_be_fetched_beforehand() -> None:
    film = load_config(Path(__file__).parents[1] / "params" / "cpu.yaml")
    looking = ["facebook/dinov2-small", "openai/clip-vit-base-patch32@refs/pr/66"]
    assert session.models_of(film) == ["nota-ai/bk-sdm-tiny", *looking]
    tied = tiny_config("random-tiny", face_encoder="a/clip")
    assert session.models_of(tied) == ["random-tiny", "a/clip"]
