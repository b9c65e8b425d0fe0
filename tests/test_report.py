import copy
import json

import pytest
from matplotlib import _pylab_helpers
from matplotlib.figure import Figure
from PIL import Image

from bunny_lora import report, runs
from bunny_lora.config import load_config
from bunny_lora.errors import BunnyLoraError

PROMPTS = ["{name}, waving", "{name}, portrait"]


def score(mean, spread=0.1):
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "n": 4}


def scores(mean, names):
    row = {measure: score(mean) for measure in report.MEASURES}
    return {"all": row, "characters": {name: copy.deepcopy(row) for name in names}}


def make_result(names, warning=None):
    pictures = [
        {"model": m, "character": c, "prompt_index": p, "prompt": PROMPTS[p].replace("{name}", c)}
        | {"seed": s, "file": f"images/{m}/{c}-{p}-{s}.png"}
        for m in ("base", "checkpoint-5", "final")
        for c in names
        for p in ((0,) if m == "checkpoint-5" else (0, 1))
        for s in ((7,) if m == "checkpoint-5" else (7, 8))
    ]
    settings = {"resolution": 64, "num_inference_steps": 2, "num_images_per_prompt": 2}
    return {
        "base_model": "a/model",
        "warning": warning,
        "settings": settings | {"features": "palette"},
        "models": {"base": scores(0.5, names), "final": scores(0.75, names)},
        "differences": scores(0.25, names),
        "drift": score(0.125),
        "reference": {
            "likeness_of_crops": dict.fromkeys(names, score(0.8)),
            "separation_of_crops": score(0.9),
            "nearest_other_frame": None,
            "chance_level": 1 / len(names),
            "n_crops": dict.fromkeys(names, 3),
        },
        "seconds_per_image": 281.25,
        "pictures": pictures,
        "training_crops": {name: [f"images/training/{name}-0.png"] for name in names},
    }


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("BUNNY_LORA_ROOT", str(tmp_path))
    folder = tmp_path / "outputs" / "run"
    changes = {"training": {"validation_prompt": ["rex, $5 and $6", "ellie"], "max_train_steps": 40}}
    runs.write_text(folder / "config.yaml", load_config(overrides=changes).to_yaml())
    (folder / "checkpoint-20").mkdir()
    (folder / "checkpoint-5").mkdir()
    log = [
        {"step": step, "loss": 1 / step, "learning_rate": 1e-4, "seconds": 2.0, "n_images": 4}
        | {"grad_norm": 1.0, "peak_memory_gb": 3.5}
        for step in range(1, 21)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"step": 21, "lo')
    for step in (5, 20):
        for name in ("00-0.png", "00-1.png", "01-0.png"):
            path = folder / "samples" / f"step-{step:06d}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), "#9a9a96").save(path)
    result = make_result(["rex", "ellie"])
    runs.write_json(folder / "evaluation" / "eval.json", result)
    crops = [file for files in result["training_crops"].values() for file in files]
    for file in [*crops, *(picture["file"] for picture in result["pictures"])]:
        path = folder / "evaluation" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "#8844aa").save(path)
    return folder


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "training_data" / "instance_images"
    folder.mkdir(parents=True)
    names = [f"frame_{i}.jpg" for i in range(5)]
    for name in names:
        Image.new("RGB", (64, 36), "#3366cc").save(folder / name)
    lines = [json.dumps({"file_name": name, "text": f"rex costs $5 & $6, {name}"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    image = {"faces": [[5, 5, 20, 20]], "confidence": 0.9, "caption_tokens": 12, "characters": ["rex"]}
    summary = {
        "n_entries": 7,
        "n_images": 5,
        "n_rescued": 1,
        "characters": {"rex": 4, "a very long name indeed": 1},
        "caption_tokens": {"limit": 77, "n_truncated": 0},
        "images": [image | {"file_name": name} for name in names],
        "dropped": [
            {"frame_id": "frame_9", "path": "instance_images/frame_0.jpg", "reason": "low <b>&"},
            {"frame_id": "frame_10", "path": "C:\\gone.jpg", "reason": "missing"},
        ],
        "dropped_by_reason": {"low <b>&": 1, "missing": 1},
    }
    runs.write_json(folder.parent / "data_summary.json", summary)
    return folder


def texts(figure):
    """All texts that a figure shows."""
    shown = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        shown += [text.get_text() for text in axes.texts]
        shown += [axes.get_title(loc="left"), *(t.get_text() for t in axes.get_yticklabels())]
    return shown


def n_pictures(figure):
    return sum(bool(axes.images) for axes in figure.axes)


def test_every_figure_shows_itself_without_pyplot(run, data_dir):
    result, summary = report.read_result(run), runs.read_json(data_dir.parent / "data_summary.json")
    figures = [
        report.contact_sheet(data_dir),
        report.characters_chart(summary),
        report.loss_curve(run),
        report.samples_grid(run),
        report.before_after_grid(run),
        report.checkpoint_grid(run),
        report.scores_chart(result),
    ]
    for figure in figures:
        assert isinstance(figure, Figure)
        assert figure._repr_png_().startswith(b"\x89PNG")
    assert not _pylab_helpers.Gcf.figs


def test_a_contact_sheet_shows_frames_boxes_and_captions(data_dir):
    figure = report.contact_sheet(data_dir, n=3)
    assert n_pictures(figure) == 3
    assert all(len(axes.patches) == 1 for axes in figure.axes)
    shown = " ".join(texts(figure)).replace("\n", " ")
    assert "3 of 5" in shown and "$5 & $6, frame_0.jpg" in shown and "frame_4.jpg" in shown


def test_characters_chart_says_who_is_there_most(data_dir):
    summary = runs.read_json(data_dir.parent / "data_summary.json")
    shown = texts(report.characters_chart(summary))
    assert "5 of 7 frames are usable; most often rex (4)" in shown
    assert "a very long nam…" in shown
    nameless = report.characters_chart(summary | {"characters": {}})
    assert any("no character is named" in text for text in texts(nameless))


def test_dropped_frames_are_told_with_their_reasons(data_dir):
    summary = runs.read_json(data_dir.parent / "data_summary.json")
    text = report.dropped_text(summary)
    assert text.splitlines()[0] == "5 of 7 frames kept, 2 left out"
    assert "frame_10  missing" in text
    table = report.dropped_table(summary, data_dir.parent)
    assert table.count("data:image/jpeg;base64,") == 1 and table.count("no picture") == 1
    assert "low &lt;b&gt;&amp;" in table and "<b>" not in table
    assert report.dropped_table(summary | {"dropped": []}) == "<p>No frame was left out.</p>"


def test_the_loss_curve_draws_every_step_of_a_log_that_breaks_off(run):
    figure = report.loss_curve(run)
    assert list(figure.axes[0].lines[0].get_xdata()) == list(range(1, 21))
    assert list(figure.axes[0].lines[0].get_ydata()) == [1 / step for step in range(1, 21)]
    assert report.smoothed([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]


def test_a_step_logged_twice_counts_once(run):
    line = {"step": 20, "loss": 9.0, "learning_rate": 1e-4, "seconds": 1, "n_images": 4}
    with (run / "log.jsonl").open("a") as log:
        log.write("\n" + json.dumps(line) + "\n")
    assert [r["loss"] for r in report.read_log(run) if r["step"] == 20] == [9.0]


def test_without_steps_or_samples_there_is_a_clear_message(tmp_path):
    with pytest.raises(BunnyLoraError, match="No training steps"):
        report.loss_curve(tmp_path)
    with pytest.raises(BunnyLoraError, match="No samples"):
        report.samples_grid(tmp_path)


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


def test_scores_table_is_deterministic_and_never_too_wide():
    table = report.scores_table(make_result(["rex", "an endless name of a character"]))
    assert table == report.scores_table(make_result(["rex", "an endless name of a character"]))
    assert max(map(len, table.splitlines())) <= report.TABLE_WIDTH
    row = "rex             fidelity       0.500   0.750   +0.250    +0.150 to +0.350    0.800"
    assert row in table.splitlines()
    assert "an endless nam…" in table and "281.2 s an image" in table


def test_headlines_are_honest():
    result = make_result(["rex"], warning="random weights")
    assert "raised fidelity" in report.scores_table(result)
    assert "random weights" in report.scores_table(result)
    assert any("random weights" in text for text in texts(report.scores_chart(result)))
    result["differences"]["all"]["fidelity"] = score(0.05)
    assert "No clear change" in report.scores_table(result)
    result["differences"]["all"]["fidelity"] = {"mean": 0.5, "low": None, "high": None, "n": 1}
    assert "too few images" in report.scores_table(result)


def test_one_image_a_character_has_no_consistency_and_no_interval():
    result = make_result(["rex"])
    for part in (result["models"]["base"], result["models"]["final"], result["differences"]):
        for row in (part["all"], part["characters"]["rex"]):
            row["consistency"] = None
            row["fidelity"] |= {"low": None, "high": None}
    assert report.scores_chart(result)._repr_png_()
    assert "rex             fidelity       0.500   0.750   +0.250" in report.scores_table(result)


def test_run_summary_says_where_the_run_stands(run):
    lines = report.run_summary(run).splitlines()
    assert "run         outputs/run" in lines
    assert "steps       20 of 40, 4 images each" in lines
    assert "time        2.00 s a step, 0.50 s an image" in lines
    assert "saved       checkpoint-5, checkpoint-20" in lines


def test_figures_are_saved_whole(run, tmp_path):
    path = report.save_figure(report.loss_curve(run), tmp_path / "new" / "loss.png")
    with Image.open(path) as image:
        assert image.width == 1100
    assert [p.name for p in path.parent.iterdir()] == ["loss.png"]
