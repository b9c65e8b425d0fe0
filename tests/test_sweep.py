"""Sweeps: every point of the grid, once, wherever it runs."""

import ast
import csv
import io
from pathlib import Path

import pytest
from conftest import draw_frames, tiny_config

from bunny_lora import cli, prepare, sweep
from bunny_lora.config import merge
from bunny_lora.core import eval_result, files
from bunny_lora.errors import BunnyLoraError
from bunny_lora.trainer import LoRATrainer


@pytest.fixture
def file(project: Path, tiny_model: str) -> Path:
    """A grid of two ranks over a run of one step."""
    draw_frames(project / "pictures", 4)
    one_step = {"max_train_steps": 1, "gradient_accumulation_steps": 1}
    quick = {"training": one_step, "evaluation": {"num_images_per_prompt": 1}}
    config = tiny_config(
        tiny_model, **merge({"source": "pictures", "character_names": ["ellie"]}, quick)
    )
    (project / "params" / "base.yaml").write_text(config.to_yaml())
    path = project / "sweep.yaml"
    path.write_text("config: params/base.yaml\noutput_dir: sweeps/a\ngrid:\n  lora.rank: [1, 2]\n")
    return path


def board(project: Path) -> list[dict[str, str]]:
    text = (project / "sweeps" / "a" / "leaderboard.csv").read_text()
    return list(csv.DictReader(io.StringIO(text)))


def test_a_sweep_trains_and_judges_each_point_once(
    file: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sweep", str(file)]) == 0
    rows = board(project)
    assert {row["lora.rank"] for row in rows} == {"1", "2"}
    axis = "identity" if all(row["identity"] for row in rows) else "fidelity"
    assert float(rows[0][axis]) >= float(rows[1][axis])
    page = (project / "sweeps" / "a" / "leaderboard.html").read_text()
    assert f"best first by {axis}" in page and "rank-1" in page and "rank-2" in page
    for row in rows:
        result = eval_result.read(project / row["run"])
        assert float(row["fidelity"]) == result.models["final"].all.fidelity.mean
        told = (
            result.identity and result.identity.change and result.identity.models["final"]["all"].mean
        )
        assert row["identity"] == ("" if told is None else str(told))
        config = files.read_json(project / row["run"] / "final" / "unet" / "adapter_config.json")
        assert str(config["r"]) == row["lora.rank"]
    printed = capsys.readouterr().out
    assert "leaderboard.csv" in printed and "leaderboard.html" in printed
    assert f"2 runs, best first by {axis}" in printed
    before = {path: path.stat().st_mtime_ns for path in project.glob("sweeps/a/*/final/*/*")}
    assert cli.main(["sweep", str(file)]) == 0
    assert "2 runs, 2 of them done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before} and board(project) == rows


def test_points_with_other_data_settings_have_data_of_their_own(file: Path, project: Path) -> None:
    for name, n_frames in (("few", 2), ("many", 3)):
        draw_frames(project / name, n_frames)
    text = file.read_text().replace("[1, 2]", "[1, 2]\n  source: [few, many]")
    file.write_text(text)
    grid = sweep.read_sweep(file)[1]
    assert len({run.config.data_dir for run in grid}) == 2
    for run in grid[:2]:
        assert prepare.prepare_data(run.config)["n_images"] == {"few": 2, "many": 3}[run.config.source]
    file.write_text(text.replace("source: [few, many]", "data_dir: [a/b, c/d]"))
    assert {run.config.data_dir for run in sweep.read_sweep(file)[1]} == {"a/b", "c/d"}


def test_every_setting_that_prepare_reads_is_known_to_a_sweep() -> None:
    tree = ast.parse(Path(prepare.__file__).read_text(encoding="utf-8"))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "config"
    }
    assert read - {"data_path", "is_set", "held_out"} == set(prepare.SETTINGS)  # training's


def test_a_run_that_was_trained_further_is_judged_again(file: Path, project: Path) -> None:
    sweep.sweep_here(sweep.read_sweep(file)[1][:1])
    base = project / "params" / "base.yaml"
    base.write_text(base.read_text().replace("max_train_steps: 1", "max_train_steps: 2"))
    run = sweep.read_sweep(file)[1][0]
    assert not run.done
    LoRATrainer(config=run.config).train()  # and the power goes before the evaluation
    assert not run.done
    sweep.sweep_here([run])
    assert run.done


def test_a_point_that_cannot_be_trained_does_not_stop_the_others(
    file: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = file.read_text().replace("lora.rank: [1, 2]", "lora.target_modules: [[no_such], [to_q]]")
    file.write_text(text)
    assert cli.main(["sweep", str(file)]) != 0
    assert [row["lora.target_modules"] for row in board(project)] == ["['to_q']"]
    told = capsys.readouterr().err
    assert "1 of 2 runs failed" in told and "no_such" in told and "Traceback" not in told


def test_jobs_of_a_cluster_do_the_same(file: Path, project: Path) -> None:
    pytest.importorskip("submitit")
    file.write_text(file.read_text().replace("[1, 2]", "[1]"))  # Each job is a process, which is slow.
    folder, grid = sweep.read_sweep(file)
    failures = sweep.sweep_on_cluster(grid, folder, {"timeout_min": 5}, cluster="local")
    assert failures == []
    assert len(sweep.leaderboard(folder, grid)[0]) == 1 and all(run.done for run in grid)


def test_without_a_cluster_it_says_so(
    file: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    commands = project / "commands"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))
    assert cli.main(["sweep", str(file), "--slurm", "timeout_min=5"]) == 2
    told = capsys.readouterr().err
    assert "srun" in told and "Traceback" not in told

    for name in ("srun", "sbatch"):  # of a cluster whose controller is away
        (commands / name).write_text(
            "#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n"
        )
        (commands / name).chmod(0o755)
    assert cli.main(["sweep", str(file), "--slurm", "timeout_min=5"]) == 2
    assert "took no jobs: Unable to contact slurm controller" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {lora.rank: [1]}", "output_dir"),
        ("output_dir: a\ngrid: {}", "grid"),
        ("output_dir: a\ngrid: {lora.rank: []}", "no values"),
        ("output_dir: a\ngrid: {lora.rank: [1, 1]}", "twice"),
        ("output_dir: a\ngrid: {lora.rnk: [1]}", "lora.rank"),
        ("output_dir: a\ngrid: {lora.rank: [none]}", "lora.rank"),
        ("output_dir: a\ngird: {lora.rank: [1]}", "gird"),
        ("output_dir: 3\ngrid: {lora.rank: [1]}", "output_dir"),
        ("- 1", "no sweep"),
        ("grid: [", "no sweep"),
    ],
)
def test_a_file_that_is_no_sweep_is_explained_before_anything_starts(
    text: str, message: str, project: Path
) -> None:
    (project / "sweep.yaml").write_text(text)
    with pytest.raises(BunnyLoraError, match=message):
        sweep.read_sweep(project / "sweep.yaml")
    assert not list(project.glob("a*"))


def test_a_missing_file_is_explained(project: Path) -> None:
    with pytest.raises(BunnyLoraError, match=r"nowhere.yaml is no sweep"):
        sweep.read_sweep(project / "nowhere.yaml")
