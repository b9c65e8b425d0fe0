"""Choosing checkpoint, LoRA scale and guidance: the rule alone, and a tiny run from end to end."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config
from test_figures import assert_readable, texts

from bunny_lora import cli, report
from bunny_lora.config import Config, load_config, validate
from bunny_lora.core import choice as choice_file
from bunny_lora.core.choice import CheckpointLoss
from bunny_lora.core.eval_result import Interval
from bunny_lora.core.seeding import generator
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation.by_hand import hand_on
from bunny_lora.evaluation.choose import shortlist
from bunny_lora.evaluation.choosing import Point, choose_point
from bunny_lora.model import adapters
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import checkpoint
from bunny_lora.training.handover import read_handover, write_handover

CLUSTERS = [prompt for prompt in range(12) for _ in range(4)]
OWN, FIRST, SECOND = (0.0, 9.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.0), (1.0, 2.0, 1.0, 0.0)


def point(
    identity: float, asked: float | None, drift: float | None, order: tuple, *, noise: float = 0.1
) -> Point:
    """Scores of 48 images around these means; the same prompts are as hard for everybody."""
    hard = torch.randn(12, generator=generator(0, "prompts")).repeat_interleave(4) * 0.2
    rng = generator(1, "images", int(100 * identity), int(order[1]))
    draws = [torch.randn(48, generator=rng) * noise for _ in range(3)]
    means = (identity, asked, drift)
    values = [None if m is None else m + hard + d for m, d in zip(means, draws, strict=True)]
    return Point(*values, order)


def chosen(*points: Point) -> tuple[int, list[int], dict]:
    found = choose_point(points, CLUSTERS, CLUSTERS)
    return found.chosen, found.tied, found.dropped


def test_what_is_asked_for_comes_first_then_identity_then_drift() -> None:
    own = point(0.5, 0.9, 0.5, OWN)
    assert chosen(own, point(0.9, 0.4, 0.1, FIRST))[0] == 0  # it draws over what was asked for
    assert chosen(own, point(0.9, 0.9, 0.9, FIRST)) == (
        1,
        [],
        {"asked": [], "identity": [0], "drift": []},
    )
    assert chosen(own, point(0.5, 0.9, 0.1, FIRST)) == (
        1,
        [],
        {"asked": [], "identity": [], "drift": [0]},
    )
    assert chosen(point(0.5, None, None, OWN), point(0.9, None, None, FIRST))[0] == 1


def test_a_tie_is_told_and_goes_to_the_runs_own_way_or_the_earliest() -> None:
    own, first, second = (point(0.5, 0.9, 0.5, order) for order in (OWN, FIRST, SECOND))
    assert chosen(second, own, first)[:2] == (1, [0, 2])
    behind = point(0.1, 0.9, 0.5, OWN)
    assert chosen(second, behind, first)[:2] == (2, [0])


def test_a_handful_of_images_changes_nothing() -> None:
    own, better = point(0.5, 0.9, 0.5, OWN), point(0.9, 0.9, 0.5, FIRST)
    few = [Point(p.identity[:2], p.asked[:2], p.drift[:2], p.order) for p in (own, better)]
    assert choose_point(few, CLUSTERS[:2], CLUSTERS[:2]).chosen == 0


def test_the_choice_is_within_the_interval_of_the_best_in_hindsight() -> None:
    """Nine of ten runs: what it loses to the best by truth is less than what the judge can tell."""
    good = 0
    for run in range(50):
        truth = torch.rand(6, generator=generator(run, "truth")) * 0.6
        points = [
            point(float(value), 0.9, 0.3, (1.0, float(place + 10 * run), 1.0, 0.0), noise=0.3)
            for place, value in enumerate(truth)
        ]
        lost = float(truth.max() - truth[choose_point(points, CLUSTERS, CLUSTERS).chosen])
        good += lost <= 2 * 0.3 * (2 / 48) ** 0.5 * 1.5
    assert good >= 45


def losses(*means: float) -> list[CheckpointLoss]:
    names = [f"checkpoint-{place}" for place in range(len(means) - 1)] + ["final"]
    return [
        CheckpointLoss(
            model=name,
            step=place,
            loss=(span := Interval(mean=mean, low=None, high=None, n=2)),
            above_lowest=span,
            characters={},
        )
        for place, (name, mean) in enumerate(zip(names, means, strict=True))
    ]


def test_the_shortlist_is_of_the_lowest_held_out_loss_and_always_has_the_last() -> None:
    table = losses(0.5, 0.2, 0.1, 0.3, 0.4)
    assert shortlist(table, Config(), held_out=True) == ["checkpoint-2", "checkpoint-1", "final"]
    spaced = shortlist(table, Config(), held_out=False)
    assert len(spaced) == 3 and spaced[-1] == "final" and spaced != ["checkpoint-2", "checkpoint-1"]
    named = validate({"evaluation": {"choose": {"checkpoints": [3, 0]}}})
    assert shortlist(table, named, held_out=True) == ["checkpoint-3", "checkpoint-0"]
    with pytest.raises(BunnyLoraError, match="names step 7, of which there is no checkpoint"):
        shortlist(table, validate({"evaluation": {"choose": {"checkpoints": [7]}}}), held_out=True)


def test_an_empty_section_in_a_section_is_its_defaults() -> None:
    assert validate({"evaluation": {"choose": None}}).evaluation == Config().evaluation


@pytest.fixture
def run_dir(project: Path, tiny_model: str) -> Path:
    draw_frames(project / "data" / "instance_images", 5)
    config = tiny_config(
        tiny_model,
        character_names=["ellie"],
        held_out=0.25,
        training={"max_train_steps": 3, "save_steps": 1, "learning_rate": 0.05},
        evaluation={
            "prompts": ["{name}, waving"],
            "num_images_per_prompt": 2,
            "choose": {"scales": [0.5], "guidances": [1.0], "n_shortlist": 2},
        },
    )
    return LoRATrainer(config=config).train().parent


def test_a_run_is_chosen_for_and_drawn_as_was_chosen(
    run_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["choose", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    found = report.read_choice(run_dir)
    assert [loss.model for loss in found.losses] == ["checkpoint-1", "checkpoint-2", "final"]
    assert found.held_out and found.n_frames == 2 and found.judged_by == "palette"
    assert len({loss.loss.mean for loss in found.losses}) == 3
    assert min(loss.above_lowest.mean for loss in found.losses) == 0
    assert found.candidates[0].label == "final, scale 1, guidance 7.5" and len(found.candidates) == 3
    assert f"* {found.best.label}" in printed and "palette (colours only)" in printed
    assert all((run_dir / "evaluation" / name).is_file() for c in found.candidates for name in c.files)
    assert_readable(report.choice_chart(found))
    assert_readable(report.choice_grid(run_dir, found))
    assert "Nothing was chosen" in texts(report.choice_chart(None))[0]

    # A choice by hand is written over by the rule, which is said.
    by_hand = hand_on(run_dir, "checkpoint-1", 0.3)
    assert by_hand.best.label == "checkpoint-1, scale 0.3, guidance 7.5" and by_hand.by_hand
    assert by_hand.losses == found.losses and len(by_hand.candidates) == 4
    assert cli.main(["choose", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert f"{by_hand.best.label} was handed on by hand, and gives way to" in said
    assert report.read_choice(run_dir) == found

    # What was chosen is handed on, whatever it is.
    first = next(p for p, c in enumerate(found.candidates) if c.model != "final")
    other = found.candidates[first]
    weights = str(adapters.adapter_digest(run_dir / other.model))
    changes = {"chosen": first, "weights_sha256": weights, "why": "so"}
    choice_file.write(run_dir, found.model_copy(update=changes))
    config = load_config(run_dir / "config.yaml")
    write_handover(run_dir, config)
    handed = read_handover(run_dir)
    assert (handed.weights, handed.step, handed.why) == (other.model, other.step, "so")
    assert handed.recommended.lora_scale == other.lora_scale
    capsys.readouterr()
    arguments = ["generate", "--lora-weights", str(run_dir), "--prompt", "ellie", "--out", "out.png"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert f"{other.model} of run, as `choose` found: so" in said
    assert f"LoRA scale {other.lora_scale}" in said and "guidance 1.0" in said
    checkpoint.remove_old(run_dir, keep=1, finished=True)
    assert other.model in {path.name for path in checkpoint.list_checkpoints(run_dir).values()}
    shutil.copytree(run_dir / other.model / "unet", run_dir / "final" / "unet", dirs_exist_ok=True)
    write_handover(run_dir, config)
    assert "chosen among other weights than there are now" in capsys.readouterr().out
    assert read_handover(run_dir).weights == "final"
