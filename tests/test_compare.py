"""Runs beside each other: what differs, in settings and scores, and the same pictures."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_figures import assert_readable, n_pictures, texts
from test_page import EVIL, page_of
from test_scores import make_result, score, with_axes

from bunny_lora import cli, report
from bunny_lora.compare import best_first, compare, find_runs, write_comparison
from bunny_lora.config import load_config
from bunny_lora.core import eval_result, files
from bunny_lora.core.eval_result import EvalResult
from bunny_lora.core.image_file import save_image
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation.pairs import differences
from bunny_lora.report.comparison import settings_rows, short_names
from bunny_lora.report.measures import columns, measures


def result_of(identity: float, *, names: list[str] | None = None) -> EvalResult:
    """An evaluation whose LoRA has this identity on every picture."""
    result = with_axes(make_result(names or ["rex"]), 0.8, -0.3)
    assert result.identity
    result.identity.models["final"]["all"] = eval_result.Interval(**score(identity))
    for place, image in enumerate(result.images):
        image.identity, image.fidelity, image.following = identity, 0.5 + place / 100, 0.3
    return result


def write_run(folder: Path, result: EvalResult | None, **training: object) -> Path:
    config = load_config(overrides={"output_dir": folder.name, "training": training})
    files.write_text(folder / "config.yaml", config.to_yaml())
    files.write_json(folder / "provenance.json", {})
    if result:
        eval_result.write(folder, result)
        for image in result.images:
            save_image(Image.new("RGB", (64, 64), "#337755"), folder / "evaluation" / image.file)
    return folder


@pytest.fixture
def runs(project: Path) -> list[Path]:
    """A weak run, a strong one, and one that nobody evaluated."""
    sweep = project / "outputs" / "sweep"
    weak = write_run(sweep / "weak", result_of(0.2), learning_rate=1e-4, seed=1)
    strong = write_run(sweep / "strong", result_of(0.7), learning_rate=1e-3, seed=1)
    return [weak, strong, write_run(sweep / "later", None, learning_rate=1e-3, seed=1)]


def test_only_settings_that_differ_are_listed(runs: list[Path]) -> None:
    assert settings_rows(compare(runs)) == {"training.learning_rate": ["0.0001", "0.001", "0.001"]}
    assert settings_rows(compare(runs[1:])) == {}


def test_the_same_pictures_are_compared_in_pairs(runs: list[Path]) -> None:
    found = compare(runs)
    assert found.names == ["weak", "strong", "later"]
    change = found.differences[0]["identity by facebook/dinov2-small"]
    assert (round(change.mean, 6), change.n) == (0.5, 4)
    assert found.differences[0]["fidelity by palette"].mean == 0
    assert found.differences[1] == {}


def test_pairs_need_the_same_judge_and_the_same_pictures() -> None:
    first, other = result_of(0.2), result_of(0.7)
    other.settings.features = "facebook/dinov2-small"
    assert "fidelity by palette" not in differences(first, other)
    for image in other.images:
        image.seed += 100
    assert differences(first, other) == {}


def test_the_best_comes_first_by_identity_or_else_by_fidelity(runs: list[Path]) -> None:
    found = compare([runs[2], *runs[:2]], is_sorted=True)
    assert found.names == ["strong", "weak", "later"]
    assert found.order == "best first by identity by facebook/dinov2-small; the other axis beside it"
    plain = make_result(["rex"])  # tells no identity, so all are sorted by what all tell
    plain.models["final"].all.fidelity = eval_result.Interval(**score(0.9))
    eval_result.write(runs[0], plain)
    found = compare(runs, is_sorted=True)
    assert found.names[0] == "weak" and "by fidelity by palette" in found.order
    assert best_first([run for run in found.runs if run.result is None])[1].startswith("in no order")


def test_what_different_judges_tell_stands_apart() -> None:
    first, other = measures(result_of(0.2)), measures(result_of(0.7))
    assert len(columns([first, other, []], "identity")) == 1
    renamed = [replace(m, name="identity by traits") for m in other if m.name.startswith("identity")]
    found = columns([first, renamed, []], "identity")
    assert [[m is not None for m in values] for values in found.values()] == [
        [True, False, False],
        [False, True, False],
    ]
    assert list(columns([first, [*renamed, *other]], "identity")) == list(found)[:1]


def test_what_does_not_compare_is_said(runs: list[Path]) -> None:
    result = result_of(0.7)
    result.settings.seed, result.run_info.trained_by = 5, {"data_sha256": "b"}
    eval_result.write(runs[1], result)
    result = result_of(0.2)
    result.run_info.trained_by = {"data_sha256": "a"}
    eval_result.write(runs[0], result)
    table = report.comparison_table(compare(runs))
    assert "The evaluations differ in seed" in table
    assert "The runs were trained on different data." in table
    assert "later was not evaluated" in table


def test_figures_of_a_comparison(runs: list[Path]) -> None:
    found = compare(runs)
    for figure in (report.comparison_chart(found), report.comparison_grid(found)):
        assert_readable(figure)
    grid = report.comparison_grid(found)
    assert n_pictures(grid) == 4 * 3 and {"base model", "weak", "strong", "later"} <= set(texts(grid))
    assert "identity by facebook/dinov…" in texts(report.comparison_chart(found))
    table = report.comparison_table(found)
    assert "training.learning_rate" in table and "0.500 (0.500 to 0.500)" in table
    nothing = compare(runs[2:])
    assert "none of these runs was evaluated" in texts(report.comparison_chart(nothing))[0]
    assert "none of these runs was evaluated" in texts(report.comparison_grid(nothing))[0]


def test_runs_are_found_in_a_folder_of_them_without_those_that_were_set_aside(
    runs: list[Path], project: Path
) -> None:
    write_run(runs[0].with_name("weak.old-1"), None)
    (runs[0].parent / "data").mkdir()
    assert find_runs(["outputs/sweep"]) == sorted(runs)
    assert find_runs([runs[0], "outputs/sweep/weak"]) == runs[:1]
    with pytest.raises(BunnyLoraError, match="is no run, and there is none in it"):
        find_runs([project / "params"])
    assert short_names([project / "a" / "run", project / "b" / "run"]) == ["a", "b"]
    assert short_names([project / "a" / "run", project / "run"]) == ["a", "run"]


def test_a_comparison_is_a_page(runs: list[Path], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out.split() == ["outputs/sweep/compare.html"]
    found = page_of(runs[0].parent / "compare.html")
    assert "3 runs, best first by identity" in found.text and "later was not evaluated" in found.text
    assert (
        "training.learning_rate" in found.text and "More than strong, picture by picture" in found.text
    )
    alts = [attributes["alt"] for tag, attributes in found.tags if tag == "img"]
    assert len(alts) == 4 * 3 and "not drawn" in found.text


def test_names_in_a_comparison_are_escaped(project: Path) -> None:
    folder = project / "outputs" / "<b>run"
    runs = [write_run(folder, result_of(0.2, names=[EVIL, "rex"]), learning_rate=1e-4)]
    found = page_of(write_comparison(runs))
    assert "b" not in {tag for tag, _ in found.tags} and EVIL in found.text
    assert "1 run," in found.text and "Nothing: the settings are the same" in found.text
