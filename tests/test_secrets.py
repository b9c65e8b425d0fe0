"""Nothing of the machine or its user is in what a run leaves behind: every file of one is searched."""

import shutil
from pathlib import Path

import pytest
from conftest import draw_frames, open_image, tiny_config

from bunny_lora import inference
from bunny_lora.cli import main
from bunny_lora.evaluation import evaluate
from bunny_lora.prepare import prepare_data
from bunny_lora.trainer import LoRATrainer

TOKEN, USER = "hf_PLANTEDtokenPLANTED", "planteduser"


@pytest.fixture
def home(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a model in it, around a project that is not; secrets in the environment."""
    home = tmp_path / USER
    shutil.copytree(tiny_model, home / "models" / "sd")
    (home / "work" / "params").mkdir(parents=True)
    (home / "work" / "notebooks").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("BUNNY_LORA_ROOT", str(home / "work"))
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, USER)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.chdir(home / "work")
    return home


def leaks(folder: Path, words: list[str]) -> list[str]:
    """The files that hold one of the words, in the text of PNGs as well."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        text = path.read_bytes()
        if path.suffix == ".png":
            text += str(open_image(path).info).encode()
        found += [f"{path.relative_to(folder)}: {word}" for word in words if word.encode() in text]
    return found


def test_no_token_user_name_or_home_path_in_any_file_of_a_run(home, capfd):
    project = home / "work"
    frames = draw_frames(home / "films" / "one", 3)
    (frames / "frame_000009.png").write_bytes(b"broken")
    config = tiny_config(
        str(home / "models" / "sd"),
        source=str(frames),
        character_names=["ellie"],
        output_dir=str(project / "outputs" / "mine"),
        data_dir=str(project / "data" / "images"),
        training={"max_train_steps": 2, "save_steps": 1, "validation_prompt": "ellie"},
        evaluation={"num_images_per_prompt": 1, "prompts": ["{name}"]},
    )
    prepare_data(config)
    run_dir = project / "outputs" / "mine"
    assert LoRATrainer(config=config).train() == run_dir / "final"
    evaluate(run_dir, config=config)
    weights = str(run_dir / "final")
    arguments = ["--prompt", "ellie", "--steps", "1", "--output", str(run_dir / "drawn.png")]
    assert main(["generate", "--lora-weights", weights, *arguments]) == 0

    files = {path.name for path in project.rglob("*")}
    assert {"config.yaml", "config.input.yaml", "provenance.json", "log.jsonl", "eval.json"} <= files
    assert {"data_summary.json", "metadata.jsonl", "adapter_config.json", "drawn.png"} <= files
    assert leaks(project, [TOKEN, USER]) == []
    printed = "".join(capfd.readouterr())
    assert TOKEN not in printed and USER not in printed


def test_a_base_model_in_the_home_folder_is_found_again_from_what_is_recorded(home):
    config = tiny_config(str(home / "models" / "sd"), data_dir="data/images")
    draw_frames(home / "work" / "data" / "images", 2)
    final = LoRATrainer(config=config).train()
    assert inference.recorded_base_model(final) == "~/models/sd"
    pipe = inference.load_lora_pipeline(lora_weights_dir=final)
    assert inference.generate_image(pipe, "ellie", num_inference_steps=1, width=32, height=32).size
