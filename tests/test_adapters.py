"""LoRA's layers and files, with peft's own loading as the oracle."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from bunny_lora.core.sections import LoRASection
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, components, formats, targets

CPU = torch.device("cpu")
INPUTS = (torch.linspace(-1, 1, 256).view(1, 4, 8, 8), torch.tensor([500]), torch.ones(1, 77, 32))


def tiny_unet(tiny_model: str) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    return unet.requires_grad_(False).eval()


def attached(model: torch.nn.Module, part: str = "unet", **lora: object) -> PeftModel:
    section = LoRASection(**({"rank": 4, "alpha": 8} | lora))
    return adapters.attach(model, part, section, base_model="random-tiny", seed=3)


def shake(model: torch.nn.Module) -> None:
    """Give B something to say: fresh adapters change nothing."""
    random = torch.Generator().manual_seed(1)
    for parameter in adapters.trainable_parameters(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)


@pytest.fixture
def trained(tiny_model: str, tmp_path: Path) -> tuple[UNet2DConditionModel, Path]:
    unet = tiny_unet(tiny_model)
    peft_model = attached(unet)
    shake(unet)
    adapters.save_adapter(peft_model, tmp_path / "unet")
    return unet, tmp_path / "unet"


def load(model: torch.nn.Module, folder: Path) -> PeftModel:
    """Put the adapter of one part into its model, as drawing does."""
    part = "unet" if isinstance(model, UNet2DConditionModel) else "text_encoder"
    return adapters.attach_modules(model, formats.read_lora(folder, {part: model})[part])


@torch.no_grad()
def output(unet: torch.nn.Module) -> torch.Tensor:
    return unet(*INPUTS).sample


def test_a_fresh_adapter_changes_nothing_and_only_lora_is_trainable(tiny_model: str) -> None:
    unet = tiny_unet(tiny_model)
    before = output(unet)
    attached(unet)
    torch.testing.assert_close(output(unet), before, rtol=0, atol=0)
    named = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert named == set(adapters.trainable_parameters(unet))
    assert all(".lora_A." in name or ".lora_B." in name for name in named)


def test_the_seed_alone_decides_the_adapters_start(tiny_model: str) -> None:
    torch.manual_seed(0)
    first, second = tiny_unet(tiny_model), tiny_unet(tiny_model)
    attached(first)
    torch.manual_seed(99)
    attached(second)
    pairs = zip(
        adapters.trainable_parameters(first).values(),
        adapters.trainable_parameters(second).values(),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_rank_alpha_and_targets_are_the_configured_ones(tiny_model: str) -> None:
    unet = tiny_unet(tiny_model)
    attached(unet, rank=2, alpha=6, target_modules=["to_q"])
    parameters = adapters.trainable_parameters(unet)
    assert {p.shape[0] for name, p in parameters.items() if "lora_A" in name} == {2}
    assert all("to_q" in name for name in parameters)
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.scaling["default"] == 3.0


def test_the_text_encoder_has_targets_of_its_own(tiny_model: str) -> None:
    text_encoder = CLIPTextModel.from_pretrained(tiny_model, subfolder="text_encoder")
    attached(text_encoder, "text_encoder", text_encoder_target_modules=["v_proj", "fc1"])
    layers = {name.split(".")[-4] for name in adapters.trainable_parameters(text_encoder)}
    assert layers == {"v_proj", "fc1"}


@pytest.mark.parametrize(
    ("part", "names", "reason"),
    [
        ("unet", ["to_q", "to_out0"], r"'to_out0' is none, the nearest: to_out\.0"),
        ("unet", ["attn1"], r"'attn1' is no layer but holds to_k, to_out\.0, to_q, to_v"),
        ("unet", ["to_q", "ff.0"], r"'ff\.0' is none, the nearest: .*ff\.net"),
        ("unet", ["zzzzzzz"], r"'zzzzzzz' is none; there are conv, conv1, .*to_q"),
        ("text_encoder", ["q_proj", "fc3"], r"'fc3' is none, the nearest: fc[12]"),
    ],
)
def test_every_target_has_to_be_a_layer(
    part: str, names: list[str], reason: str, tiny_model: str
) -> None:
    """PEFT passes over a name that fits nothing, as long as another one fits."""
    loaded = components.load_components(tiny_model, CPU, torch.float32)
    model, key = getattr(loaded, part), targets.KEYS[part]
    with pytest.raises(BunnyLoraError, match=rf"lora\.{key} fits no layer of the {part}: {reason}"):
        attached(model, part, **{key: names})
    assert not adapters.trainable_parameters(model)


def test_peft_itself_loads_what_we_save(trained: tuple, tiny_model: str) -> None:
    unet, folder = trained
    theirs = PeftModel.from_pretrained(tiny_unet(tiny_model), folder)
    torch.testing.assert_close(output(theirs), output(unet), rtol=0, atol=0)
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in saved)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_we_load_what_peft_itself_saves(tiny_model: str, tmp_path: Path) -> None:
    unet = tiny_unet(tiny_model)
    peft_model = attached(unet)
    shake(unet)
    with pytest.warns(UserWarning, match="config file in random-tiny"):  # It looks for the base model.
        peft_model.save_pretrained(tmp_path)
    other = tiny_unet(tiny_model)
    load(other, tmp_path)
    torch.testing.assert_close(output(other), output(unet), rtol=0, atol=0)


def test_the_ancestors_bin_file_is_read(trained: tuple, tiny_model: str) -> None:
    unet, folder = trained
    state = load_file(folder / "adapter_model.safetensors")
    torch.save(state, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    other = tiny_unet(tiny_model)
    load(other, folder)
    torch.testing.assert_close(output(other), output(unet), rtol=0, atol=0)


class Trap:
    """A pickle that would write a file if it were executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_that_holds_code_is_never_run(trained: tuple, tiny_model: str, tmp_path: Path) -> None:
    _, folder = trained
    (folder / "adapter_model.safetensors").unlink()
    for write in (torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap))):
        write(Trap(tmp_path / "ran"), folder / "adapter_model.bin")
        with pytest.raises(BunnyLoraError, match="cannot be read safely"):
            load(tiny_unet(tiny_model), folder)
        assert not (tmp_path / "ran").exists()


def test_a_cut_off_file_is_refused(trained: tuple, tiny_model: str) -> None:
    path = trained[1] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BunnyLoraError, match="cannot be read safely"):
        load(tiny_unet(tiny_model), trained[1])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda tensor: tensor * float("nan"), "NaN or infinity"),
        (lambda tensor: tensor.repeat(1, 2), "is damaged: the matrices of down_blocks"),
        (lambda tensor: tensor.repeat(2, 2), "says rank 4 of .*, whose weights have 8"),
    ],
)
def test_values_and_shapes_that_cannot_be_right_are_refused(
    trained: tuple, tiny_model: str, spoil: object, message: str
) -> None:
    path = trained[1] / "adapter_model.safetensors"
    save_file({name: spoil(tensor) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(BunnyLoraError, match=message):
        load(tiny_unet(tiny_model), trained[1])


def test_missing_tensors_are_not_silently_left_at_their_start(trained: tuple, tiny_model: str) -> None:
    path = trained[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    with pytest.raises(BunnyLoraError, match="one of the two matrices of down_blocks"):
        load(tiny_unet(tiny_model), trained[1])


def test_a_folder_without_an_adapter_is_explained(tmp_path: Path) -> None:
    with pytest.raises(BunnyLoraError, match="No LoRA adapter in"):
        adapters.adapter_parts(tmp_path)


def test_an_older_transformers_text_encoder_adapter_loads(tiny_model: str, tmp_path: Path) -> None:
    loaded = components.load_components(tiny_model, CPU, torch.float32)
    peft_model = attached(loaded.text_encoder, "text_encoder")
    shake(loaded.text_encoder)
    adapters.save_adapter(peft_model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    older = {
        name.replace("model.encoder", "model.text_model.encoder"): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(older, path)
    other = components.load_components(tiny_model, CPU, torch.float32)
    load(other.text_encoder, tmp_path)
    with torch.no_grad():
        expected = components.encode_prompts(loaded, ["ellie"])
        torch.testing.assert_close(components.encode_prompts(other, ["ellie"]), expected)


def test_saving_twice_gives_the_same_bytes(trained: tuple, tmp_path: Path) -> None:
    unet, folder = trained
    other = tmp_path / "again"
    adapters.save_adapter(PeftModel.from_pretrained(tiny_copy(unet), folder), other)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (other / name).read_bytes() == (folder / name).read_bytes()


def tiny_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(unet.config)
