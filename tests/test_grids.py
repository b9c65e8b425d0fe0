"""Grids of pictures: what stands where."""

import pytest
from PIL import Image
from test_figures import assert_readable, n_pictures, texts
from test_scores import make_result

from bunny_lora import report
from bunny_lora.config import load_config
from bunny_lora.core import eval_result
from bunny_lora.core.files import write_text


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("BUNNY_LORA_ROOT", str(tmp_path))
    folder = tmp_path / "outputs" / "run"
    prompts = {"validation_prompt": ["rex, $5 and $6", "ellie"]}
    write_text(folder / "config.yaml", load_config(overrides={"training": prompts}).to_yaml())
    for step in (5, 20):
        for name in ("00-0.png", "00-1.png", "01-0.png"):
            path = folder / "samples" / f"step-{step:06d}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), "#9a9a96").save(path)
    result = make_result(["rex", "ellie"])
    eval_result.write(folder, result)
    crops = [file for files in result.training_crops.values() for file in files]
    for file in [*crops, *(image.file for image in result.images)]:
        path = folder / "evaluation" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "#8844aa").save(path)
    return folder


def test_grids_are_readable(run):
    for draw in (report.samples_grid, report.before_after_grid, report.checkpoint_grid):
        assert_readable(draw(run))
    assert_readable(report.before_after_grid(run, max_rows=2, max_images=1))


def test_without_samples_the_figure_says_how_to_get_some(tmp_path):
    figure = report.samples_grid(tmp_path)
    assert n_pictures(figure) == 0 and "No validation samples" in texts(figure)


def test_samples_stand_beside_their_prompts(run):
    figure = report.samples_grid(run)
    assert n_pictures(figure) == 6
    shown = texts(figure)
    assert shown.count("rex, $5 and $6") == 2
    assert shown.index("step 5") < shown.index("step 20")


def test_before_after_has_crops_base_and_lora_in_every_row(run):
    figure = report.before_after_grid(run)
    assert n_pictures(figure) == 4 * (1 + 2 + 2)
    assert {"training frames", "base model", "with LoRA"} <= set(texts(figure))
    narrow = texts(report.before_after_grid(run, max_rows=2))
    assert "rex, waving" in narrow and "ellie, waving" in narrow  # everyone before a second prompt


def test_the_checkpoint_grid_runs_from_base_to_final(run):
    figure = report.checkpoint_grid(run)
    assert n_pictures(figure) == 2 * 3
    shown = texts(figure)
    assert shown.index("base model") < shown.index("step 5") < shown.index("final")


def test_a_picture_that_is_gone_leaves_a_note(run):
    (run / "evaluation/images/final/rex-0-7.png").unlink()
    assert texts(report.before_after_grid(run)).count("no picture") == 1


def test_a_prompt_without_a_name_says_that_it_should_not_change(run):
    result = report.read_result(run)
    for image in result.images:
        if image.character == "ellie":
            image.character, image.prompt = "-", "waving"
    eval_result.write(run, result)
    shown = [text.replace("\n", " ") for text in texts(report.before_after_grid(run))]
    assert "waving (names nobody: should not change)" in shown and "rex, waving" in shown
