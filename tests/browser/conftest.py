"""Chromium and JupyterLab, once for all browser tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import CHECKOUT

api = pytest.importorskip("playwright.sync_api", reason="no playwright: make browser installs it")

from browser.lab import Notebook, serve  # noqa: E402

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
SCREENSHOTS = CHECKOUT / "outputs" / "browser"


@pytest.fixture(scope="session")
def chromium() -> Iterator[api.Browser]:
    """The browser of this machine, without a window."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed; CHROMIUM=path names another one")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of its own: the notebooks and configurations, and what they write."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("notebooks", "params"):
        shutil.copytree(CHECKOUT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def lab(root: Path) -> Iterator[str]:
    """The address of a JupyterLab in that project, with a place for the notebook's path."""
    with serve(root) as url:
        yield url


@pytest.fixture
def opened(chromium: api.Browser, lab: str) -> Iterator[Callable[[str], Notebook]]:
    """Opens a notebook by its path, or any page by its address, as long as the test runs."""
    contexts = []

    def opened(path: str, width: int = 1280, **options: str) -> Notebook:
        size = {"width": width, "height": 1000}
        contexts.append(chromium.new_context(viewport=size, **options))
        notebook = Notebook(contexts[-1].new_page(), SCREENSHOTS)
        if path.endswith(".ipynb"):
            notebook.open(lab.format(path))
        else:
            notebook.page.on("request", notebook.refuse_the_network)
            notebook.go(path)
        return notebook

    yield opened
    for context in contexts:
        context.close()
