"""Stops, damage, failing disks and numbers that are not finite: what is lost, and what never is."""

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config
from safetensors.torch import load_file, save_file
from test_scores import make_result

from bunny_lora import report
from bunny_lora.core import eval_result, interrupts
from bunny_lora.errors import BunnyLoraError
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import checkpoint, supervision
from bunny_lora.training.resume import Start

TRAINING = {"save_steps": 2, "max_train_steps": 6}


@pytest.fixture
def data(project: Path) -> Path:
    return draw_frames(project / "data" / "instance_images", 3)


def make(
    tiny_model: str, output_dir: str = "run", resume: object = "auto", **training: object
) -> LoRATrainer:
    config = tiny_config(tiny_model, output_dir=output_dir, resume=resume, training=TRAINING | training)
    return LoRATrainer(config=config)


def train(tiny_model: str, *args: object, **kwargs: object) -> LoRATrainer:
    trainer = make(tiny_model, *args, **kwargs)
    trainer.train()
    return trainer


def at_step(trainer: LoRATrainer, step: int, action: Callable[[], object]) -> None:
    """Have `action` called before the first micro-batch of a step."""
    load = trainer.load

    def load_and_arm(start: Start) -> None:
        load(start)
        loss = trainer.setup.learner.loss

        def armed(position: int) -> torch.Tensor:
            if position == 2 * (step - 1) and trainer.setup.state.step == step - 1 and step > 1:
                action()
            return loss(position)

        trainer.setup.learner.loss = armed

    trainer.load = load_and_arm


def outcome(trainer: LoRATrainer) -> dict[str, bytes]:
    run = trainer.run_dir
    found = [*(run / "final").rglob("*.*"), run / "log.jsonl"]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in found}


def names(trainer: LoRATrainer) -> set[str]:
    return {p.name for p in trainer.run_dir.iterdir() if "checkpoint" in p.name}


# Stops


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_saves_the_last_step_and_the_same_command_goes_on(
    tiny_model: str, data: Path, number: int, code: int, capsys: pytest.CaptureFixture
) -> None:
    whole = train(tiny_model, "whole")
    stopped = make(tiny_model)
    at_step(stopped, 4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(interrupts.StoppedError, match=r"Step 3 of 6 is saved") as caught:
        stopped.train()
    assert caught.value.exit_code == code
    assert names(stopped) == {"checkpoint-2", "checkpoint-3"}
    resumed = train(tiny_model)
    assert "Going on after step 3" in (out := capsys.readouterr().out) and "nothing was lost" in out
    assert outcome(resumed) == outcome(whole)
    assert names(resumed) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_saves_by_time_change_no_number_and_do_not_pile_up(tiny_model: str, data: Path) -> None:
    whole = train(tiny_model, "whole", save_steps=6, save_minutes=None)
    seen = set()
    often = make(tiny_model, save_steps=6, save_minutes=1e-9)
    for step in range(2, 7):
        at_step(often, step, lambda: seen.add(len(names(often))))
    often.train()
    assert outcome(often) == outcome(whole)
    assert seen == {1, 2} and names(often) == {"checkpoint-6"}


# Going on


@pytest.mark.parametrize("name", [2, "run/checkpoint-2"])
def test_a_checkpoint_can_be_named_and_later_ones_are_set_aside(
    tiny_model: str, data: Path, name: object
) -> None:
    before = outcome(train(tiny_model))
    again = train(tiny_model, resume=name)
    assert outcome(again) == before
    assert {"later-checkpoint-4", "later-checkpoint-6", "checkpoint-6"} <= names(again)


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(
    tiny_model: str, data: Path
) -> None:
    train(tiny_model)
    with pytest.raises(BunnyLoraError, match="Steps in run: 2, 4, 6"):
        train(tiny_model, resume=3)


def test_another_environment_is_told_recorded_and_not_refused(
    tiny_model: str,
    data: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(tiny_model, max_train_steps=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    trainer = train(tiny_model)
    assert "threads: 1 before, 8 now" in capsys.readouterr().out
    state = checkpoint.files.read_json(trainer.run_dir / "checkpoint-6" / checkpoint.STATE)
    assert [part["after_step"] for part in state["history"]] == [0, 2]
    assert [part["environment"]["threads"] for part in state["history"]] == ["1", "8"]


@pytest.mark.parametrize("name", [checkpoint.OPTIMIZER, checkpoint.STATE])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(
    tiny_model: str, data: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    before = outcome(trainer := train(tiny_model))
    path = trainer.run_dir / "checkpoint-6" / name
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert outcome(train(tiny_model)) == before
    out = capsys.readouterr().out
    assert "checkpoint-6 is damaged" in out and "Going on after step 4" in out
    assert "damaged-checkpoint-6" in names(trainer)


def test_a_final_folder_that_is_not_the_last_checkpoints_is_written_again(
    tiny_model: str, data: Path
) -> None:
    before = outcome(trainer := train(tiny_model))
    (trainer.run_dir / "final" / "unet" / "adapter_model.safetensors").write_bytes(b"half")
    assert outcome(train(tiny_model)) == before


def test_only_the_last_checkpoints_and_marked_ones_stay(tiny_model: str, data: Path) -> None:
    trainer = make(tiny_model, save_steps=1, keep_checkpoints=2)
    at_step(trainer, 3, lambda: (trainer.run_dir / "checkpoint-2" / "keep").touch())
    trainer.train()
    assert names(trainer) == {"checkpoint-2", "checkpoint-5", "checkpoint-6"}


def test_what_a_kill_after_the_last_save_left_behind_is_cleared_by_the_next_start(
    tiny_model: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tiny_model)
    remove_old = checkpoint.remove_old
    monkeypatch.setattr(checkpoint, "remove_old", lambda *_, **__: None)
    at_step(trainer, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(interrupts.StoppedError):
        trainer.train()
    train(tiny_model)
    assert "checkpoint-5" in names(trainer)
    monkeypatch.setattr(checkpoint, "remove_old", remove_old)
    train(tiny_model)
    assert names(trainer) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_a_checkpoint_that_the_evaluation_speaks_of_stays(tiny_model: str, data: Path) -> None:
    trainer = make(tiny_model, save_steps=1, keep_checkpoints=1)
    result = make_result(["rex"])
    result.models["checkpoint-3"] = result.models.pop("checkpoint-5")
    at_step(trainer, 4, lambda: eval_result.write(trainer.run_dir, result))
    trainer.train()
    assert names(trainer) == {"checkpoint-3", "checkpoint-6"}


def test_no_checkpoint_is_removed_while_the_evaluation_cannot_be_understood(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(tiny_model, save_steps=1, keep_checkpoints=1)
    result = make_result(["rex"])
    result.schema_version += 1
    at_step(trainer, 4, lambda: eval_result.write(trainer.run_dir, result))
    trainer.train()
    assert names(trainer) == {f"checkpoint-{step}" for step in (2, 3, 4, 5, 6)}
    assert "All checkpoints stay" in (said := capsys.readouterr().out) and "schema_version 3" in said


def test_other_base_weights_under_the_same_name_are_refused(
    tiny_model: str, data: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    train(str(model), max_train_steps=2)
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * value for name, value in load_file(path).items()}, path)
    with pytest.raises(BunnyLoraError, match="base"):
        train(str(model), max_train_steps=4)


# Numbers that are not finite


def spoil(trainer: LoRATrainer, steps: set[int]) -> None:
    load = trainer.load

    def load_and_spoil(start: Start) -> None:
        load(start)
        loss, state = trainer.setup.learner.loss, trainer.setup.state
        trainer.setup.learner.loss = lambda position: (
            loss(position) * (float("nan") if position // 2 + 1 in steps and state.step else 1)
        )

    trainer.load = load_and_spoil


def test_a_step_without_finite_numbers_is_skipped_and_counted_also_after_a_stop(
    tiny_model: str, data: Path
) -> None:
    whole = make(tiny_model, "whole")
    spoil(whole, {3})
    whole.train()
    log = report.read_log(whole.run_dir)
    assert [record["skipped"] for record in log] == [False, False, True, False, False, False]
    assert whole.setup.state.skipped == 1
    stopped = make(tiny_model)
    spoil(stopped, {3})
    at_step(stopped, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(interrupts.StoppedError):
        stopped.train()
    resumed = train(tiny_model)
    assert resumed.setup.state.skipped == 1 and outcome(resumed) == outcome(whole)


def test_too_many_in_a_row_stop_the_run_with_advice_and_good_weights(
    tiny_model: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "MAX_SKIPPED_IN_A_ROW", 2)
    trainer = make(tiny_model)
    spoil(trainer, {3, 4, 5})
    with pytest.raises(BunnyLoraError, match=r"2 steps in a row.*after step 2.*learning_rate"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.setup.trainable())
    assert report.loss_curve(trainer.run_dir)


# Disks


def count_disk_calls(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[str]:
    """Count what changes or flushes the disk; fail one call, as a disk that is full from then on."""
    calls: list[str] = []
    for name in ("fsync", "rename", "replace"):
        original = getattr(os, name)

        def wrapped(*args: object, name: str = name, original=original, **kwargs: object) -> object:
            calls.append(name)
            if len(calls) - 1 == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, wrapped)
    return calls


def test_a_failure_at_any_call_of_a_save_leaves_the_last_good_state(
    tiny_model: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = train(tiny_model, save_minutes=None)
    folder, good = trainer.run_dir / "checkpoint-6", trainer.run_dir / "checkpoint-4"
    saved = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    about = checkpoint.files.read_json(folder / checkpoint.STATE)

    def save() -> None:
        checkpoint.save_checkpoint(folder, trainer.setup.state, about)

    with monkeypatch.context() as patch:
        calls = count_disk_calls(patch)
        save()
    assert calls.count("fsync") > 6 and "rename" in calls
    for fail_at in range(len(calls)):
        with monkeypatch.context() as patch, pytest.raises(BunnyLoraError, match="No space left"):
            count_disk_calls(patch, fail_at)
            save()
        checkpoint.files.recover(trainer.run_dir)
        assert checkpoint.verify(folder) is None and checkpoint.verify(good) is None
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == saved
        assert not list(trainer.run_dir.rglob(".*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB, where mounting one is allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(
    tiny_model: str, data: Path, small_disk: Path
) -> None:
    whole = train(tiny_model, "whole", save_steps=1)
    ballast = small_disk / "ballast"
    run = str(small_disk / "run")
    trainer = make(tiny_model, run, save_steps=1)

    def fill() -> None:
        with pytest.raises(OSError), ballast.open("wb") as file:
            while True:
                file.write(b"0" * 4096)
                file.flush()

    at_step(trainer, 3, fill)
    with pytest.raises(BunnyLoraError, match="No space left"):
        trainer.train()
    ballast.unlink(missing_ok=True)
    good = checkpoint.list_checkpoints(Path(run))
    assert good and all(checkpoint.verify(folder) is None for folder in good.values())
    assert not list(Path(run).rglob("*.tmp"))
    assert outcome(train(tiny_model, run, save_steps=1, keep_checkpoints=1)) == outcome(whole)
