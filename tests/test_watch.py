"""Over a run's shoulder: what its files tell, what it is asked for, and that it learns the same."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import draw_frames, tiny_config
from rich.console import Console
from test_run_lock import holder
from test_survival import outcome

from bunny_lora import cli, report, watch
from bunny_lora.core import lock, requests
from bunny_lora.core.files import write_text
from bunny_lora.core.interrupts import StoppedError
from bunny_lora.core.status import StatusFile, read_status
from bunny_lora.errors import BunnyLoraError
from bunny_lora.trainer import LoRATrainer

TRAINING = {
    "save_steps": 2,
    "max_train_steps": 6,
    "validation_prompt": "ellie",
    "num_validation_images": 1,
}


@pytest.fixture
def data(project: Path) -> Path:
    return draw_frames(project / "data" / "instance_images", 4)


def make(tiny_model: str, output_dir: str = "run", **overrides: object) -> LoRATrainer:
    settings = {"character_names": ["ellie"], "training": TRAINING} | overrides
    return LoRATrainer(config=tiny_config(tiny_model, output_dir=output_dir, **settings))


def train(tiny_model: str, output_dir: str = "run", **overrides: object) -> LoRATrainer:
    trainer = make(tiny_model, output_dir, **overrides)
    trainer.train()
    return trainer


# What is asked for


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bytes(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = train(tiny_model, "whole")
    stopped = make(tiny_model)
    with pytest.raises(StoppedError, match=r"a request in its folder. Step 3 of 6 is saved") as caught:
        for record in stopped.steps():
            if record.step == 3:
                assert cli.main(["watch", "run", "--ask", "stop", "--once"]) == 0
    assert caught.value.exit_code == 143
    assert "asked for      stop" in capsys.readouterr().out
    assert not requests.pending(stopped.run_dir) and (stopped.run_dir / "checkpoint-3").is_dir()
    assert "Step 3 of 6 is saved" in read_status(stopped.run_dir).said
    assert outcome(train(tiny_model)) == outcome(whole)


def test_saves_and_samples_are_made_within_a_step_and_change_nothing(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = train(tiny_model, "whole")
    asked, done, last = make(tiny_model), [], 0
    for record in asked.ticks(bar=False):
        if record is not None:
            last = record.step
        elif last == 3 and not done:
            done = ["sample", "save"]
            for kind in requests.KINDS[1:]:
                requests.ask(asked.run_dir, kind)
        elif last == 3 and not requests.pending(asked.run_dir):
            done.append((asked.run_dir / "checkpoint-3" / "keep").is_file())
    assert done[2:] and all(done[2:]), "before the fourth step has ended"
    assert {path.name for path in (asked.run_dir / "samples").iterdir()} == {
        "step-000002", "step-000003", "step-000004", "step-000006"
    }  # fmt: skip
    assert "Saved as asked, to stay: run/checkpoint-3" in capsys.readouterr().out
    assert (asked.run_dir / "checkpoint-3").is_dir(), "kept, though newer ones are there"
    assert outcome(asked) == outcome(whole)


def test_a_request_from_before_the_start_is_taken_away_and_said(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    write_text(requests.path_of(make(tiny_model).run_dir, "stop"), "")
    trainer = train(tiny_model)
    assert "A request to stop from before the start was there" in capsys.readouterr().out
    assert read_status(trainer.run_dir).state == "finished" and not requests.pending(trainer.run_dir)


def test_a_stop_that_comes_with_the_last_step_finds_nothing_to_stop(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    trainer = make(tiny_model)
    for record in trainer.steps():
        if record.step == 6:
            requests.ask(trainer.run_dir, "stop")
    assert "came too late" in capsys.readouterr().out
    assert read_status(trainer.run_dir).state == "finished" and not requests.pending(trainer.run_dir)


def test_samples_that_no_prompt_names_and_saves_of_nothing_are_said(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    trainer = make(tiny_model, training={"max_train_steps": 2})
    for number, _ in enumerate(trainer.ticks(bar=False)):
        if number == 0:
            requests.ask(trainer.run_dir, "save")
            requests.ask(trainer.run_dir, "sample")
    said = capsys.readouterr().out
    assert "there is nothing yet" in said and "names none to draw" in said


def test_only_a_run_that_works_is_asked(tiny_model: str, data: Path) -> None:
    trainer = train(tiny_model, training={"max_train_steps": 1})
    with pytest.raises(BunnyLoraError, match=r"run \(finished\)"):
        watch.ask([trainer.run_dir], "stop")
    assert not requests.pending(trainer.run_dir)


# What has become of it


def test_the_status_follows_a_run_to_its_end(tiny_model: str, data: Path) -> None:
    trainer = make(tiny_model)
    seen = [report.read_run(trainer.run_dir) for record in trainer.steps() if record.step < 6]
    assert {(state.status.state, state.status.said) for state in seen} == {("working", "training")}
    assert [state.step for state in seen] == [1, 2, 3, 4, 5]
    assert read_status(trainer.run_dir).state == "finished"


def test_who_leaves_the_loop_has_stopped_and_an_accident_is_named(
    tiny_model: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tiny_model)
    for record in trainer.steps():
        if record.step == 2:
            break
    assert read_status(trainer.run_dir).state == "stopped"
    broken = make(tiny_model)
    monkeypatch.setattr("bunny_lora.training.objective.Learner.losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.train()
    status = read_status(broken.run_dir)
    assert (status.state, status.said) == ("failed", "ZeroDivisionError: division by zero")


def test_a_killed_run_has_died(tmp_path: Path) -> None:
    process = holder(tmp_path)
    StatusFile(tmp_path).write("working", "drawing samples")
    assert read_status(tmp_path).state == "working"
    process.kill()
    process.wait()
    status = read_status(tmp_path)
    assert status.state == "died"
    assert status.said == f"process {process.pid} is gone without a word; it was drawing samples"


@pytest.mark.parametrize("silent_sec, state", [(5, "working"), (600, "died")])
def test_on_another_computer_the_heartbeat_tells(tmp_path: Path, silent_sec: int, state: str) -> None:
    writer = lock.Writer(process=1, computer="elsewhere", since="2026-01-01 00:00:00")
    (tmp_path / lock.LOCK).write_text(writer.model_dump_json())
    StatusFile(tmp_path).write("working", "training")
    then = time.time() - silent_sec
    os.utime(tmp_path / lock.LOCK, (then, then))
    status = read_status(tmp_path)
    assert status.state == state
    assert state == "working" or "no sign of life from process 1 on elsewhere for 10 min" in status.said


def test_a_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SEC", 0.01)
    with lock.acquire(tmp_path):
        path = tmp_path / lock.LOCK
        os.utime(path, (1, 1))
        while path.stat().st_mtime == 1:
            time.sleep(0.01)


def test_a_run_of_an_older_version_is_finished_or_stopped(tmp_path: Path) -> None:
    assert read_status(tmp_path).state == "stopped"
    (tmp_path / "final").mkdir()
    assert read_status(tmp_path).state == "finished"


# What is shown


def line(step: int, **more: object) -> str:
    record = {"step": step, "loss": 0.5, "learning_rate": 1e-4, "n_images": 2} | more
    return json.dumps(record) + "\n"


def test_lines_that_cannot_be_read_are_left_out_and_counted(project: Path) -> None:
    run = project / "outputs" / "run"
    run.mkdir(parents=True)
    text = line(1, characters={"ellie": 2}).encode()
    text += b'{"step": 2, "lo\n\xff\xfe\n[1]\n{"loss": 3}\n' + line(3, loss=None).encode()
    (run / "log.jsonl").write_bytes(text + b'{"step": 4, "los')
    state = report.read_run(run)
    assert [record["step"] for record in state.steps] == [1, 3] and state.n_damaged == 4
    assert state.seen == {"ellie": 2}
    assert "4 lines cannot be read" in report.run_text(state)
    figure = report.run_figure(state)
    assert figure.as_png().startswith(b"\x89PNG")
    rates = next(axes for axes in figure.axes if axes.get_title(loc="left") == "Learning rate (x 1e-4)")
    assert rates.lines[0].get_ydata() == pytest.approx([1.0, 1.0])


def test_characters_are_counted_as_often_as_they_were_seen(tiny_model: str, data: Path) -> None:
    trainer = train(tiny_model)
    state = report.read_run(trainer.run_dir)
    assert state.seen == {"ellie": 6 * 2}, "six steps of two images, and she is in all of them"
    preserving = train(tiny_model, "other", preservation={"share": 0.5})
    assert report.read_run(preserving.run_dir).seen == {"ellie": 6}


def test_the_loss_on_held_out_frames_is_told_by_character(tiny_model: str, data: Path) -> None:
    draw_frames(data, 8)
    settings = {"held_out": 0.25}
    whole = train(tiny_model, "whole", **settings)
    validation = report.read_run(whole.run_dir).validation
    assert [record["step"] for record in validation] == [0, 2, 4, 6]
    assert all(
        record["characters"] == {"ellie": pytest.approx(record["loss"])} for record in validation
    )
    assert validation[0]["loss"] != validation[-1]["loss"]
    broken = make(tiny_model, **settings)
    for record in broken.steps():
        if record.step == 3:
            break
    broken = train(tiny_model, **settings)
    names = ("validation.jsonl", "log.jsonl")
    first, second = ([(t.run_dir / n).read_bytes() for n in names] for t in (whole, broken))
    assert first == second
    without = train(tiny_model, "without", **settings, training=TRAINING | {"save_steps": 6})
    assert outcome(without) == outcome(whole), "looking at it changes nothing"


def test_two_runs_are_shown_side_by_side_and_left_as_they_are(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    runs = [train(tiny_model, name).run_dir for name in ("outputs/first", "outputs/second")]
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")}
    capsys.readouterr()
    assert cli.main(["watch", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "outputs/first\n" in said and "outputs/second\n" in said and "6 of 6 (100 %)" in said
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(watch.screen_of([report.read_run(run) for run in runs], console))
    lines = console.export_text().splitlines()
    assert any("outputs/first" in row and "outputs/second" in row for row in lines)
    assert any(row.count("state") == 2 and row.count("finished") == 2 for row in lines)
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")} == before


def test_without_a_name_it_is_the_run_that_works_or_the_newest(project: Path) -> None:
    with pytest.raises(BunnyLoraError, match="No run below outputs"):
        report.working_runs()
    older, newer = project / "outputs" / "older", project / "outputs" / "sweep" / "newer"
    for number, run in enumerate((older, newer)):
        StatusFile(run).write("finished")
        os.utime(run, (number, number))
    assert report.working_runs() == [newer]
    with lock.acquire(older):
        assert report.working_runs() == [older]


def test_a_folder_without_a_run_is_refused(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["watch", "nowhere"]) == 2
    assert "No run in" in capsys.readouterr().err


def test_a_sparkline_falls_with_the_loss_in_any_encoding() -> None:
    assert watch.sparkline([3, 3, 2, 2, 1, 1], 3, "123") == "321"
    assert watch.sparkline([1.0, 1.0], 9) == 2 * watch.BARS[0]
    assert watch.sparkline([], 9) == ""


# A job of papermill's


def test_a_job_of_papermill_stopped_from_elsewhere_goes_on_to_the_same_bytes(
    project: Path, tiny_model: str, data: Path
) -> None:
    config = tiny_config(tiny_model, training={"max_train_steps": 1_000_000, "save_steps": 1_000_000})
    (project / "params" / "job.yaml").write_text(config.to_yaml())
    run = project / "run"
    arguments = ["02_train.ipynb", "out.ipynb", "-k", "python3", "-p", "config_path", "params/job.yaml"]
    arguments[0] = str(Path(__file__).parents[1] / "notebooks" / arguments[0])
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-m", "papermill", *arguments, "--no-progress-bar"]
    job = subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True)
    while (
        job.poll() is None
        and len((run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else "") < 400
    ):
        time.sleep(0.05)
    assert job.poll() is None, job.communicate()[1]
    assert cli.main(["watch", str(run), "--ask", "stop", "--once"]) == 0
    _, said = job.communicate()
    assert "Stopped by a request in its folder" in said
    stopped_at = report.read_run(run).step
    assert read_status(run).state == "stopped" and stopped_at < 1_000_000
    for folder in ("run", "unwatched"):
        training = {"max_train_steps": stopped_at + 2, "save_steps": 1_000_000}
        LoRATrainer(config=tiny_config(tiny_model, output_dir=folder, training=training)).train()
    files = [path.relative_to(run) for path in (run / "final").rglob("*.safetensors")]
    assert files
    for path in [*files, Path("log.jsonl")]:
        assert (run / path).read_bytes() == (project / "unwatched" / path).read_bytes()
