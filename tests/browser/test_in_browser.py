"""Every notebook in JupyterLab and Chromium, as somebody opens it, runs it and stops it."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from browser.lab import CELLS_MS, Notebook, wait_for

Open = Callable[[str], Notebook]


def red_boxes(notebook: Notebook) -> list[str]:
    """What a reader sees as an error: exceptions, and anything on stderr."""
    return [
        str(output.get("text") or output.get("traceback"))
        for output in notebook.outputs()
        if output["output_type"] == "error" or output.get("name") == "stderr"
    ]


def with_parameters(path: Path, name: str, **parameters: object) -> str:
    """Copy a notebook with other values in its cell of parameters, as a user types them there."""
    notebook = nbformat.read(path, 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    nbformat.write(notebook, path.with_name(f"{name}.ipynb"))
    return f"{path.parent.name}/{name}.ipynb"


@pytest.mark.parametrize("name", ["01_prepare", "02_train", "03_evaluate"])
def test_a_notebook_runs_from_its_first_cell_to_its_last(opened: Open, name: str) -> None:
    notebook = opened(f"notebooks/{name}.ipynb")
    notebook.run()
    assert not red_boxes(notebook)
    assert sum("image/png" in output.get("data", {}) for output in notebook.outputs()) >= 2
    folded = notebook.page.get_by_text("Every key, and what it means")
    key = notebook.page.get_by_text("gradient_accumulation_steps:").last
    notebook.show(folded)
    assert not key.is_visible()
    folded.first.click()
    key.wait_for(state="visible", timeout=CELLS_MS)
    notebook.picture(name)
    assert not notebook.errors


def test_the_stop_button_leaves_a_checkpoint_and_one_message(opened: Open, root: Path) -> None:
    run = root / "outputs" / "smoke" / "stopped"
    path = with_parameters(
        root / "notebooks" / "02_train.ipynb", "02_stopped", max_steps=5000, output_dir=str(run)
    )
    notebook = opened(path)
    notebook.start()
    log = run / "log.jsonl"
    wait_for(
        lambda: log.is_file() and len(log.read_text().splitlines()) >= 3, "three steps of training"
    )
    notebook.stop()
    wait_for(lambda: red_boxes(notebook), "what the cell has to say")
    (message,) = red_boxes(notebook)
    assert "Stopped by Ctrl-C or the stop button" in message and "Traceback" not in message
    n_steps = len(log.read_text().splitlines())
    assert (run / f"checkpoint-{n_steps}" / "SHA256SUMS").is_file()
    notebook.show(notebook.page.get_by_text("StoppedError").last)
    notebook.picture("02_stopped")
    assert not notebook.errors
