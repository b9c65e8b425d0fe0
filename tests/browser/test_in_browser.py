"""Every notebook in JupyterLab and Chromium, as somebody opens it, runs it, stops it and looks around.

The tests follow the notebooks: each needs what those before it have left.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from conftest import CHECKOUT

from browser.lab import CELLS_MS, Notebook, environment, wait_for

Open = Callable[..., Notebook]
SMOKE_RUN = Path("outputs") / "smoke" / "lora_weights"
NAMES = [path.stem for path in sorted((CHECKOUT / "notebooks").glob("*.ipynb"))]


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


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_its_first_cell_to_its_last(opened: Open, name: str) -> None:
    notebook = opened(f"notebooks/{name}.ipynb")
    notebook.run()
    assert not red_boxes(notebook)
    folded = notebook.page.get_by_text("Every key, and what it means")
    key = notebook.page.get_by_text("gradient_accumulation_steps:").last
    notebook.show(folded)
    assert not key.is_visible()
    folded.first.click()
    key.wait_for(state="visible", timeout=CELLS_MS)
    folded.first.click()
    key.wait_for(state="hidden", timeout=CELLS_MS)
    pictures = notebook.page.locator(".jp-OutputArea-output img")
    notebook.show(pictures.last)
    notebook.screenshot(name)
    assert pictures.count() >= 1
    assert not notebook.errors


def n_steps(run: Path) -> int:
    """How many steps a run has logged."""
    log = run / "log.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def assert_saved(run: Path) -> None:
    """The last step of a run that was stopped is a whole checkpoint."""
    assert (run / f"checkpoint-{n_steps(run)}" / "SHA256SUMS").is_file()


@pytest.mark.parametrize("button", ["the toolbar's", "stop after this step"])
def test_a_stop_button_leaves_a_checkpoint_and_one_message(
    opened: Open, root: Path, button: str
) -> None:
    name = f"02_stopped_{len(button)}"
    run = root / "outputs" / "smoke" / name
    path = with_parameters(
        root / "notebooks" / "02_train.ipynb", name, max_steps=5000, output_dir=str(run)
    )
    notebook = opened(path)
    notebook.start()
    wait_for(lambda: n_steps(run) >= 3, "three steps")
    if button == "the toolbar's":
        notebook.stop()
    else:
        notebook.show(notebook.page.get_by_alt_text(re.compile(r"working.*step\s+[1-9]")))
        notebook.screenshot("02_live")
        notebook.page.get_by_role("button", name=button).click()
    wait_for(lambda: red_boxes(notebook), "what the cell has to say")
    (message,) = red_boxes(notebook)
    assert message.count("Stopped by") == 1 and "Traceback" not in message
    assert_saved(run)
    notebook.show(notebook.page.get_by_text("StoppedError").last)
    notebook.screenshot("02_stopped")
    assert not notebook.errors


def test_a_run_of_papermill_is_watched_and_stopped_from_04(opened: Open, root: Path) -> None:
    run = root / "outputs" / "smoke" / "elsewhere"
    options = ["-p", "max_steps", "5000", "-p", "output_dir", str(run), "-k", "python3"]
    command = [sys.executable, "-m", "papermill", "notebooks/02_train.ipynb", "out.ipynb", *options]
    with (root / "papermill.log").open("w") as log:
        job = subprocess.Popen(command, cwd=root, env=environment(root), stdout=log, stderr=log)
    try:
        wait_for(lambda: n_steps(run) >= 3, "three steps of papermill's run")
        path = with_parameters(root / "notebooks" / "04_watch.ipynb", "04_elsewhere", runs=str(run))
        notebook = opened(path)
        notebook.run()
        assert not red_boxes(notebook)
        figure = notebook.page.get_by_alt_text(re.compile("elsewhere"))
        notebook.show(figure)
        seen = figure.get_attribute("alt")
        wait_for(lambda: figure.get_attribute("alt") != seen, "the figure of a later step")
        notebook.screenshot("04_watch")
        notebook.page.get_by_role("button", name="stop after this step").click()
        job.wait(CELLS_MS / 1000)
    finally:
        job.kill()
    assert_saved(run)
    notebook.page.get_by_alt_text(re.compile("stopped")).wait_for(timeout=CELLS_MS)
    notebook.screenshot("04_stopped")
    assert not notebook.errors


def test_the_explorer_wipes_draws_and_hands_on(opened: Open, root: Path) -> None:
    notebook = opened("notebooks/03_evaluate.ipynb")
    notebook.run()
    page = notebook.page
    picture = page.get_by_alt_text(re.compile("^Left the base model"))
    notebook.show(picture)

    def another_than(before: str | None) -> str | None:
        now = picture.get_attribute("src") if picture.count() else None
        return now if now != before else None

    half = picture.get_attribute("src")
    page.locator(".widget-hslider", has_text="base | LoRA").locator(".noUi-handle").press("End")
    base = wait_for(lambda: another_than(half), "the base model's picture alone")
    notebook.screenshot("03_explorer")

    page.get_by_placeholder("a prompt of your own").fill("ellie, jumping, in the desert")
    page.keyboard.press("Enter")
    page.get_by_text("Not drawn yet: base model and LoRA.").wait_for(timeout=CELLS_MS)
    page.get_by_role("button", name="Draw what is missing").click()
    wait_for(lambda: another_than(base), "a picture of the prompt that was typed")
    page.get_by_role("button", name="Hand on this checkpoint").click()
    page.get_by_text("is handed on").wait_for(timeout=CELLS_MS)

    page.locator("button[title*='was asked for']:enabled").first.click()
    notebook.show(page.locator("figure img"))
    notebook.screenshot("03_confusion")
    assert not notebook.errors


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 400)])
def test_the_report_reads_well_alone(opened: Open, root: Path, scheme: str, width: int) -> None:
    report = root / SMOKE_RUN / "report.html"
    assert report.stat().st_size < 5e6
    shown = opened(report.as_uri(), color_scheme=scheme, width=width)
    images = shown.page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert images and all(images)
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert shown.page.evaluate(overflow) <= 0
    channels = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", channels)[0]) < 100) == (scheme == "dark")
    shown.screenshot(f"report_{scheme}_{width}", whole=True)
    assert not shown.errors
