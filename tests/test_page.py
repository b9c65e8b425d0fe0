"""A run as a page: whole without a network or a script, honest about what is missing, small."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_frames
from PIL import Image
from test_scores import make_result, with_axes

from bunny_lora import cli, report
from bunny_lora.config import load_config
from bunny_lora.core import eval_result, files
from bunny_lora.core.image_file import add_metadata, save_image
from bunny_lora.data import writing
from bunny_lora.data.frames import Sample, Source
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, random_models
from bunny_lora.report import page_parts, web
from bunny_lora.report.plot import BLUE, GREY, INK, ORANGE

EVIL = '<script>alert("1")</script>'


class Reader(HTMLParser):
    """What a page holds: tags, the attributes of each, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(path: Path) -> Reader:
    """Read a page, after looking at what every page must keep to."""
    text = path.read_text(encoding="utf-8")
    found = Reader(text)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "poster", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/jpeg;base64,")), (tag, name, value[:80])
        if tag == "img":
            assert attributes["alt"]
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert len(text.encode()) < 5_000_000
    return found


@pytest.fixture
def run(project: Path) -> Path:
    """A run with nothing but its settings."""
    folder = project / "outputs" / "run"
    settings = {
        "base_model": "random-tiny",
        "data_dir": "training_data/instance_images",
        "training": {"max_train_steps": 20, "validation_prompt": [f"rex, {EVIL}"]},
    }
    files.write_text(folder / "config.yaml", load_config(overrides=settings).to_yaml())
    files.write_json(folder / "provenance.json", {"commit": "abc", "libraries": {"torch": "2"}})
    return folder


def with_training(run: Path, n_steps: int = 20) -> None:
    lines = [
        f'{{"step": {n}, "loss": {1 / n}, "learning_rate": 0.001, "n_images": 4, "grad_norm": 1}}\n'
        for n in range(1, n_steps + 1)
    ]
    files.write_text(run / "log.jsonl", "".join(lines))
    for step in (5, 20):
        save_image(Image.new("RGB", (64, 64)), run / "samples" / f"step-{step:06d}" / "00-0.png")


def with_data(project: Path, name: str = "rex") -> None:
    path = project / "film" / "frame_0.png"
    draw_frames(path.parent, 1)
    caption = f"{name} waves, {EVIL}"
    Image.new("RGB", (64, 36), "#3366cc").save(path)
    frames = [Sample("frame_0", path, caption, (name,), 0.9, False, ((5, 5, 20, 20),), (64, 36))]
    source = Source(path.parent, "stage-4", frames, [], "digest", 0.5)
    folder = project / "training_data" / "instance_images"
    writing.prepare(source, folder, tokenizer=random_models.build_tokenizer())


def with_evaluation(run: Path, names: list[str], *, weights: str = "w") -> None:
    result = with_axes(make_result(names), 0.8, -0.3)
    for image in result.images:
        image.fidelity, image.nearest_character = 0.5, names[0]
        drawn = add_metadata(Image.new("RGB", (64, 64), "#9a9a96"), {"weights_sha256": weights})
        save_image(drawn, run / "evaluation" / image.file)
    result.run_info.final["weights_sha256"] = weights
    eval_result.write(run, result)


def test_a_run_of_which_there_is_nothing_yet_says_so_in_each_place(run: Path) -> None:
    found = page_of(report.write_report(run))
    assert "Nothing was evaluated yet: `bunny-lora evaluate`" in found.text
    assert "Nothing was chosen: `bunny-lora choose`" in found.text
    assert "No training steps in outputs/run/log.jsonl: train first." in found.text
    assert "There is no log of the training" in found.text
    assert "training_data/instance_images" in found.text
    assert str(run.parents[1]) not in found.text, "no path of this machine"
    assert not [tag for tag, _ in found.tags if tag == "img"]


def test_a_whole_run_is_all_there(run: Path, project: Path) -> None:
    with_training(run)
    with_data(project)
    with_evaluation(run, ["rex", "ellie"])
    found = page_of(report.write_report(run))
    images = [attributes["alt"] for tag, attributes in found.tags if tag == "img"]
    assert "with LoRA: rex, waving, seed 7" in images and "base model: rex, waving, seed 7" in images
    assert any(alt.startswith("Training frame: rex waves") for alt in images)
    assert any("after step 20" in alt for alt in images)
    assert "Identity is gained and what was asked for is lost" in found.text
    assert "names in pieces" in found.text and "training.max_train_steps" in found.text
    assert "Who was asked for, and who is seen" in found.text and "trained by: commit abc" in found.text
    assert "Training has come to" not in found.text and "stale" not in found.text


def test_what_comes_from_files_is_escaped(run: Path, project: Path) -> None:
    with_training(run)
    with_data(project, name=EVIL)
    with_evaluation(run, [EVIL, "ellie"])
    files.write_json(run / "provenance.json", {EVIL: EVIL})
    found = page_of(report.write_report(run))  # no tag `script`, whatever is in the files
    assert found.text.count(EVIL) > 10


def test_what_is_stale_unfinished_or_damaged_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_training(run, n_steps=7)
    with_evaluation(run, ["rex"], weights="old")
    monkeypatch.setattr(adapters, "adapter_digest", lambda folder: f"new {folder.name}")
    text = page_of(report.write_report(run)).text
    assert "Training has come to step 7 of 20" in text
    assert "The evaluation is stale" in text and "stale: other weights drew it" in text
    (run / "evaluation" / "images" / "final" / "rex-0-7.png").unlink()
    assert "no picture" in page_of(report.write_report(run)).text
    (run / "evaluation" / "eval.json").write_text('{"schema_version": 2}')
    text = page_of(report.write_report(run)).text
    assert text.count("outputs/run/evaluation/eval.json is damaged") >= 2
    assert "Loss" in text and "optimiser step" in text, "the rest is shown all the same"


def test_pictures_from_outside_the_run_are_not_shown(run: Path, project: Path) -> None:
    with_evaluation(run, ["rex"])
    Image.new("RGB", (64, 64)).save(project / "private.png")
    result = report.read_result(run)
    result.images[-1].file = "../../../private.png"
    eval_result.write(run, result)
    assert "outside the run, not shown" in page_of(report.write_report(run)).text


def test_a_page_stays_small_whatever_its_pictures_are(run: Path) -> None:
    names = [f"character {n}" for n in range(60)]
    with_evaluation(run, names)
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    for image in report.read_result(run).images[:200]:
        Image.fromarray(noise).save(run / "evaluation" / image.file)
    found = page_of(report.write_report(run))
    assert "Only the first 40 of 60 characters are listed" in found.text
    Image.fromarray(noise).save(run / "noise.png")
    many = [web.Picture(run / "noise.png", "x", boxes=[(0, 0, n / 99, 1)]) for n in range(99)]
    text = strips_page(run, many)
    assert len(text.encode()) <= web.MAX_BYTES and "so that the page stays small" in text
    with pytest.raises(BunnyLoraError, match="name fewer runs"):
        strips_page(run, [web.Picture(run / "noise.png", "x" * 60_000)] * 99)


def strips_page(run: Path, pictures: list[web.Picture]) -> str:
    content = {"title": "t", "names": ["a"], "order": "", "warnings": [], "version": "1"}
    board = {"heads": {}, "ends": [], "rows": []}
    more = {"board": board, "settings": {}, "differences": {}, "scores": [], "more_pictures": 0}
    pictured = {"pictures": [web.Strip("noise", pictures)]}
    return web.page_text("compare.html", [run], **content | more | pictured)


def test_a_folder_that_is_no_run_is_refused(project: Path, capsys: pytest.CaptureFixture) -> None:
    (project / "empty").mkdir()
    with pytest.raises(BunnyLoraError, match="is no run: there is neither"):
        report.write_report("empty")
    assert cli.main(["report", "empty"]) == 2
    assert "empty is no run" in capsys.readouterr().err


def test_the_command_writes_the_page_where_it_is_told(
    run: Path, project: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["report", "outputs/run"]) == 0
    assert capsys.readouterr().out.split() == ["outputs/run/report.html"]
    assert cli.main(["report", str(run), "--out", "mine.html"]) == 0
    assert page_of(project / "mine.html").tags


def test_charts_of_the_page_follow_its_theme(run: Path) -> None:
    with_training(run)
    drawn = str(web.svg(page_parts.loss_chart(run)))
    assert "var(--ink)" in drawn and "var(--blue)" in drawn
    assert not [colour for colour in (INK, BLUE) if colour.lower() in drawn]
    assert 'role="img" aria-label="Loss. ' in drawn and "optimiser step" in drawn
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", drawn)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_can_be_read_in_both_themes_and_in_figures() -> None:
    assert min(contrast(colour, "#FFFFFF") for colour in (INK, BLUE, ORANGE, GREY)) >= 4.5
    style = (Path(web.__file__).parent / "templates" / "style.css").read_text()
    themes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(themes) == 3
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        for name in ("ink", "grey", "blue", "orange", "green"):
            for back in ("back", "panel", "warn-back"):
                assert contrast(colours[name], colours[back]) >= 4.5, (name, back)


def test_figures_in_notebooks_have_alternative_text(run: Path) -> None:
    with_training(run)
    data, about = report.loss_curve(run)._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    alt = about["image/png"]["alt"]
    assert alt.startswith("Loss ") and "optimiser step (4 images each)" in alt
