"""Adapters from strangers: nothing in them is run, each is refused, the base stays as it was."""

import io
import json
import pickle
import re
import struct
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import attached, load, output, shake, tiny_unet

from bunny_lora.errors import BunnyLoraError
from bunny_lora.inference import recorded_base_model
from bunny_lora.model import adapters

CONFIG, WEIGHTS, OLD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@pytest.fixture(scope="module")
def unet(tiny_model):
    """One model for all tests: every one of them has to leave it as it was."""
    return tiny_unet(tiny_model)


@pytest.fixture(scope="module")
def good(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    model = tiny_unet(tiny_model)
    peft_model = attached(model)
    shake(model)
    adapters.save_adapter(peft_model, folder)
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A copy of a good adapter, to spoil."""
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refused(model: torch.nn.Module, folder: Path) -> str:
    """Return the message, after making sure that the model is what it was."""
    before, names = output(model), list(model.state_dict())
    files = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(BunnyLoraError) as error:
        load(model, folder)
    assert torch.equal(output(model), before)
    assert list(model.state_dict()) == names
    assert not hasattr(model, "peft_config")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    return str(error.value)


class Trap:
    """A pickle that leaves a file behind if anything executes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def as_tar(trap: object, path: Path) -> None:
    """The oldest of torch's formats, each member of it a pickle."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(data := pickle.dumps(trap))
            tar.addfile(info, io.BytesIO(data))


PICKLES = {
    "zip": lambda trap, path: torch.save({"a": trap}, path),
    "legacy": lambda trap, path: torch.save({"a": trap}, path, _use_new_zipfile_serialization=False),
    "tar": as_tar,
    **{
        f"protocol {n}": lambda trap, path, n=n: path.write_bytes(pickle.dumps(trap, n))
        for n in range(6)
    },
}


@pytest.mark.parametrize("name", [WEIGHTS, OLD])
@pytest.mark.parametrize("kind", PICKLES)
def test_no_pickle_is_ever_executed(unet, folder, tmp_path_factory, kind, name):
    trap = tmp_path_factory.mktemp("trap") / "ran"
    (folder / WEIGHTS).unlink()
    PICKLES[kind](Trap(trap), folder / name)
    message = refused(unet, folder)
    assert "cannot be read safely" in message and "use another checkpoint" in message
    assert "weights_only" not in message  # Torch's own message says how to run it.
    assert not trap.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {3: torch.ones(1)}, torch.ones(3), "text", None])
def test_a_bin_file_that_holds_no_tensors_by_name_is_refused(unet, folder, content):
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / OLD)
    assert "not a file of tensors alone" in refused(unet, folder)


DAMAGED = {
    "zero bytes": b"",
    "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header is no JSON": struct.pack("<Q", 10) + b"junkjunkju",
    "header nested deeply": struct.pack("<Q", 20_000) + b"[" * 20_000,
}


@pytest.mark.parametrize("name", [*DAMAGED, "cut off", "cut off in the header"])
@pytest.mark.parametrize("file", [WEIGHTS, OLD])
def test_a_damaged_file_is_refused(unet, folder, name, file):
    whole = (folder / WEIGHTS).read_bytes()
    if file == OLD:
        torch.save(load_file(folder / WEIGHTS), folder / OLD)
        whole = (folder / OLD).read_bytes()
        (folder / WEIGHTS).unlink()
    cut_off = {"cut off": whole[:-300], "cut off in the header": whole[:100]}
    (folder / file).write_bytes((DAMAGED | cut_off)[name])
    assert "cannot be read safely" in refused(unet, folder)


def change(tensors: dict, name: str) -> dict:
    """Spoil the tensors of an adapter in one of many ways."""
    first, last = min(tensors), max(tensors)
    a, b = tensors[first], tensors[last]
    ways = {
        "nan": {first: a * float("nan")},
        "infinity": {last: b / 0},
        "too large for float32": {last: b.double() + 1e300},
        "int32": {first: a.to(torch.int32)},
        "bool": {first: a > 0},
        "complex64": {first: a.to(torch.complex64)},
        "float8": {first: a.to(torch.float8_e4m3fn)},
        "one shape": {last: torch.ones(3, 3)},
        "every shape": {key: tensor.repeat(2, 2) for key, tensor in tensors.items()},
        "more rank": {key: tensor.repeat(2, 1) for key, tensor in tensors.items() if "lora_A" in key},
        "one too many": {"x": torch.ones(1)},
        "a base weight": {"base_model.model.conv_in.weight": torch.zeros(1)},
    }
    return tensors | ways[name]


TENSORS = {
    **dict.fromkeys(("nan", "infinity", "too large for float32"), "hold NaN or infinity in base_model"),
    "int32": "hold int32 where numbers should be",
    "bool": "hold bool where numbers should be",
    "complex64": "hold complex64 where numbers should be",
    "float8": "hold float8_e4m3fn where numbers should be",
    "one shape": r"is damaged: the matrices of up_blocks.* are .* and \(3, 3\)",
    **dict.fromkeys(("every shape", "more rank"), "says rank 4 of down_blocks.* have 8"),
    "one too many": r"it holds x \(1 such tensors\)",
    "a base weight": r"it holds conv_in.weight \(1 such tensors\)",
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_cannot_be_right_are_refused(unet, folder, name):
    save_file(change(load_file(folder / WEIGHTS), name), folder / WEIGHTS)
    assert re.search(TENSORS[name], refused(unet, folder))


def test_an_adapter_of_another_part_or_with_no_tensors_is_refused(unet, folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({}, folder / WEIGHTS)
    assert "there is no tensor in it" in refused(unet, folder)
    renamed = {name.replace("blocks", "layers"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / WEIGHTS)
    assert "the unet has no down_layers.0" in refused(unet, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_the_same_adapter(tiny_model, folder, dtype):
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / WEIGHTS)
    model = tiny_unet(tiny_model)
    load(model, folder)
    assert {p.dtype for p in adapters.trainable_parameters(model).values()} == {torch.float32}


UNREADABLE = {
    "empty": (b"", "Could not read"),
    "cut off": (b'{"peft_type": "LO', "Could not read"),
    "not UTF-8": (b'{"a": "\xe9"}', "Could not read"),
    "nested deeply": (b"[" * 100_000, "Could not read"),
    "a list": (b"[]", "cannot be used: the file"),
    "nothing in it": (b"{}", "cannot be used: peft_type"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_configuration_is_refused(unet, folder, name):
    content, message = UNREADABLE[name]
    (folder / CONFIG).write_bytes(content)
    assert message in (told := refused(unet, folder)) and CONFIG in told
    with pytest.raises(BunnyLoraError, match=message):
        folder.joinpath("unet").symlink_to(folder)
        recorded_base_model(folder)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("r", [0, -1, 10**9, 10**30, "8", 4.5, None, [4], True]),
        ("lora_alpha", [0, -1, "x", None, float("nan"), float("inf"), 1e30, []]),
        ("peft_type", [None, "IA3", "LOHA", "X", 3]),
        ("rank_pattern", [{"(((": 4}, {"to_q": 0}, [], {"to_q": "4"}, {".*.*.*.*.*x": 4}, {"": 4}]),
        ("alpha_pattern", [{"to_q": float("nan")}, {"(a+)+": 1}, {"a" * 600: 1}]),
        ("base_model_name_or_path", [3, ["a"]]),
        ("use_rslora", ["yes", 1]),
    ],
)
def test_wrong_values_in_the_configuration_are_refused_by_their_key(unet, folder, key, values):
    config = json.loads((folder / CONFIG).read_text())
    for value in values:
        (folder / CONFIG).write_text(json.dumps(config | {key: value}))
        assert f"cannot be used: {key}: " in refused(unet, folder), value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("kasa_config", {"beta": 1e-4}),
        ("modules_to_save", ["conv_in"]),
        ("layer_replication", [[0, 4]]),
        ("target_parameters", ["conv_in.weight"]),
        ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
    ],
)
def test_more_than_plain_lora_is_refused_by_its_name(unet, folder, key, value):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {key: value}))
    assert f"it uses {key}" in refused(unet, folder)


@pytest.mark.parametrize("rank", [5, 90_000])
def test_a_rank_that_the_weights_do_not_have_is_refused(unet, folder, rank):
    config = json.loads((folder / CONFIG).read_text())
    for change in ({"r": rank}, {"rank_pattern": {"to_q": rank}}):
        (folder / CONFIG).write_text(json.dumps(config | change))
        assert re.search(f"says rank {rank} of .*to_[kq], whose weights have 4", refused(unet, folder))


def test_modules_that_a_configuration_names_are_never_imported(tiny_model, folder, monkeypatch):
    code = folder / "code"
    code.mkdir()
    (code / "evil_module.py").write_text(
        "import pathlib; pathlib.Path(__file__).with_name('ran').touch()"
    )
    monkeypatch.syspath_prepend(str(code))
    named = {
        "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"},
        "megatron_core": "evil_module",
        "megatron_config": {"a": 1},
        "task_type": "CAUSAL_LM",
        "trust_remote_code": True,
        "custom_module": "evil_module.Evil",
        "base_model_name_or_path": "evil/evil",
    }
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | named))
    load(tiny_unet(tiny_model), folder)
    assert "evil_module" not in sys.modules
    assert not (code / "ran").exists()


def test_a_refused_checkpoint_overwrites_nothing_of_the_adapter_that_is_loaded(tiny_model, folder):
    model = tiny_unet(tiny_model)
    peft_model = load(model, folder)
    before = output(model)
    for name in TENSORS:
        save_file(change(load_file(folder / WEIGHTS), name), folder / "spoilt.safetensors")
        (folder / "other").mkdir(exist_ok=True)
        (folder / "spoilt.safetensors").replace(folder / "other" / WEIGHTS)
        with pytest.raises((BunnyLoraError, ValueError)):
            adapters.load_weights(peft_model, folder / "other")
        assert torch.equal(output(model), before), name
