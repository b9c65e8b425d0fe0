"""The worst pictures are shown as large as the best, and likely copies beside what they are like."""

from pathlib import Path

from PIL import Image
from test_figures import assert_readable, n_pictures, texts
from test_scores import make_result, score

from bunny_lora import report
from bunny_lora.core import eval_result
from bunny_lora.core.eval_parts import Copies, NearestView
from bunny_lora.core.image_file import save_image
from bunny_lora.report.extremes import merit


def written(tmp_path: Path, names: list[str], **changes: object) -> Path:
    result = make_result(names).model_copy(update=changes)
    for place, image in enumerate(result.images):
        image.fidelity = place / 100
        save_image(Image.new("RGB", (8, 8)), tmp_path / "evaluation" / image.file)
    eval_result.write(tmp_path, result)
    return tmp_path


def test_the_worst_come_first_and_as_large_as_the_best(tmp_path: Path) -> None:
    run = written(tmp_path, ["rex", "ellie"])
    figure = report.extremes_grid(run)
    assert_readable(figure)
    assert n_pictures(figure) == 18
    assert len({tuple(axes.get_position().size.round(4)) for axes in figure.axes}) == 1
    shown = texts(figure)
    assert "Worst and best by fidelity (palette: sees colours only)" in shown
    result = report.read_result(run)
    lowest = min(merit(result, image) for image in result.images if image.model == "final")
    assert any(text.startswith(f"worst: {lowest[0]:.3f}") for text in shown)


def test_likely_copies_stand_beside_what_training_saw(tmp_path: Path) -> None:
    assert "Copies: nothing to show" in texts(report.nearest_grid(written(tmp_path / "a", ["rex"])))[0]
    files = [f"images/final/rex-{p}-{s}.png" for p in (0, 1) for s in (7, 8)]
    nearest = [
        NearestView(file=file, view="images/base/rex-0-7.png", frame="f.png", similarity=0.9)
        for file in files
    ]
    above = {"base": score(0.0), "final": score(0.25)}
    found = Copies(threshold=0.8, n_views=20, above=above, sameness={}, nearest=nearest)
    figure = report.nearest_grid(run := written(tmp_path / "b", ["rex"], copies=found))
    assert_readable(figure)
    assert n_pictures(figure) == 8
    assert "25% of the pictures are nearer to a training view than held-out frames are" in texts(figure)
    table = report.scores_table(report.read_result(run))
    assert "copies of what it saw      0.250 (0.150 to 0.350)   base 0.000, held-out" in table
