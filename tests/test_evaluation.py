import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import draw_frames
from PIL import Image, ImageDraw

from bunny_lora import evaluation, inference
from bunny_lora.config import load_config
from bunny_lora.core import eval_result, files
from bunny_lora.core.eval_result import MEASURES
from bunny_lora.data import writing
from bunny_lora.data.frames import Sample, Source
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import protocol
from bunny_lora.model import adapters, components

FURS = {"rex": "#cc3333", "ellie": "#3366cc"}
SETTINGS = {
    "base_model": "random-tiny",
    "resolution": 64,
    "training": {"mixed_precision": "no"},
    "lora": {"rank": 2, "train_text_encoder": True},
    "sampling": {"num_inference_steps": 2},
    "evaluation": {
        "prompts": ["{name}, waving", "a photo of {name}"],
        "num_images_per_prompt": 2,
        "ceiling_shots": 0,
        "num_drift_images": 4,
        "other_prompts": ["a dog"],
    },
}


def write_adapters(folder, strength):
    parts = components.load_components("random-tiny", torch.device("cpu"), torch.float32)
    lora = load_config(overrides=SETTINGS).lora
    for part in adapters.PARTS:
        model = getattr(parts, part)
        handle = adapters.attach(model, part, lora, base_model="random-tiny", seed=1)
        for parameter in adapters.trainable_parameters(model).values():
            parameter.data += strength
        adapters.save_adapter(handle, folder / part)


def write_data(root, furs=FURS):
    frames = []
    for name, fur in furs.items():
        for index in range(4):
            x, box = 10 + 12 * index, ()
            image = Image.new("RGB", (96, 72), ["#87ceeb", "#c8e6a0"][index % 2])
            ImageDraw.Draw(image).ellipse([x, 20, x + 36, 56], fill=fur, outline="black")
            path = root / "film" / f"{name}_{index}.png"
            inference.save_image(image, path)
            if index:
                box = ((x, 20, x + 36, 56),)
            known = () if name == "nobody" else (name,)
            frames.append(Sample(path.stem, path, "a caption", known, 0.9, False, box, image.size))
    both = root / "film" / "both.png"
    shutil.copy(frames[0].path, both)
    known = tuple(name for name in furs if name != "nobody")
    frames.append(replace(frames[0], frame_id="both", path=both, characters=known))
    source = Source(root / "film", "stage-4", frames, [], "digest")
    writing.prepare(source, root / "training_data" / "instance_images")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project with prepared data and a finished run of a tiny random model."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUNNY_LORA_ROOT", str(root))
        write_data(root)
        run = root / "outputs" / "run"
        files.write_text(run / "config.yaml", load_config(overrides=SETTINGS).to_yaml())
        for folder, strength in (("checkpoint-5", 0.05), ("checkpoint-10", 0.1), ("final", 0.1)):
            write_adapters(run / folder, strength)
        yield root


@pytest.fixture(scope="module")
def evaluated(root):
    return evaluation.evaluate(root / "outputs" / "run"), root / "outputs" / "run"


@pytest.fixture
def copy_of_run(evaluated, tmp_path):
    """The evaluated run, to be changed."""
    shutil.copytree(evaluated[1], tmp_path / "run")
    return tmp_path / "run"


def times(run):
    return {path: path.stat().st_mtime_ns for path in sorted(run.glob("evaluation/images/*/*-*-*.png"))}


def changed(run, before):
    after = times(run)
    return {
        p.relative_to(run / "evaluation/images").as_posix() for p in after if before.get(p) != after[p]
    }


def test_the_file_holds_the_result_and_says_what_was_judged(evaluated):
    result, run = evaluated
    assert eval_result.read(run) == result
    assert result.base_model == "random-tiny"
    assert result.settings.characters == ["ellie", "rex"]
    assert result.run_info.config["resolution"] == 64
    assert list(result.models) == ["base", "checkpoint-5", "final"]  # checkpoint-10 equals final
    assert result.seconds_per_image > 0
    assert result.reference.chance_level == 0.5
    assert result.reference.n_crops == {"ellie": 3, "rex": 3}  # without those that show no face
    assert result.reference.nearest_other_frame.n == 9


def test_every_measure_of_every_character_is_there_with_its_difference(evaluated):
    result, _ = evaluated
    for found in (result.models["base"], result.models["final"], result.differences):
        assert found.all.fidelity.n == 8 and found.all.consistency.n == 8
        assert set(found.characters) == {"ellie", "rex"}
    tables = (result.models["base"], result.models["final"], result.differences)
    for measure in MEASURES:
        base, final, difference = (getattr(t.characters["rex"], measure).mean for t in tables)
        assert difference == pytest.approx(final - base, abs=3e-5)
    assert result.drift.n == 4 and result.drift.mean > 0


def test_base_and_lora_draw_the_same_prompts_with_the_same_seeds(evaluated):
    result, run = evaluated
    drawn = {"base": [], "final": []}
    for picture in result.images:
        with Image.open(run / "evaluation" / picture.file) as image:
            made = json.loads(image.info["parameters"])
        assert (made["prompt"], made["seed"]) == (picture.prompt, picture.seed)
        drawn.get(picture.model, []).append((picture.prompt, picture.seed))
    assert drawn["base"] == drawn["final"]
    prompts = {prompt for prompt, _ in drawn["base"]}
    assert {"rex, waving", "a photo of ellie", "waving", "a photo of cartoon character"} <= prompts
    assert len({seed for _, seed in drawn["base"]}) == 6  # two of a name's two prompts, four of others


def test_base_is_the_lora_at_scale_zero(evaluated):
    result, run = evaluated
    picture = next(p for p in result.images if p.model == "base")
    pipe = inference.load_lora_pipeline(lora_weights_dir=run / "final")
    off = inference.generate_image(pipe, picture.prompt, seed=picture.seed, lora_scale=0.0)
    on = inference.generate_image(pipe, picture.prompt, seed=picture.seed)
    with Image.open(run / "evaluation" / picture.file) as base:
        assert base.convert("RGB").tobytes() == off.tobytes() != on.tobytes()


def test_a_second_evaluation_draws_nothing_and_says_the_same(evaluated, monkeypatch):
    result, run = evaluated
    before = times(run)
    monkeypatch.setattr(inference, "load_lora_pipeline", lambda *_: pytest.fail("loaded a model"))
    assert evaluation.evaluate(run) == result
    assert not changed(run, before)


def test_other_weights_make_their_own_pictures_stale_and_no_others(copy_of_run):
    before = times(copy_of_run)
    write_adapters(copy_of_run / "final", 0.2)
    write_adapters(copy_of_run / "checkpoint-10", 0.2)
    (copy_of_run / "checkpoint-15" / "unet").mkdir(parents=True)  # no adapter in it: passed over
    evaluation.evaluate(copy_of_run)
    assert {name.split("/")[0] for name in changed(copy_of_run, before)} == {"final"}
    assert len(changed(copy_of_run, before)) == 20


def test_other_settings_and_damaged_pictures_are_drawn_again(copy_of_run):
    before = times(copy_of_run)
    cut, empty = sorted(copy_of_run.glob("evaluation/images/base/rex-*.png"))[:2]
    cut.write_bytes(cut.read_bytes()[:-200])
    Image.new("RGB", (64, 64)).save(empty)
    evaluation.evaluate(copy_of_run)
    assert changed(copy_of_run, before) == {f"base/{cut.name}", f"base/{empty.name}"}

    config = load_config(copy_of_run / "config.yaml", {"sampling": {"guidance_scale": 3}})
    before = times(copy_of_run)
    evaluation.evaluate(copy_of_run, config=config)
    assert len(changed(copy_of_run, before)) == len(before)


def test_a_run_is_judged_and_handed_on_at_its_own_scale_and_the_base_model_at_none(copy_of_run):
    before = times(copy_of_run)
    text = load_config(copy_of_run / "config.yaml", {"sampling": {"lora_scale": 0.5}}).to_yaml()
    files.write_text(copy_of_run / "config.yaml", text)
    result = evaluation.evaluate(copy_of_run)
    assert result.settings.lora_scale == 0.5
    assert {name.split("/")[0] for name in changed(copy_of_run, before)} == {"final", "checkpoint-5"}
    spec = protocol.specs_of(load_config(copy_of_run / "config.yaml"), "final", "rex")[0]
    pipe = inference.load_lora_pipeline(lora_weights_dir=copy_of_run)
    drawn = inference.generate_image(pipe, spec.prompt, seed=spec.seed)
    assert pipe.recommended.lora_scale == 0.5
    with Image.open(copy_of_run / "evaluation" / spec.file) as picture:
        assert picture.convert("RGB").tobytes() == drawn.tobytes()


def test_frames_that_show_one_character_alone_are_preferred():
    images = [
        Sample("", Path(), "", characters, faces=((0, 0, 9, 9),) * n_faces)
        for characters, n_faces in ((("rex", "ellie"), 1), (("rex",), 2), (("rex",), 1), (("rex",), 0))
    ]
    assert evaluation.images_of(images, "rex") == images[2:]  # a second face may be a passer-by's
    assert evaluation.images_of(images[:2], "rex") == images[1:2]
    assert evaluation.images_of(images, "ellie") == images[:1]
    assert evaluation.images_of(images, "phil") == []


def test_data_without_names_has_one_subject(root, tmp_path):
    write_data(tmp_path, {"nobody": "#cc3333"})
    shutil.copytree(root / "outputs" / "run" / "final", tmp_path / "run" / "final")
    changes = {"instance_prompt": "a caption"}
    changes["evaluation"] = {
        "num_images_per_prompt": 1,
        "ceiling_shots": 1,
        "prompt_features": "bunny-world",
    }
    config = load_config(root / "outputs" / "run" / "config.yaml", changes)
    result = evaluation.evaluate(
        tmp_path / "run", config=config, data_dir=tmp_path / "training_data" / "instance_images"
    )
    assert result.settings.characters == [protocol.SUBJECT]
    assert result.reference.chance_level == 1
    assert "a caption, waving" in {picture.prompt for picture in result.images}
    assert result.identity.anchors[protocol.SUBJECT].ceiling.n == 1
    assert set(result.following.models) == set(result.colour.models) == {"base", "final"}
    of_subject = [picture for picture in result.images if picture.character == protocol.SUBJECT]
    assert all(picture.following is not None for picture in of_subject)


@pytest.mark.parametrize("prompt", ["my toon", "cartoon bunny", ""])
def test_a_prompt_that_names_nobody_is_never_judged_as_if_it_did(root, tmp_path, prompt):
    """No caption has the first, the second is what all characters are, the third is none."""
    data_dir = draw_frames(tmp_path / "mine", 3)
    shutil.copytree(root / "outputs" / "run" / "final", tmp_path / "run" / "final")
    changes = {"instance_prompt": prompt, "prior_preservation": {"class_prompt": "cartoon bunny"}}
    config = load_config(root / "outputs" / "run" / "config.yaml", changes)
    with pytest.raises(BunnyLoraError, match=r"Nobody is named in the training data.*character_names"):
        evaluation.evaluate(tmp_path / "run", config=config, data_dir=data_dir)
    assert not (tmp_path / "run" / "evaluation").exists()


def test_names_can_be_told_when_the_training_is_over(root, tmp_path):
    data_dir = draw_frames(tmp_path / "mine", 3)
    shutil.copytree(root / "outputs" / "run" / "final", tmp_path / "run" / "final")
    changes = {"character_names": ["Ellie"], "evaluation": {"num_images_per_prompt": 1}}
    config = load_config(root / "outputs" / "run" / "config.yaml", changes)
    result = evaluation.evaluate(tmp_path / "run", config=config, data_dir=data_dir)
    assert result.reference.n_crops == {"ellie": 3}


def test_data_that_nobody_prepared_is_judged_whole(root, tmp_path):
    data_dir = draw_frames(tmp_path / "mine", 3)
    table = data_dir / "metadata.jsonl"
    table.write_text(table.read_text().replace("ellie", "my toon"))
    shutil.copytree(root / "outputs" / "run" / "final", tmp_path / "run" / "final")
    changes = {"instance_prompt": "my toon", "evaluation": {"num_images_per_prompt": 1}}
    config = load_config(root / "outputs" / "run" / "config.yaml", changes)
    result = evaluation.evaluate(tmp_path / "run", config=config, data_dir=data_dir)
    assert result.reference.n_crops == {protocol.SUBJECT: 3}
    assert result.reference.n_frames == 3
    assert set(result.models["final"].characters) == {protocol.SUBJECT}
    prompts = [picture.prompt for picture in result.images if picture.model == "final"]
    assert list(dict.fromkeys(prompts)) == [
        "my toon, waving",
        "a photo of my toon",
        "waving",
        "a photo of cartoon character",
        "a dog",
        "",
    ]
    assert len(list(tmp_path.glob("run/evaluation/images/training/subject-*.png"))) == 3


def test_a_run_without_weights_or_data_is_refused(copy_of_run, tmp_path):
    with pytest.raises(BunnyLoraError, match=r"metadata\.jsonl is not there"):
        evaluation.evaluate(copy_of_run, data_dir=tmp_path / "nothing" / "here")
    shutil.rmtree(copy_of_run / "final")
    with pytest.raises(BunnyLoraError, match="No LoRA adapter"):
        evaluation.evaluate(copy_of_run)
