"""The way to a hub's model, on loopback: two commands in processes of their own, the rest in this."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT, draw_frames, tiny_config
from hub_server import COMMIT, Hub, serving
from huggingface_hub import close_session, constants
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from bunny_lora.cli import main
from bunny_lora.config import Config
from bunny_lora.core.values import split_revision
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import components, random_models
from bunny_lora.model import hub as hubs
from bunny_lora.training import fingerprint
from bunny_lora.training.fingerprint import Fingerprint, mathematical_differences

NOBODY = "http://127.0.0.1:9"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def published(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as such models lie on the hub: old names, pickles, a safety checker."""
    folder = tmp_path_factory.mktemp("published")
    random_models.build_pipeline(random_models.TINY).save_pretrained(folder)
    tokens = folder / "tokenizer" / "tokenizer.json"
    model = json.loads(tokens.read_text())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    tokens.unlink()
    weights = folder / "text_encoder" / "model.safetensors"
    older = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
    save_file(older, weights, {"format": "pt"})
    for name in ("unet", "vae", "text_encoder", "safety_checker"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"never loaded")
    (folder / "README.md").write_text("a model card")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["_class_name"] == (
        "PNDMScheduler"
    )
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    with serving(Hub(published)) as started:
        yield started


def bunny(hub: Hub, root: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Run a command in a process of its own against the hub, with a cache below the root.

    `-c` and a text run that as Python.
    """
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "0"}
    settings |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": "ignore"}
    module = () if arguments[0] == "-c" else ("-m", "bunny_lora")
    command = [sys.executable, *module, *arguments]
    env = os.environ | settings | env
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=env, check=False)


def test_only_what_is_loaded_is_fetched_with_a_bar_and_a_run_starts_from_it(
    hub: Hub, project: Path
) -> None:
    done = bunny(hub, project, "download", hub.name)
    assert done.returncode == 0, done.stderr
    assert f"Downloading {hub.name}, commit {COMMIT[:12]}: 11 of its " in done.stdout
    assert "100%" in done.stderr
    assert WEIGHTS in hub.fetched and "tokenizer/merges.txt" in hub.fetched
    assert not [path for path in hub.fetched if path.endswith(".bin") or "safety" in path]

    hub.asked.clear()
    draw_frames(project / "data" / "instance_images", 2)
    config = tiny_config(f"{hub.name}@main", training={"max_train_steps": 1})
    (project / "params" / "tiny.yaml").write_text(config.to_yaml())
    train = ("train", "--config", "params/tiny.yaml")
    trained = bunny(hub, project, *train, HF_ENDPOINT=NOBODY)
    assert trained.returncode == 0, trained.stderr
    assert not hub.asked
    assert json.loads((project / "run/provenance.json").read_text())["base_commit"] == COMMIT
    state = json.loads((project / "run/checkpoint-1/training_state.json").read_text())
    assert state["base_commit"] == COMMIT
    told = json.loads((project / "run/handover.json").read_text())
    assert (told["base_model"], told["base_revision"]) == (hub.name, COMMIT)
    adapter = json.loads((project / "run/final/unet/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (hub.name, "main")


@contextlib.contextmanager
def reached(root: Path, address: str, *, offline: bool = False) -> Iterator[None]:
    """Do in this process what HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE do in one that starts."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(constants, "ENDPOINT", address)
        urls = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", urls)
        patch.setattr(constants, "HF_HUB_CACHE", str(root / "hf" / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        # What has not filled one is asked for again.
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65536)
        close_session()
        try:
            yield
        finally:
            close_session()


def fetch(hub: Hub, root: Path, name: str, address: str = "", *, offline: bool = False) -> str:
    """Download a model; return the refusal, empty where there is none."""
    with (
        reached(root, address or hub.address, offline=offline),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            hubs.download(name)
        except BunnyLoraError as error:
            return str(error)
    return ""


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Hub, project: Path) -> None:
    hub.cut = WEIGHTS
    assert not fetch(hub, project, hub.name)
    half = (hub.folder / WEIGHTS).stat().st_size // 2
    assert hub.ranges == [f"{WEIGHTS} {half // 65536 * 65536}"]


def test_after_a_download_that_failed_only_what_is_missing_is_fetched(hub: Hub, project: Path) -> None:
    hub.cut, hub.cuts = WEIGHTS, 99
    refusal = fetch(hub, project, hub.name)
    assert "arrived whole are kept" in refusal
    assert f"`bunny-lora download {hub.name}` fetches the others" in refusal
    arrived = hub.fetched - {WEIGHTS}
    hub.cut = None
    hub.asked.clear()
    assert not fetch(hub, project, hub.name)
    assert WEIGHTS in hub.fetched and len(arrived) > 5 and not hub.fetched & arrived


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("nobody/nothing", {}, "knows no nobody/nothing"),
        ("somebody/tiny@v9", {}, "somebody/tiny has no revision v9"),
        ("somebody/tiny", {"address": NOBODY}, "not wholly in the hub's cache"),
        ("somebody/tiny", {"offline": True}, "is not in the hub's cache, and HF_HUB_OFFLINE"),
        ("not/a/name", {}, "neither a folder here nor a name that the hub could have"),
    ],
)
def test_a_model_that_cannot_be_had_is_explained(
    name: str, settings: dict, message: str, hub: Hub, project: Path
) -> None:
    assert message in fetch(hub, project, name, **settings)


def test_a_gated_model_says_where_its_terms_are(hub: Hub, project: Path) -> None:
    hub.gated = True
    terms = f"is gated: accept its terms at {hub.address}/{hub.name}"
    assert terms in fetch(hub, project, hub.name)


def test_a_model_of_pickles_alone_is_refused(published: Path, project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickles"
    shutil.copytree(published, folder)
    (folder / WEIGHTS).unlink()
    with serving(Hub(folder)) as hub:
        assert f"it has no {WEIGHTS}. Weights as pickles" in fetch(hub, project, hub.name)


def test_a_model_that_has_only_the_fp16_variant_is_fetched_and_read(
    published: Path, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "variant"
    shutil.copytree(published, folder)
    (folder / WEIGHTS).rename(folder / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    beside = folder / "vae/diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", beside)
    with serving(Hub(folder)) as hub:
        assert not fetch(hub, project, hub.name)
    assert [path for path in hub.fetched if "fp16" in path] == [
        "unet/diffusion_pytorch_model.fp16.safetensors"
    ]
    with reached(project, NOBODY):
        components.load_components(hub.name, torch.device("cpu"), torch.float32)
    assert "somebody/tiny holds variants of its weights" in capsys.readouterr().out


def test_of_a_model_of_another_kind_only_the_configuration_is_fetched(
    published: Path, project: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "inpainting"
    shutil.copytree(published, folder)
    told = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(told | {"in_channels": 9}))
    with serving(Hub(folder)) as hub:
        assert "somebody/tiny is an inpainting model" in fetch(hub, project, hub.name)
    assert hub.fetched and all(path.endswith(".json") for path in hub.fetched if "/" in path[1:])


def test_a_model_of_single_files_says_how_to_use_one(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "v1-5.safetensors").write_bytes(b"a checkpoint")
    with serving(Hub(folder)) as hub:
        refusal = fetch(hub, project, hub.name)
    assert "it has no text_encoder/model.safetensors" in refusal
    assert "`hf download somebody/tiny v1-5.safetensors`" in refusal


def test_a_name_may_carry_a_revision() -> None:
    assert split_revision("owner/name@v1") == ("owner/name", "v1")
    assert split_revision("owner/name@refs/pr/3") == ("owner/name", "refs/pr/3")
    for whole in ("owner/name", "/mnt/a@b/sd", "~/models/sd@2", "bunny-world"):
        assert split_revision(whole) == (whole, None)


def test_another_commit_of_the_base_model_is_another_run_and_older_runs_go_on() -> None:
    older, first, second = (Fingerprint({}, "", {}, commit) for commit in (None, "a", "b"))
    assert not mathematical_differences(older, first) + mathematical_differences(first, first)
    assert "base model's commit: a before, b now" in mathematical_differences(first, second)[0]
    pinned = fingerprint.settings_of(Config(base_model="owner/name@v1"))
    assert pinned == fingerprint.settings_of(Config(base_model="owner/name"))


def test_without_a_home_folder_nothing_is_fetched_into_a_folder_called_tilde(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    assert main(["download", "owner/name"]) == 2
    assert "no home folder" in (said := capsys.readouterr().err) and "HF_HOME" in said
    assert not list(project.glob("~*"))


def test_an_image_encoder_is_fetched_without_its_pickles_and_then_needs_no_hub(
    project: Path, tmp_path: Path
) -> None:
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    Dinov2Model(Dinov2Config(**tiny)).save_pretrained(tmp_path)
    BitImageProcessorPil(crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    load = (
        "import sys; from PIL import Image; from bunny_lora import errors\n"
        "from bunny_lora.evaluation.features import load_feature_extractor as load\n"
        "try: print(load('somebody/tiny@main')([Image.new('RGB', (9, 9))]).shape)\n"
        "except errors.BunnyLoraError as error: exit(str(error))"
    )
    with serving(Hub(tmp_path)) as hub:
        refused = bunny(hub, project, "-c", load, HF_ENDPOINT="http://127.0.0.1:9")
        fetched = bunny(hub, project, "download", "somebody/tiny@main")
        loaded = bunny(hub, project, "-c", load, HF_ENDPOINT="http://127.0.0.1:9")
    assert "Could not load evaluation.features somebody/tiny@main" in refused.stderr
    assert "With no download, evaluation.features takes palette and bunny-world." in refused.stderr
    assert "3 of its 4 files" in fetched.stdout, fetched.stderr
    assert not [path for path in hub.fetched if path.endswith(".bin")]
    assert "torch.Size([1, 16])" in loaded.stdout, loaded.stderr
    (tmp_path / "model.safetensors").unlink()
    with serving(Hub(tmp_path, name="some/pickles")) as hub:
        pickled = bunny(hub, project, "-c", load.replace("somebody/tiny@main", "some/pickles"))
    assert "some/pickles has no model.safetensors" in pickled.stderr
    assert "some/pickles@refs/pr/ and its number" in pickled.stderr
