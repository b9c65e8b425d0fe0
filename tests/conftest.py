"""What all tests share: a project of their own in a temporary folder, and no network."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from bunny_lora.config import Config, merge, validate

CHECKOUT = Path(__file__).resolve().parents[1]

os.environ["HF_HUB_OFFLINE"] = "1"  # Before any test imports huggingface_hub, which reads it once.
# A shell ignores Ctrl-C for what it runs in the background, nohup a lost terminal; both are inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # Toy models only lose by waiting for a second thread.


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
    from bunny_lora.model import random_models

    folder = tmp_path_factory.mktemp("models") / "tiny"
    random_models.build_pipeline(random_models.TINY).save_pretrained(folder)
    return str(folder)


def open_image(path: Path) -> Image.Image:
    """Return a whole picture whose file is closed again."""
    with Image.open(path) as image:
        return image.copy()


def draw_frames(folder: Path, n_images: int, seed: int = 0) -> Path:
    """Write small coloured frames, 96 x 54, with captions; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(n_images):
        colour = tuple((40 * i + 90 * channel + 31 * seed) % 256 for channel in range(3))
        image = Image.new("RGB", (96, 54), colour)
        image.paste((255 - colour[0], 30 * i % 256, 20), (10 + 8 * i, 10, 30 + 8 * i, 44))
        image.save(folder / f"frame_{i:06d}.png")
        lines.append({"file_name": f"frame_{i:06d}.png", "text": f"ellie, cartoon bunny number {i}"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text)
    return folder


def tiny_config(base_model: str, **overrides: object) -> Config:
    """A configuration that trains in about a second on the data of `draw_frames`."""
    tiny = {
        "base_model": base_model,
        "output_dir": "run",
        "data_dir": "data/instance_images",
        "resolution": 32,
        "lora": {"rank": 2, "alpha": 2},
        "training": {
            "learning_rate": 1e-3,
            "max_train_steps": 4,
            "gradient_accumulation_steps": 2,
            "mixed_precision": "no",
        },
        "sampling": {"num_inference_steps": 2},
        "evaluation": {"num_drift_images": 1, "other_prompts": "a dog"},
    }
    return validate(merge(tiny, overrides))
