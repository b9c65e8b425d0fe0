"""What a checkpoint keeps of an optimiser: whatever it has, and nothing is a pickle."""

from pathlib import Path

import pytest
import torch

from bunny_lora.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint


class Odd(torch.optim.SGD):
    """Keeps what bitsandbytes keeps: tensors of many types, numbers, and dicts in dicts."""

    def fill(self, scale: float) -> None:
        for parameter in self.param_groups[0]["params"]:
            inner = {"state1": torch.full((3,), 7, dtype=torch.uint8), "absmax": {"deep": scale}}
            moments = {"exp_avg": torch.full((2,), scale), "quantised": inner}
            self.state[parameter] |= moments | {"step": int(10 * scale), "norm": scale, "none": None}


def state_of(optimizer: torch.optim.Optimizer) -> TrainingState:
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return TrainingState({}, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False), step=3)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_any_optimisers_state_comes_back(tmp_path: Path, scale: float) -> None:
    before, after = (Odd([torch.nn.Parameter(torch.zeros(2))], lr=0.1) for _ in range(2))
    before.fill(scale)
    save_checkpoint(tmp_path / "checkpoint-3", state_of(before), {})
    load_checkpoint(tmp_path / "checkpoint-3", state_of(after))
    (saved,), (loaded,) = before.state.values(), after.state.values()
    assert loaded["step"] == saved["step"] and type(loaded["step"]) is int
    assert (loaded["norm"], loaded["none"]) == (scale, None)
    assert loaded["quantised"]["absmax"] == {"deep": scale}
    assert torch.equal(loaded["exp_avg"], saved["exp_avg"])
    assert loaded["quantised"]["state1"].tolist() == [7, 7, 7]
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".bin", ".pkl")]
