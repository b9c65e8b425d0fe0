"""A run, a checkpoint and an export that commit 942fb87 made still resume, draw and export.

`tests/data/old_run` is `train`, `export --format kohya` and `generate` of that commit on `random-tiny`;
its last checkpoint was taken away, so that two of four steps are left to do.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from bunny_lora.cli import main

OLD = Path(__file__).parent / "data" / "old_run"


@pytest.fixture
def old(project: Path) -> Path:
    shutil.copytree(OLD, project, dirs_exist_ok=True)
    return project


def adapters(run: Path) -> dict:
    return {
        f"{path.parent.name}.{key}": tensor
        for path in (run / "final").rglob("*.safetensors")
        for key, tensor in load_file(path).items()
    }


def difference(a: Path, b: Path) -> float:
    """Mean over all values, of 255."""
    with Image.open(a) as first, Image.open(b) as second:
        return float(np.abs(np.asarray(first, float) - np.asarray(second, float)).mean())


def test_its_run_goes_on_to_the_weights_that_it_had(old: Path, capsys: pytest.CaptureFixture) -> None:
    expected = adapters(old / "run")
    shutil.rmtree(old / "run" / "final")
    assert main(["train", "--config", "params.yaml"]) == 0
    assert "Going on after step 2" in capsys.readouterr().out
    assert_close(adapters(old / "run"), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weights", ["run/final", "kohya.safetensors"])
def test_its_weights_draw(old: Path, weights: str) -> None:
    arguments = ["--prompt", "ellie on a beach", "--seed", "3", "--out", "new.png"]
    arguments += ["--steps", "25", "--width", "64", "--height", "64"]
    own_model = ["--base-model", "random-tiny"] if weights.endswith(".safetensors") else []
    assert main(["generate", "--lora-weights", weights, *arguments, *own_model]) == 0
    assert difference(old / "new.png", old / "picture.png") < 0.5


def test_its_checkpoint_draws_as_its_run_recommends(old: Path) -> None:
    assert main(["generate", "--lora-weights", "run/checkpoint-2", "--prompt", "ellie"]) == 0
    with Image.open(old / "out.png") as image:
        assert image.size == (32, 32)


def test_its_run_exports_what_it_exported_then(old: Path) -> None:
    assert main(["export", "--lora-weights", "run", "--out", "new", "--format", "kohya"]) == 0
    assert_close(load_file(old / "new" / "run.safetensors"), load_file(old / "kohya.safetensors"))
