"""The optimiser and its schedule: every key does something, and what would do nothing is said."""

import math
from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config

from bunny_lora.config import load_config
from bunny_lora.errors import BunnyLoraError
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import fingerprint, optim
from bunny_lora.training.fingerprint import Fingerprint

N_STEPS = 12


def rates(**training: object) -> list[float]:
    """The learning rate of each step, for a highest rate of 1."""
    settings = {"learning_rate": 1.0, "max_train_steps": N_STEPS} | training
    config = load_config(None, {"training": settings})
    optimizer, lr_scheduler = optim.build(config, {"x": torch.nn.Parameter(torch.zeros(1))})
    found = []
    for _ in range(N_STEPS):
        found.append(lr_scheduler.get_last_lr()[0])
        optimizer.step()
        lr_scheduler.step()
    return found


def test_schedules_are_their_formulas() -> None:
    share = [step / N_STEPS for step in range(N_STEPS)]
    assert rates() == [1.0] * N_STEPS
    assert rates(lr_scheduler="linear") == pytest.approx([1 - x for x in share])
    cosine = [(1 + math.cos(math.pi * x)) / 2 for x in share]
    assert rates(lr_scheduler="cosine") == pytest.approx(cosine)
    restarts = rates(lr_scheduler="cosine_with_restarts", lr_num_cycles=3)
    assert restarts == pytest.approx([(1 + math.cos(math.pi * (3 * x % 1))) / 2 for x in share])
    power = rates(lr_scheduler="polynomial", lr_power=2.0)
    assert power == pytest.approx([(1 - x) ** 2 for x in share], abs=1e-6)
    warm = rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=4)
    assert warm == pytest.approx([min(1, step / 4) for step in range(N_STEPS)])


def test_the_text_encoder_has_a_rate_of_its_own_on_the_same_schedule(
    tiny_model: str, project: Path
) -> None:
    """Adam's first steps move each weight by about the learning rate."""
    draw_frames(project / "data" / "instance_images", 3)
    training = {"lr_scheduler": "linear", "max_train_steps": 2, "save_steps": 1}
    for own, wanted in ((None, 1e-3), (1e-5, 1e-5), (1e-2, 1e-2)):
        trainer = LoRATrainer(
            config=tiny_config(
                tiny_model,
                output_dir=f"run-{own}",
                lora={"train_text_encoder": True},
                training=training | {"text_encoder_learning_rate": own},
            )
        )
        for _ in trainer.steps():
            break
        moved = {
            part: max(p.abs().max().item() for name, p in model.named_parameters() if "lora_B" in name)
            for part, model in trainer.setup.state.models.items()
        }
        assert moved["unet"] == pytest.approx(1e-3, rel=0.1)
        assert moved["text_encoder"] == pytest.approx(wanted, rel=0.1)
        rates = trainer.setup.state.lr_scheduler.get_last_lr()
        assert rates == pytest.approx([0.5e-3] if own is None else [0.5e-3, own / 2])


def test_b_learns_so_many_times_as_fast_as_a(tiny_model: str, project: Path) -> None:
    draw_frames(project / "data" / "instance_images", 3)
    training = {"max_train_steps": 2, "lora_plus_ratio": 4.0, "text_encoder_learning_rate": 1e-5}
    config = tiny_config(tiny_model, lora={"train_text_encoder": True}, training=training)
    trainer = LoRATrainer(config=config)
    for _ in trainer.steps():
        break
    for part, rate in (("unet", 4e-3), ("text_encoder", 4e-5)):
        named = trainer.setup.state.models[part].named_parameters()
        moved = max(p.abs().max().item() for name, p in named if "lora_B" in name)
        assert moved == pytest.approx(rate, rel=0.1)
    rates = [group["lr"] for group in trainer.setup.state.optimizer.param_groups]
    assert sorted(rates) == pytest.approx([1e-5, 4e-5, 1e-3, 4e-3])


def test_weight_decay_shrinks_what_no_gradient_holds_up() -> None:
    for decay in (0.0, 0.5):
        parameter = torch.nn.Parameter(torch.ones(1))
        parameter.grad = torch.zeros(1)
        settings = {"learning_rate": 0.1, "weight_decay": decay}
        optimizer, _ = optim.build(load_config(None, {"training": settings}), {"x": parameter})
        optimizer.step()
        assert parameter.item() == pytest.approx(1 - 0.1 * decay)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (
            {"lr_warmup_steps": 5},
            "lr_warmup_steps: 5 does nothing with .*constant_with_warmup",
        ),
        ({"lr_scheduler": "cosine", "lr_num_cycles": 3}, "lr_num_cycles: 3 .*cosine_with_restarts"),
        ({"lr_scheduler": "linear", "lr_power": 2.0}, r"lr_power: 2\.0 .*polynomial"),
        ({"lr_scheduler": "cosine_with_restarts"}, "is cosine: set training.lr_num_cycles"),
        ({"text_encoder_learning_rate": 1e-5}, "text_encoder_learning_rate does nothing with lora"),
        ({"lr_scheduler": "polynomial"}, "is linear: set another training.lr_power"),
    ],
)
def test_a_setting_that_does_nothing_stops_a_new_run(
    tiny_model: str, project: Path, training: dict, said: str
) -> None:
    draw_frames(project / "data" / "instance_images", 3)
    with pytest.raises(BunnyLoraError, match=said):
        LoRATrainer(config=tiny_config(tiny_model, training=training)).train()


def test_a_run_that_was_begun_with_such_a_setting_goes_on_and_says_so(
    tiny_model: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    draw_frames(project / "data" / "instance_images", 3)
    training = {"lr_warmup_steps": 5, "max_train_steps": 1}
    with monkeypatch.context() as as_it_was:
        as_it_was.setattr(optim, "doubts", lambda _: [])
        LoRATrainer(config=tiny_config(tiny_model, training=training)).train()
    LoRATrainer(config=tiny_config(tiny_model, training=training | {"max_train_steps": 2})).train()
    assert "Warning: training.lr_warmup_steps: 5 does nothing" in capsys.readouterr().out
    without = {"max_train_steps": 3}
    LoRATrainer(config=tiny_config(tiny_model, training=without)).train()


def test_a_key_that_the_schedule_does_not_use_makes_no_other_run() -> None:
    def identity(**training: object) -> Fingerprint:
        return Fingerprint.of(load_config(None, {"training": training}), "data")

    differences = fingerprint.mathematical_differences
    assert not differences(identity(lr_warmup_steps=5), identity())
    cosine = {"lr_scheduler": "cosine"}
    assert differences(identity(lr_warmup_steps=5, **cosine), identity(**cosine))
    assert differences(identity(weight_decay=0.1), identity())


def test_the_schedule_is_said_in_a_line() -> None:
    def said(**training: object) -> str:
        return optim.describe_schedule(load_config(None, {"training": training}).training)

    assert said() == "0.0001, constant"
    assert (
        said(lr_scheduler="linear", lr_warmup_steps=9) == "0.0001, linear, rising in the first 9 steps"
    )
    assert said(text_encoder_learning_rate=1e-5) == "0.0001 (text encoder 1e-05), constant"
    assert said(lr_scheduler="polynomial", lr_power=2.5) == "0.0001, polynomial, power 2.5"
