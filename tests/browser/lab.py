"""A JupyterLab of its own on loopback, and notebooks in it as a user sees them in a browser."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import CHECKOUT
from playwright.sync_api import ConsoleMessage, Locator, Page, Request

START_SEC = 300
CELLS_MS = 600_000  # of all cells of a notebook, on a machine with much else to do
SETTINGS = {  # No question to answer before the notebook can be seen, and no look at the network.
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
# The notebook in front, of which JupyterLab keeps the truth: the page shows only what is scrolled to.
CELLS = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const kernel = panel?.sessionContext?.session?.kernel;
    const code = panel.content.widgets.filter(cell => cell.model.type === 'code');
    return {
        kernel: kernel?.status ?? 'none',
        cells: code.map(cell => ({
            count: cell.model.executionCount,
            state: cell.model.executionState ?? 'idle',
            outputs: cell.model.outputs.toJSON(),
        })),
    };
}"""
DONE = f"""() => {{
    const {{kernel, cells}} = ({CELLS})();
    return kernel === 'idle' && cells.every(cell => cell.count && cell.state === 'idle');
}}"""

FAILED = f"""() => ({CELLS})().cells.some(
    cell => cell.outputs.some(output => output.output_type === 'error')
)"""

# What has been scrolled to is drawn in the frame after the next.
PAINTED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def wait_for(condition: Callable[[], Any], what: str, seconds: float = CELLS_MS / 1000) -> Any:
    """Return what `condition` returns as soon as it is true.

    Raises:
        TimeoutError: it never was.
    """
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)
    return found


def environment(root: Path) -> dict[str, str]:
    """The environment of whatever runs in a project folder, with nothing of the user's Jupyter."""
    home = root / ".jupyter"
    return {
        **os.environ,
        "BUNNY_LORA_ROOT": str(root),
        "BUNNY_LORA_PARAMS": "params/smoke.yaml",
        "PYTHONPATH": str(CHECKOUT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
    }


@contextlib.contextmanager
def serve(root: Path) -> Iterator[str]:
    """Start JupyterLab in a project folder; yield its address with the token, and end it."""
    home = root / ".jupyter"
    for name, settings in SETTINGS.items():
        path = home / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    options = ["--no-browser", "--expose-app-in-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={root}"]
    with (root / "jupyter.log").open("w") as log:
        server = subprocess.Popen(command, env=environment(root), cwd=root, stdout=log, stderr=log)
    try:
        yield wait_for(lambda: address(home / "runtime", server), "JupyterLab", START_SEC)
    finally:
        server.terminate()
        server.wait(START_SEC)


def address(runtime: Path, server: subprocess.Popen) -> str:
    """Where the server answers, "" while it starts."""
    assert server.poll() is None, "JupyterLab has ended: see jupyter.log"
    for path in runtime.glob("jpserver-*.json"):
        with contextlib.suppress(ValueError):  # half written
            about = json.loads(path.read_text())
            return f"{about['url']}lab/tree/{{}}?token={about['token']}&reset"
    return ""


@dataclass
class Notebook:
    """A notebook open in JupyterLab."""

    page: Page
    screenshots: Path
    errors: list[str] = field(default_factory=list)

    def go(self, url: str) -> None:
        """Open a page, and keep what goes wrong in its console."""
        self.page.on("console", self._keep)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)

    def refuse_the_network(self, request: Request) -> None:
        """Count whatever a page wants from elsewhere as an error."""
        if not request.url.startswith(("file:", "data:")):
            self.errors.append(f"asks for {request.url}")

    def open(self, url: str) -> None:
        """Open a notebook, and wait for its kernel."""
        self.go(url)
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
            " === 'idle'",
            timeout=CELLS_MS,
        )

    def _keep(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")

    def menu(self, *names: str) -> None:
        """Choose an entry of a menu, as `menu("Run", "Run All Cells")`."""
        bar, *entries = names
        self.page.get_by_role("menuitem", name=bar, exact=True).click()
        for name in entries:
            self.page.get_by_role("menuitem", name=name, exact=True).click()

    def start(self) -> None:
        """Run all cells, and do not wait."""
        self.menu("Run", "Run All Cells")

    def run(self) -> None:
        """Run all cells to the last, or to the first that fails."""
        self.start()
        self.page.wait_for_function(f"({DONE})() || ({FAILED})()", timeout=CELLS_MS)

    def stop(self) -> None:
        """Press the stop button of the notebook's toolbar."""
        self.page.locator('.jp-NotebookPanel-toolbar [data-command="notebook:interrupt-kernel"]').or_(
            self.page.get_by_role("button", name="Interrupt the kernel")
        ).first.click()

    def cells(self) -> list[dict[str, Any]]:
        """The code cells: `count`, `state`, `outputs` as a notebook file keeps them."""
        return self.page.evaluate(CELLS)["cells"]

    def outputs(self) -> list[dict[str, Any]]:
        """All outputs from the first cell to the last."""
        return [output for cell in self.cells() for output in cell["outputs"]]

    def text(self) -> str:
        """What the cells have printed, errors included."""
        parts = []
        for output in self.outputs():
            text = output.get("text") or output.get("traceback") or ""
            parts.append(text if isinstance(text, str) else "\n".join(text))
        return "\n".join(parts)

    def screenshot(self, name: str, *, whole: bool = False) -> None:
        """Keep what the page looks like, for people."""
        self.screenshots.mkdir(parents=True, exist_ok=True)
        self.page.evaluate(PAINTED)
        self.page.screenshot(path=self.screenshots / f"{name}.png", full_page=whole)

    def show(self, found: Locator) -> Locator:
        """Scroll to something on the page, and see it."""
        found.first.scroll_into_view_if_needed(timeout=CELLS_MS)
        return found.first
