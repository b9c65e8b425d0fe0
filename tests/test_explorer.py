"""The explorer without a frontend: values are set as a user's hand would, and other pictures appear."""

import re
from pathlib import Path

import pytest
from conftest import draw_frames, open_image, tiny_config
from ipywidgets import VBox
from PIL import Image, ImageChops
from test_figures import assert_readable, n_pictures

from bunny_lora import explorer, report
from bunny_lora.config import Config
from bunny_lora.core import choice as choice_file
from bunny_lora.core import eval_result
from bunny_lora.core.image_file import read_metadata
from bunny_lora.evaluation import evaluate
from bunny_lora.evaluation.explored import Studio, Wanted
from bunny_lora.explorer import Explorer, explore, wiped
from bunny_lora.report.choices import choice_chart, choice_grid, choice_table
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training.handover import read_handover


@pytest.fixture
def config(project: Path, tiny_model: str) -> Config:
    """A trained and evaluated run of two checkpoints."""
    draw_frames(project / "data" / "instance_images", 4)
    config = tiny_config(
        tiny_model,
        character_names=["ellie", "bunny"],
        training={"max_train_steps": 2, "save_steps": 1, "learning_rate": 0.05},
        evaluation={"prompts": ["{name}, waving"], "num_images_per_prompt": 1, "ceiling_shots": 0},
    )
    LoRATrainer(config=config).train()
    evaluate(config.run_dir, config=config)
    return config


@pytest.fixture
def seen(config: Config) -> Explorer:
    studio = Studio.of(config.run_dir, config)
    return Explorer(studio, eval_result.find(config.run_dir))


def test_what_was_drawn_appears_at_once_and_the_rest_on_demand(seen: Explorer) -> None:
    first = seen.picture.value
    assert "data:image/jpeg;base64," in first and "bunny, waving, seed" in first
    assert seen.draw.disabled and seen.status.value == ""
    drawn = set(seen.studio.run_dir.rglob("*.png"))

    seen.wipe.value = 100
    assert (base := seen.picture.value) != first
    seen.character.value = "ellie"
    assert "ellie, waving" in seen.picture.value and seen.draw.disabled
    seen.character.value = "bunny"
    assert seen.picture.value == base

    seen.wipe.value, seen.scale.value = 0, 0.5
    assert "Not drawn yet: LoRA." in seen.status.value and not seen.draw.disabled
    assert seen.picture.value, "the base model's is there"
    assert set(seen.studio.run_dir.rglob("*.png")) == drawn, "moving a slider draws nothing"
    seen.draw.click()
    assert seen.draw.disabled and seen.status.value == ""
    assert seen.progress.value == seen.progress.max == seen.studio.config.sampling.num_inference_steps
    half = seen.picture.value
    seen.scale.value = 1.0
    assert seen.picture.value != half
    new = set(seen.studio.run_dir.rglob("*.png")) - drawn
    assert [read_metadata(path)["lora_scale"] for path in new] == [0.5]


def test_a_prompt_of_ones_own_is_drawn_by_both_and_kept(seen: Explorer, config: Config) -> None:
    seen.prompt.value, seen.seed.value = "ellie on a <b>ship</b>", 7
    assert seen.picture.value == "<p>Not drawn yet.</p>"
    assert "base model and LoRA" in seen.status.value
    seen.draw.click()
    assert "ellie on a &lt;b&gt;ship" in seen.picture.value and "<b>" not in seen.picture.value
    assert len(list((config.run_dir / "evaluation" / "explored").iterdir())) == 2
    again = Explorer(Studio.of(config.run_dir, config), None)
    again.prompt.value, again.seed.value = "ellie on a <b>ship</b>", 7
    assert again.picture.value == seen.picture.value
    seen.prompt.value = "ellie " * 90
    seen.draw.click()
    assert "token" in seen.status.value, "what is cut is said"


def test_the_studios_base_model_and_lora_are_those_of_the_evaluation_to_the_bit(
    config: Config,
) -> None:
    studio = Studio.of(config.run_dir, config)
    for model in ("base", "checkpoint-1", "final"):
        wanted = Wanted(model, "ellie, waving", studio.seeds(0)[0])
        path = studio.find(wanted)
        assert path and path.parent.name == model
        before = open_image(path)
        path.unlink()
        assert studio.find(wanted) is None
        assert ImageChops.difference(open_image(studio.draw(wanted)), before).getbbox() is None
        assert studio.find(wanted)


def test_other_weights_or_settings_make_a_picture_missing(config: Config) -> None:
    studio = Studio.of(config.run_dir, config)
    wanted = Wanted("final", "ellie, waving", studio.seeds(0)[0])
    assert studio.find(wanted)
    studio.models["final"].identity["weights_sha256"] = "other"
    assert studio.find(wanted) is None


def test_a_click_on_a_cell_shows_its_pictures(seen: Explorer) -> None:
    clickable = [button for button in seen.cells.values() if not button.disabled]
    assert set(seen.cells) >= {(a, b) for a in ("ellie", "bunny") for b in ("ellie", "bunny")}
    assert clickable and seen.shown.value == ""
    clickable[0].click()
    n_shown = int(re.search(r"(\d+) pictures?", clickable[0].tooltip)[1])
    assert seen.shown.value.count("<img ") == n_shown > 0


def test_a_checkpoint_is_handed_on_by_hand(seen: Explorer, config: Config) -> None:
    seen.checkpoint.value, seen.scale.value = "checkpoint-1", 0.7
    seen.hand_on.click()
    assert "checkpoint-1, scale 0.7, guidance 7.5 is handed on" in seen.status.value
    handed = read_handover(config.run_dir)
    assert (handed.weights, handed.step, handed.why) == ("checkpoint-1", 1, "chosen by hand")
    assert handed.recommended.lora_scale == 0.7
    chosen = choice_file.find(config.run_dir)
    assert chosen.by_hand and chosen.judged_by == "nobody"
    assert "chosen by hand" in choice_table(chosen)
    assert_readable(choice_chart(chosen))
    assert "Chosen by hand" in choice_grid(config.run_dir, chosen).titles[0]
    seen.checkpoint.value, seen.scale.value = "final", 1.0
    seen.hand_on.click()
    assert read_handover(config.run_dir).weights == "final"
    assert len(choice_file.find(config.run_dir).candidates) == 2
    assert "chosen by hand" in report.write_report(config.run_dir).read_text()


def test_a_mistake_is_said_below_the_buttons(seen: Explorer, config: Config) -> None:
    for path in (config.run_dir / "checkpoint-1" / "unet").iterdir():
        path.unlink()
    seen.checkpoint.value = "checkpoint-1"
    seen.hand_on.click()
    assert "There are no weights in" in seen.status.value


def test_where_nobody_looks_there_is_a_figure_and_a_line(
    config: Config, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = explore(config.run_dir, config)
    assert_readable(figure)
    assert n_pictures(figure) == 2 * 3 and explorer.STATIC in capsys.readouterr().out
    monkeypatch.setattr(explorer, "is_watched", lambda: True)
    assert isinstance(explore(config.run_dir, config), VBox)


def test_a_picture_is_wiped_from_base_to_lora() -> None:
    base, lora = Image.new("RGB", (10, 4), "red"), Image.new("RGB", (10, 4), "blue")
    half = wiped(base, lora, 0.5)
    assert [half.getpixel((x, 0)) for x in (0, 3, 6, 9)] == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2
    assert wiped(base, lora, 0).getcolors() == lora.getcolors()
    assert wiped(base, lora, 1).getcolors() == base.getcolors()
    assert wiped(None, lora, 0.5) is lora and wiped(None, None, 0.5) is None
