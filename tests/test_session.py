"""Which configuration runs, and what papermill may pass."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from bunny_lora import session
from bunny_lora.config import Config
from bunny_lora.errors import BunnyLoraError

SECTION = {"resolution": 256, "training": {"batch_size": 3, "max_train_steps": 7}}


@pytest.fixture
def config_file(project: Path) -> Path:
    path = project / "params" / "mine.yaml"
    path.write_text(yaml.safe_dump({"finetuning": SECTION}))
    return path


def kernel(monkeypatch: pytest.MonkeyPatch, *cells: str) -> None:
    """Pretend to be in a notebook in which these cells have run."""
    shell = SimpleNamespace(kernel=True, user_ns={"In": ["", *cells]})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_a_file_is_found_from_the_root_wherever_one_works(
    config_file: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project / "notebooks")
    assert session.open_config("params/mine.yaml").resolution == 256


def test_named_values_and_settings_win_over_the_file(config_file: Path) -> None:
    config = session.open_config(
        "params/mine.yaml", settings=["lora.rank=2", "resolution=64"], max_steps=5, seed=None
    )
    assert (config.training.max_train_steps, config.training.batch_size) == (5, 3)
    assert (config.lora.rank, config.resolution, config.training.seed) == (2, 64, 42)


def test_a_finetuning_parameter_stands_alone_or_over_a_named_file(
    config_file: Path,
) -> None:
    parameter = {"training": {"batch_size": 9}}
    alone = session.open_config(finetuning=parameter)
    over = session.open_config("params/mine.yaml", parameter)
    assert (alone.training.batch_size, alone.resolution) == (9, Config().resolution)
    assert (over.training.batch_size, over.training.max_train_steps, over.resolution) == (9, 7, 256)
    assert parameter == {"training": {"batch_size": 9}}


def test_the_choice_is_said_in_one_line(config_file: Path, capsys: pytest.CaptureFixture) -> None:
    session.open_config("params/mine.yaml")
    assert capsys.readouterr().out == "Configuration: params/mine.yaml (named by you)\n"


PARAMETERS = "config_path = None\nmax_steps = None  # steps"


def test_a_parameter_that_the_notebook_does_not_have_is_an_error(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel(monkeypatch, PARAMETERS, "# Parameters\nmax_stepz = 500\n")
    message = r"Unknown parameter: max_stepz\. This notebook takes: config_path, max_steps\."
    with pytest.raises(BunnyLoraError, match=message):
        session.open_config()


def test_known_parameters_and_later_variables_are_no_error(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel(monkeypatch, PARAMETERS, "# Parameters\nmax_steps = 500\n", "report = 1", "max_steps = 3")
    session.open_config("params/mine.yaml")
    kernel(monkeypatch, PARAMETERS, "anything = 1")
    session.open_config("params/mine.yaml")
