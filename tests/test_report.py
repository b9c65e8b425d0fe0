"""Figures and tables of data and training: what they say, and that they can be read."""

import json
from pathlib import Path

import pytest
from conftest import draw_frames
from PIL import Image
from test_figures import assert_readable, n_pictures, texts

from bunny_lora import dataset, report
from bunny_lora.config import load_config
from bunny_lora.core import files
from bunny_lora.data import writing
from bunny_lora.data.frames import Dropped, Sample, Source
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import random_models
from bunny_lora.report import data_figures, training_figures


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("BUNNY_LORA_ROOT", str(tmp_path))
    folder = tmp_path / "outputs" / "run"
    config = load_config(overrides={"training": {"max_train_steps": 40}})
    files.write_text(folder / "config.yaml", config.to_yaml())
    (folder / "checkpoint-20").mkdir()
    (folder / "checkpoint-5").mkdir()
    log = [
        {"step": step, "loss": 1 / step, "learning_rate": 1e-4, "seconds": 2.0, "n_images": 4}
        | {"grad_norm": 1.0, "peak_memory_gb": 3.5}
        for step in range(1, 21)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"step": 21, "lo')
    return folder


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Prepared data: five frames with a face, two that were left out."""
    monkeypatch.setenv("BUNNY_LORA_ROOT", str(tmp_path))
    frames = []
    for i in range(5):
        path = tmp_path / "outputs" / "film" / f"frame_{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 36), "#3366cc").save(path)
        name = "rex" if i else "a very long name indeed"
        caption = f"{name} costs $5 & $6, {path.name}"
        face = ((5, 5, 20, 20),)
        frames.append(Sample(path.stem, path, caption, (name,), 0.9, not i, face, (64, 36)))
    dropped = [
        Dropped("frame_9", frames[0].path, "low <b>&"),
        Dropped("frame_10", Path("C:\\gone.jpg"), "missing"),
    ]
    source = Source(path.parent, "stage-4", frames, dropped, "digest", 0.5)
    folder = tmp_path / "training_data" / "instance_images"
    writing.prepare(source, folder, tokenizer=random_models.build_tokenizer())
    return folder


@pytest.fixture
def summary(data_dir):
    return dataset.load_summary(data_dir)


def test_figures_of_data_and_training_are_readable(run, data_dir, summary):
    assert_readable(data_figures.contact_sheet(data_dir))
    assert_readable(data_figures.characters_chart(summary))
    assert_readable(report.loss_curve(run))


def test_a_contact_sheet_takes_data_that_nobody_prepared(tmp_path):
    folder = draw_frames(tmp_path / "mine", 2)
    with (folder / "metadata.jsonl").open("a") as lines:
        lines.write('{"file_name": "frame_000000.png"}\n')
    assert_readable(figure := data_figures.contact_sheet(folder))
    shown = " ".join(texts(figure)).replace("\n", " ")
    assert "ellie, cartoon bunny number 1" in shown and "(no caption)" in shown
    assert "boxes" not in shown


def test_characters_chart_shows_what_is_known(summary):
    assert len(data_figures.characters_chart(summary).axes) == 3
    images = [image | {"caption_tokens": None} for image in summary["images"]]
    figure = data_figures.characters_chart(summary | {"caption_tokens": None, "images": images})
    assert_readable(figure)
    assert len(figure.axes) == 2
    assert not any("Caption" in text for text in texts(figure))
    images = [image | {"confidence": None} for image in images]
    nothing = {"caption_tokens": None, "images": images, "characters": {}}
    assert_readable(figure := data_figures.characters_chart(summary | nothing))
    assert not figure.axes


def test_names_that_begin_alike_keep_a_bar_each_and_a_crowd_is_cut(summary):
    crowd = {f"a character with number {i:02d}": 40 - i for i in range(20)}
    assert_readable(figure := data_figures.characters_chart(summary | {"characters": crowd}))
    assert len(figure.axes[0].patches) == data_figures.MAX_CHARACTERS
    assert "Frames with the first 12 characters" in texts(figure)


def test_a_left_out_frame_is_shown_from_wherever_its_run_lies(summary, data_dir, tmp_path, monkeypatch):
    elsewhere = tmp_path / "outputs" / "film" / "llm_analysis"
    dropped = [{"frame_id": "1", "path": "film/frame_0.png", "reason": "low"}]
    monkeypatch.setenv("BUNNY_LORA_ROOT", str(tmp_path / "project"))
    for origin in (elsewhere, elsewhere.parent, elsewhere.parent.parent):
        assert "data:image/jpeg" in data_figures.dropped_table(summary | {"dropped": dropped}, origin)
    assert "no picture" in data_figures.dropped_table(summary | {"dropped": dropped})


def test_without_steps_there_is_a_clear_message(tmp_path):
    with pytest.raises(BunnyLoraError, match="No training steps"):
        report.loss_curve(tmp_path)


def test_a_contact_sheet_shows_frames_boxes_and_captions(data_dir):
    figure = data_figures.contact_sheet(data_dir, n=3)
    assert n_pictures(figure) == 3
    assert all(len(axes.patches) == 1 for axes in figure.axes)
    shown = " ".join(texts(figure)).replace("\n", " ")
    assert "3 of 5" in shown and "$5 & $6, frame_0.png" in shown and "frame_4.png" in shown


def test_characters_chart_says_who_is_there_most(summary):
    shown = texts(data_figures.characters_chart(summary))
    assert "5 of 7 frames are usable; most often rex (4)" in shown
    assert "a very long nam…" in shown
    nameless = data_figures.characters_chart(summary | {"characters": {}})
    assert any("no character is named" in text for text in texts(nameless))


def test_dropped_frames_are_told_with_their_reasons(summary):
    text = data_figures.dropped_text(summary)
    assert text.splitlines()[0] == "5 of 7 frames kept, 2 left out"
    assert "frame_10  missing" in text
    table = data_figures.dropped_table(summary)
    assert table.count("data:image/jpeg;base64,") == 1 and table.count("no picture") == 1
    assert "low &lt;b&gt;&amp;" in table and "<b>" not in table
    assert data_figures.dropped_table(summary | {"dropped": []}) == "<p>No frame was left out.</p>"


def test_the_loss_curve_draws_every_step_of_a_log_that_breaks_off(run):
    figure = report.loss_curve(run)
    assert list(figure.axes[0].lines[0].get_xdata()) == list(range(1, 21))
    assert list(figure.axes[0].lines[0].get_ydata()) == [1 / step for step in range(1, 21)]
    assert training_figures.smoothed([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]


def test_a_step_logged_twice_counts_once(run):
    line = {"step": 20, "loss": 9.0, "learning_rate": 1e-4, "seconds": 1, "n_images": 4}
    with (run / "log.jsonl").open("a") as log:
        log.write("\n" + json.dumps(line) + "\n")
    assert [r["loss"] for r in report.read_log(run) if r["step"] == 20] == [9.0]


def test_run_summary_says_where_the_run_stands(run):
    lines = report.run_summary(run).splitlines()
    assert "run         outputs/run" in lines
    assert "steps       20 of 40, 4 images each" in lines
    assert "time        2.00 s a step, 0.50 s an image" in lines
    assert "saved       checkpoint-5, checkpoint-20" in lines
