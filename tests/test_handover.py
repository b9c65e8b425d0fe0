"""What a run hands on: written by training and evaluation, read or refused by `load_run`."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import draw_frames, tiny_config
from diffusers import StableDiffusionPipeline
from peft import PeftModel

from bunny_lora import cli, inference
from bunny_lora.config import Config
from bunny_lora.core import files
from bunny_lora.core.image_file import read_metadata
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import evaluate
from bunny_lora.model import devices
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training.handover import read_handover, recommended_by, write_handover
from bunny_lora.training.validation import settings_of

FAST = {"num_inference_steps": 2, "width": 32, "height": 32}


@pytest.fixture
def config(project: Path, tiny_model: str) -> Config:
    data_dir = draw_frames(project / "data" / "instance_images", 3)
    images = [
        {"file_name": p.name, "characters": ["ellie"], "faces": []} for p in data_dir.glob("*.png")
    ]
    images[0]["characters"].append("rex")
    files.write_json(data_dir.parent / "data_summary.json", {"schema_version": 1, "images": images})
    return tiny_config(tiny_model, training={"max_train_steps": 2})


@pytest.fixture
def run_dir(config: Config) -> Path:
    return LoRATrainer(config=config).train().parent


def test_training_hands_on_everything_needed_to_draw(run_dir: Path, tiny_model: str) -> None:
    told = read_handover(run_dir)
    assert (told.base_model, told.weights, told.step, told.scores) == (tiny_model, "final", 2, None)
    words = [(t.word, t.training_images, t.tokens) for t in told.trigger_words]
    assert words == [("ellie", 3, 1), ("rex", 1, 1)]
    assert (told.token_budget.total, told.token_budget.for_prompt) == (77, 75)
    assert told.recommended.sampler == "PNDMScheduler"
    assert (told.recommended.width, told.recommended.num_inference_steps) == (32, 2)
    drawn = inference.generate_image(inference.load_run(run_dir), "ellie", **FAST)
    own = inference.generate_image(
        inference.load_lora_pipeline(lora_weights_dir=run_dir), "ellie", **FAST
    )
    assert drawn.tobytes() == own.tobytes()


def test_images_are_drawn_as_the_run_recommends_unless_told_otherwise(run_dir: Path) -> None:
    change_recommended(run_dir, num_inference_steps=3, guidance_scale=2.0, sampler="DDIMScheduler")
    checkpoint = next(run_dir.glob("checkpoint-*"))
    for weights in (run_dir, run_dir / "final", checkpoint):
        pipe = inference.load_lora_pipeline(lora_weights_dir=weights)
        made = json.loads(inference.generate_image(pipe, "ellie").info["parameters"])
        assert (made["num_inference_steps"], made["guidance_scale"], made["width"]) == (3, 2.0, 32)
        assert made["sampler"] == "DDIMScheduler"
        made = json.loads(inference.generate_image(pipe, "ellie", width=64).info["parameters"])
        assert (made["num_inference_steps"], made["width"]) == (3, 64)


def test_the_command_line_says_what_the_run_recommends(
    run_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["generate", "--lora-weights", str(run_dir), "--prompt", "ellie", "--out", "out.png"]
    assert cli.main(command) == 0
    said = "As the run recommends: 2 steps, guidance 7.5, 32 px wide, 32 px high, PNDMScheduler\n"
    assert said in capsys.readouterr().out
    assert cli.main([*command, "--steps", "1"]) == 0
    assert "As the run recommends: guidance 7.5, 32 px" in capsys.readouterr().out
    for way, sampler, path in (
        (["--reference"], "PNDMScheduler", "reference"),
        (["--sampler", "euler"], "EulerDiscreteScheduler", "fast"),
    ):
        assert cli.main([*command, *way]) == 0
        made = read_metadata(Path("out.png"))
        assert made is not None and (made["sampler"], made["path"]) == (sampler, path)


def test_a_sampler_with_options_is_handed_on_as_diffusers_takes_it(run_dir: Path) -> None:
    config = tiny_config(read_handover(run_dir).base_model, sampling={"sampler": "dpm++-2m-karras"})
    recommended = recommended_by(config)
    assert recommended.sampler == "DPMSolverMultistepScheduler"
    assert recommended.sampler_options == {"use_karras_sigmas": True}
    change_recommended(run_dir, **recommended.model_dump())
    pipe = inference.load_run(run_dir)
    ours = inference.generate_image(pipe, "ellie", seed=3)
    settings = json.loads(ours.info["parameters"])
    assert settings["sampler"] == "dpm++-2m-karras" == settings_of(config, "ellie", 3).sampler
    kind = getattr(diffusers, recommended.sampler)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **recommended.sampler_options)
    generator = torch.Generator("cpu").manual_seed(3)
    theirs = pipe("ellie", generator=generator, **{key: settings[key] for key in FAST}).images[0]
    pixels = [torch.tensor(list(image.tobytes())).float() for image in (ours, theirs)]
    assert (pixels[0] - pixels[1]).abs().mean() < 2


def test_an_unknown_sampler_is_explained(run_dir: Path) -> None:
    change_recommended(run_dir, sampler="os")
    with pytest.raises(BunnyLoraError, match=r"No sampler 'os': diffusers has .*DDIMScheduler"):
        inference.generate_image(inference.load_run(run_dir), "ellie")


def change_recommended(run_dir: Path, **changes: object) -> None:
    path = run_dir / "handover.json"
    content = json.loads(path.read_text())
    content["recommended"] |= changes
    path.write_text(json.dumps(content))


def test_weights_draw_in_the_precision_that_they_were_trained_in(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Whatever `auto` comes to on the machine at hand."""
    checkpoint = next(run_dir.glob("checkpoint-*"))
    monkeypatch.setattr(devices, "resolve_dtype", lambda *_: pytest.fail("worked out anew"))
    for recorded, drawn in (("bfloat16", torch.bfloat16), ("float16", torch.float32)):
        for path in (run_dir / "handover.json", checkpoint / "training_state.json"):
            path.write_text(
                re.sub(r'"precision": "\w+"', f'"precision": "{recorded}"', path.read_text())
            )
        for weights in (run_dir / "final", checkpoint):
            assert inference.run_dtype(weights, torch.device("cpu")) == drawn
    assert "trained in float16, which a CPU" in capsys.readouterr().out
    assert inference.run_dtype(run_dir / "final", torch.device("cuda")) == torch.float16


def test_a_run_that_recorded_no_precision_is_drawn_as_its_configuration_says(run_dir: Path) -> None:
    (run_dir / "handover.json").unlink()
    for state in run_dir.glob("checkpoint-*/training_state.json"):
        state.write_text(state.read_text().replace('"precision"', '"unknown"'))
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("mixed_precision: 'no'", "mixed_precision: bf16"))
    assert inference.run_dtype(run_dir / "final", torch.device("cpu")) == torch.bfloat16


def test_the_file_alone_is_enough_for_diffusers_and_peft(run_dir: Path) -> None:
    told = json.loads((run_dir / "handover.json").read_text())
    plain = StableDiffusionPipeline.from_pretrained(told["base_model"])
    assert type(plain.scheduler).__name__ == told["recommended"]["sampler"]
    for part in (run_dir / told["weights"]).iterdir():
        setattr(plain, part.name, PeftModel.from_pretrained(getattr(plain, part.name), part))
    generator = torch.Generator("cpu").manual_seed(42)
    theirs = plain("ellie", generator=generator, guidance_scale=7.5, **FAST).images[0]
    ours = inference.generate_image(inference.load_run(run_dir), "ellie", reference=True, **FAST)
    assert theirs.tobytes() == ours.tobytes()


def test_evaluation_adds_scores_that_stay_with_their_weights(run_dir: Path, config: Config) -> None:
    result = evaluate(run_dir)
    scores = read_handover(run_dir).scores
    assert scores == result.means() and scores.features == "palette"
    assert scores.final.fidelity == result.models["final"].all.fidelity.mean
    LoRATrainer(config=config).train()
    assert read_handover(run_dir).scores == scores
    longer = config.model_copy(
        update={"training": config.training.model_copy(update={"max_train_steps": 3})}
    )
    LoRATrainer(config=longer).train()
    assert read_handover(run_dir).scores is None and read_handover(run_dir).step == 3


def test_a_file_that_was_lost_is_written_by_training_again(run_dir: Path, config: Config) -> None:
    before = (run_dir / "handover.json").read_bytes()
    (run_dir / "handover.json").unlink()
    LoRATrainer(config=config).train()
    assert (run_dir / "handover.json").read_bytes() == before


def test_other_weights_than_handed_over_are_refused(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "copy")
    path = tmp_path / "copy" / "final" / "unet" / "adapter_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(BunnyLoraError, match=r"not those that handover\.json was written for"):
        inference.load_run(tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: "{", "damaged; run"),
        (lambda text: "[]", "damaged; run"),
        (
            lambda text: text.replace('"schema_version": 2', '"schema_version": 3'),
            "has schema_version 3",
        ),
        (lambda text: text.replace('"step": 2', '"step": "soon"'), "damaged: step"),
        (lambda text: text.replace('"trigger_words"', '"words"'), "damaged: trigger_words"),
    ],
)
def test_a_damaged_file_is_explained(run_dir: Path, change: object, reason: str) -> None:
    path = run_dir / "handover.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(BunnyLoraError, match=reason):
        read_handover(run_dir)


def test_version_1_is_read_which_had_another_name_for_a_score(run_dir: Path) -> None:
    path = run_dir / "handover.json"
    measures = {"fidelity": 0.5, "consistency": None, "separation": 1.0, "max_copy": 0.25}
    scores = {"features": "palette", "warning": None, "base": measures, "final": measures}
    files.write_json(path, files.read_json(path) | {"schema_version": 1, "scores": scores})
    handed_on = read_handover(run_dir).scores
    assert handed_on is not None
    assert (handed_on.final.consistency, handed_on.final.memorisation) == (None, 0.25)


def test_keys_of_later_versions_are_ignored_and_no_run_is_explained(
    run_dir: Path, tmp_path: Path
) -> None:
    told = json.loads((run_dir / "handover.json").read_text()) | {"mood": "good"}
    (run_dir / "handover.json").write_text(json.dumps(told))
    assert read_handover(run_dir).step == 2
    with pytest.raises(BunnyLoraError, match=r"no handover\.json"):
        inference.load_run(tmp_path)


def test_a_run_without_its_data_still_hands_on(run_dir: Path, config: Config, project: Path) -> None:
    shutil.rmtree(project / "data")
    write_handover(run_dir, config)
    assert read_handover(run_dir).trigger_words == []
