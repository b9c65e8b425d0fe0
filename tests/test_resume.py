"""Checkpoints and going on: the unbroken run is the oracle."""

from pathlib import Path

import pytest
from conftest import draw_frames, tiny_config

from bunny_lora.core.files import read_json, write_json, write_text
from bunny_lora.errors import BunnyLoraError
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import checkpoint
from bunny_lora.training.resume import Start

LORA = {"dropout": 0.1, "train_text_encoder": True}
STEPS = {"save_steps": 3, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "max_train_steps": 6}
STEPS |= {"validation_prompt": "ellie", "num_validation_images": 1}


@pytest.fixture
def data(project: Path) -> Path:
    return draw_frames(project / "data" / "instance_images", 5)


class PowerCutError(Exception):
    pass


def run(tiny_model: str, output_dir: str, cut_at: int | None = None, **training: object) -> LoRATrainer:
    config = tiny_config(tiny_model, output_dir=output_dir, lora=LORA, training=STEPS | training)
    trainer = LoRATrainer(config=config)
    trainer.prepare_data()
    if cut_at is not None:
        original_load = trainer.load

        def load(start: Start) -> None:
            original_load(start)
            calls = iter(range(10_000))

            def pull_the_plug(*_: object) -> None:
                if next(calls) == cut_at:
                    raise PowerCutError

            trainer.setup.state.optimizer.register_step_pre_hook(pull_the_plug)

        trainer.load = load
    trainer.train()
    return trainer


def files(trainer: LoRATrainer) -> dict[str, bytes]:
    """What must not depend on whether the run was cut off: weights, samples, log."""
    run = trainer.run_dir
    found = [*(run / "final").rglob("*.*"), *(run / "samples").rglob("*.png"), run / "log.jsonl"]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("cut_at", [1, 4, 5])
def test_a_run_that_was_cut_off_ends_with_the_bytes_of_one_that_was_not(
    tiny_model: str, data: Path, cut_at: int, capsys: pytest.CaptureFixture
) -> None:
    whole = run(tiny_model, "whole")
    with pytest.raises(PowerCutError):
        run(tiny_model, "cut", cut_at=cut_at)
    resumed = run(tiny_model, "cut")
    assert files(resumed) == files(whole)
    assert ("Going on after step 3" in capsys.readouterr().out) == (cut_at >= 3)


def test_a_finished_run_is_left_alone(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    first = run(tiny_model, "run")
    times = {path: path.stat().st_mtime_ns for path in (first.run_dir / "final").rglob("*")}
    run(tiny_model, "run")
    assert "This run is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (first.run_dir / "final").rglob("*")} == times


def test_more_steps_go_on_where_the_run_ended(tiny_model: str, data: Path) -> None:
    constant = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    whole = run(tiny_model, "whole", **constant)
    run(tiny_model, "longer", max_train_steps=3, **constant)
    longer = run(tiny_model, "longer", max_train_steps=6, **constant)
    assert files(longer) == files(whole)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"learning_rate": 0.5}, r"training.learning_rate: 0.001 before, 0.5 now"),
        ({"seed": 7}, "training.seed"),
        ({"max_train_steps": 9}, "training.max_train_steps"),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(
    tiny_model: str, data: Path, change: dict, named: str
) -> None:
    run(tiny_model, "run")
    with pytest.raises(BunnyLoraError, match=named):
        run(tiny_model, "run", **change)


def test_what_changes_nothing_but_the_output_is_not_refused(tiny_model: str, data: Path) -> None:
    run(tiny_model, "run")
    run(tiny_model, "run", save_steps=2, logging_steps=5, num_validation_images=0)


def test_other_data_is_refused(tiny_model: str, data: Path) -> None:
    run(tiny_model, "run")
    draw_frames(data, 5, seed=1)
    with pytest.raises(BunnyLoraError, match="other images or captions"):
        run(tiny_model, "run")


def test_never_resuming_keeps_the_old_run_beside_the_new(tiny_model: str, data: Path) -> None:
    old = files(run(tiny_model, "run"))
    config = tiny_config(tiny_model, resume="never", training={"seed": 3})
    trainer = LoRATrainer(config=config)
    trainer.train()
    aside = trainer.run_dir.with_name("run.old-1")
    assert {name: (aside / name).read_bytes() for name in old} == old
    assert files(trainer) != old


def test_a_folder_of_another_program_is_not_overwritten(
    tiny_model: str, data: Path, project: Path
) -> None:
    (project / "run" / "checkpoint-100").mkdir(parents=True)
    with pytest.raises(BunnyLoraError, match="did not write"):
        run(tiny_model, "run")


def test_a_run_that_never_got_to_a_checkpoint_does_not_hold_up_the_next(
    tiny_model: str, data: Path
) -> None:
    with pytest.raises(BunnyLoraError, match="nobody/nothing"):
        run("nobody/nothing", "run")
    with pytest.raises(PowerCutError):
        run(tiny_model, "run", cut_at=1)
    run(tiny_model, "run", seed=7)


def test_a_half_written_checkpoint_is_never_seen(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / ".checkpoint-9.x.tmp" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / checkpoint.STATE).write_text("{}")
    assert list(checkpoint.list_checkpoints(tmp_path)) == [7]


def test_a_damaged_checkpoint_is_explained(tiny_model: str, data: Path) -> None:
    trainer = run(tiny_model, "run")
    path = trainer.run_dir / "checkpoint-6" / checkpoint.OPTIMIZER
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(BunnyLoraError, match="checkpoint-6 cannot be resumed from"):
        trainer.load(Start(6, trainer.run_dir / "checkpoint-6"))


def test_a_checkpoint_from_before_a_key_existed_is_gone_on_with(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(PowerCutError):
        run(tiny_model, "cut", cut_at=4)
    path = data.parents[1] / "cut" / "checkpoint-3" / checkpoint.STATE
    saved = read_json(path)
    for key in ("training.caption_tag_dropout", "balance_characters"):
        del saved["settings"][key]
    write_json(path, saved)
    sums = [line for line in checkpoint._sums(path.parent).splitlines() if checkpoint.SUMS not in line]
    write_text(path.parent / checkpoint.SUMS, "\n".join(sums) + "\n")
    run(tiny_model, "cut")
    assert "Going on after step 3" in capsys.readouterr().out


def test_steps_can_be_left_and_gone_on_with_to_the_same_bytes(tiny_model: str, project: Path) -> None:
    draw_frames(project / "data" / "instance_images", 3)
    whole = LoRATrainer(config=tiny_config(tiny_model, output_dir="whole", training=STEPS))
    assert [record.step for record in whole.steps()] == [1, 2, 3, 4, 5, 6]

    config = tiny_config(tiny_model, output_dir="run", training=STEPS)
    for record in LoRATrainer(config=config).steps():
        if record.step == 2:
            break
    assert (project / "run" / "checkpoint-2").is_dir()
    trainer = LoRATrainer(config=config)
    first, *later = trainer.steps()
    assert first.step == 3 and [record.step for record in later] == [4, 5, 6]
    for name in ("final/unet/adapter_model.safetensors", "log.jsonl", "samples/step-000006/00-0.png"):
        assert (project / "run" / name).read_bytes() == (project / "whole" / name).read_bytes()
    assert list(trainer.steps()) == []


def test_drawing_between_two_steps_changes_nothing_that_is_learned(
    tiny_model: str, project: Path
) -> None:
    draw_frames(project / "data" / "instance_images", 3)
    losses = []
    for draws in (False, True):
        lora = {"dropout": 0.5}
        config = tiny_config(tiny_model, output_dir=f"run-{draws}", training=STEPS, lora=lora)
        trainer, images = LoRATrainer(config=config), []
        losses.append([])
        for record in trainer.steps():
            losses[-1].append(record.loss)
            images += [trainer.draw("ellie").tobytes()] if draws else []
    assert losses[0] == losses[1] and len(set(images)) > 1
