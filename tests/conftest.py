"""What all tests share: a project of their own in a temporary folder, and no network."""

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

os.environ["HF_HUB_OFFLINE"] = "1"  # Before any test imports huggingface_hub, which reads it once.


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root that is also the working folder; nothing of the checkout is read or written."""
    root = tmp_path / "project"
    for name in ("params", "notebooks"):
        (root / name).mkdir(parents=True)
    monkeypatch.setenv("BUNNY_LORA_ROOT", str(root))
    monkeypatch.delenv("BUNNY_LORA_PARAMS", raising=False)
    monkeypatch.chdir(root)
    return root


@pytest.fixture(scope="session")
def film_run() -> Path:
    """A real stage-4 run, which is not part of the repository: beside the checkout, or named."""
    if named := os.environ.get("BUNNY_LORA_FILM_RUN"):
        return Path(named).resolve()
    for folder in CHECKOUT.parents:
        if (run := folder / "shared" / "data" / "big_buck_bunny_run").is_dir():
            return run
    pytest.skip("no film run; name one with BUNNY_LORA_FILM_RUN")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Stable Diffusion folder at toy size with random weights; nobody writes into it."""
    from bunny_lora import standins

    folder = tmp_path_factory.mktemp("models") / "tiny"
    standins.build_pipeline(standins.TINY).save_pretrained(folder)
    return str(folder)
