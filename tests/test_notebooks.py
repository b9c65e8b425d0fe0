"""The notebooks as a user runs them: from anywhere, with parameters, and compared for real."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import CHECKOUT, draw_frames, tiny_config


@pytest.fixture
def copy(project: Path, tiny_model: str) -> Path:
    """A project of its own with the notebooks, four frames, and a configuration of one step."""
    for path in (CHECKOUT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, project / "notebooks")
    draw_frames(project / "pictures", 4)
    config = tiny_config(tiny_model, source="pictures", training={"max_train_steps": 1})
    (project / "params" / "smoke.yaml").write_text(config.to_yaml())
    return project


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Run a Python module in `folder`, with this test's project root, on one thread."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    arguments = [sys.executable, "-m", *command]
    return subprocess.run(arguments, cwd=folder, env=environment, text=True, capture_output=True)


def papermill(notebook: str, folder: Path, *arguments: str) -> tuple[int, str]:
    """Run a notebook from `folder`; return papermill's status and all text of the outputs."""
    quiet = ["--no-progress-bar", "--log-level", "ERROR", "-k", "python3"]
    done = run(folder, "papermill", notebook, "out.ipynb", *quiet, *arguments)
    cells = nbformat.read(folder / "out.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return done.returncode, "\n".join(
        output.get("text", "") or "\n".join(output.get("traceback", [])) for output in outputs
    )


def test_prepare_and_train_run_from_inside_the_notebooks_folder(copy: Path) -> None:
    folder = copy / "notebooks"
    for name in ("01_prepare.ipynb", "02_train.ipynb"):
        status, text = papermill(name, folder, "-p", "config_path", "params/smoke.yaml")
        assert status == 0, text
    assert "loss" in text and (copy / "run" / "final" / "unet").is_dir()


def test_a_configuration_file_can_be_passed_as_parameters(copy: Path) -> None:
    status, text = papermill("notebooks/01_prepare.ipynb", copy, "-f", "params/smoke.yaml")
    assert status == 0, text
    assert "4 of 4 entries are usable" in text


def test_a_parameter_that_papermill_does_not_know_is_an_error_without_a_traceback(copy: Path) -> None:
    status, text = papermill("notebooks/02_train.ipynb", copy, "-p", "max_stepz", "500")
    assert status != 0
    assert "Unknown parameter: max_stepz. This notebook takes: config_path" in text
    assert "Traceback" not in text and 'File "' not in text


def nbval(path: Path) -> subprocess.CompletedProcess:
    options = ["--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider"]
    return run(path.parent, "pytest", *options, path.name)


def test_a_changed_figure_in_a_marked_cell_fails_nbval(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(CHECKOUT / "params" / "smoke.yaml", copy / "params")
    monkeypatch.setenv("BUNNY_LORA_PARAMS", "params/smoke.yaml")
    path = copy / "notebooks" / "01_prepare.ipynb"  # As it is, `make test` compares it.
    path.write_text(path.read_text().replace("65 of 72 entries", "66 of 72 entries"))
    failed = nbval(path)
    assert failed.returncode == 1 and "66 of 72" in failed.stdout
    assert "1 failed" in failed.stdout, "every other cell is as it was"


@pytest.mark.parametrize("path", sorted((CHECKOUT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_committed_outputs_are_those_of_the_marked_cells_and_no_others(path: Path) -> None:
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    marked = [cell for cell in code if "NBVAL_CHECK_OUTPUT" in "".join(cell["source"])]
    assert marked and all(cell["outputs"] for cell in marked)
    assert not any(cell["outputs"] for cell in code if cell not in marked)
    assert "widgets" not in notebook["metadata"]
