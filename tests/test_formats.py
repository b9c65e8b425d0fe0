"""One LoRA in every format: the loaders of diffusers and peft are the oracles, and an independent
reading of kohya's naming."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from bunny_lora.core.sections import LoRASection
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, formats, random_models
from bunny_lora.model.formats import LoRA, Module

PARTS = ("unet", "text_encoder")


def pipeline(tiny_model: str) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_model)


def models_of(pipe: StableDiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {part: getattr(pipe, part) for part in PARTS}


def changes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the loaded adapters change, read off PEFT's own layers."""
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(
            layer.active_adapters[0]
        ).detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def assert_same(found: dict[str, torch.Tensor], modules: dict[str, Module]) -> None:
    found = {name.removeprefix("text_model."): change for name, change in found.items()}
    assert found.keys() == modules.keys()
    for name, module in modules.items():
        torch.testing.assert_close(found[name], module.change(), rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def weights(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA of rank 4 and alpha 6 on both parts, as training leaves it."""
    folder = tmp_path_factory.mktemp("trained") / "final"
    pipe = pipeline(tiny_model)
    random = torch.Generator().manual_seed(1)
    for part, model in models_of(pipe).items():
        section = LoRASection(rank=4, alpha=6)
        handle = adapters.attach(model, part, section, base_model="random-tiny", seed=3)
        for parameter in adapters.trainable_parameters(model).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
        adapters.save_adapter(handle, folder / part)
    return folder


@pytest.fixture(scope="module")
def lora(weights: Path, tiny_model: str) -> LoRA:
    return formats.read_lora(weights, models_of(pipeline(tiny_model)))


def test_a_checkpoint_is_read_as_peft_reads_it(weights: Path, lora: LoRA, tiny_model: str) -> None:
    for part, model in models_of(pipeline(tiny_model)).items():
        assert_same(changes(PeftModel.from_pretrained(model, weights / part)), lora[part])


def test_peft_reads_the_folders(lora: LoRA, tiny_model: str, tmp_path: Path) -> None:
    formats.write_peft(lora, tmp_path, "random-tiny")
    for part, model in models_of(pipeline(tiny_model)).items():
        loaded = PeftModel.from_pretrained(model, tmp_path / part)
        assert_same(changes(loaded), lora[part])
        assert loaded.peft_config["default"].base_model_name_or_path == "random-tiny"


@pytest.mark.parametrize("name", ["kohya", "diffusers"])
def test_diffusers_reads_the_file(name: str, lora: LoRA, tiny_model: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    if name == "kohya":
        formats.write_kohya(lora, path, {"ss_network_dim": "4"})
    else:
        formats.write_diffusers(lora, path)
    pipe = pipeline(tiny_model)
    pipe.load_lora_weights(path)
    for part, model in models_of(pipe).items():
        assert_same(changes(model), lora[part])


def test_a_file_without_its_metadata_keeps_its_strength(
    lora: LoRA, tiny_model: str, tmp_path: Path
) -> None:
    formats.write_diffusers(lora, tmp_path / "with.safetensors")
    save_file(load_file(tmp_path / "with.safetensors"), tmp_path / "without.safetensors")
    pipe = pipeline(tiny_model)
    pipe.load_lora_weights(tmp_path / "without.safetensors")
    assert_same(changes(pipe.unet), lora["unet"])


def test_kohyas_names_are_those_that_its_own_scripts_build(lora: LoRA, tmp_path: Path) -> None:
    """sd-scripts: prefix, then the path in the model with underscores; CLIP still wrapped."""
    formats.write_kohya(lora, tmp_path / "k.safetensors", {"ss_v2": "False"})
    held = load_file(tmp_path / "k.safetensors")
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te_text_model"}
    n_read = 0
    for part, modules in lora.items():
        for name, module in modules.items():
            stem = "_".join([prefixes[part], *name.split(".")])
            up, down = held.pop(f"{stem}.lora_up.weight"), held.pop(f"{stem}.lora_down.weight")
            scale = held.pop(f"{stem}.alpha").item() / down.shape[0]
            torch.testing.assert_close(scale * up @ down, module.change())
            n_read += 1
    assert not held and n_read > 20
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert f"{stem}.alpha" in load_file(tmp_path / "k.safetensors")


@pytest.mark.parametrize("name", ["kohya", "diffusers", "peft"])
def test_every_format_is_read_back(name: str, lora: LoRA, tiny_model: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    if name == "peft":
        formats.write_peft(lora, path := tmp_path / "lora", "random-tiny")
    elif name == "kohya":
        formats.write_kohya(lora, path, {})
    else:
        formats.write_diffusers(lora, path)
    again = formats.read_lora(path, models_of(pipeline(tiny_model)))
    for part in PARTS:
        assert_same({n: m.change() for n, m in again[part].items()}, lora[part])


def test_files_that_diffusers_itself_writes_are_read(
    lora: LoRA, tiny_model: str, tmp_path: Path
) -> None:
    state = {}
    for name, module in lora["unet"].items():
        state[f"{name}.lora.down.weight"], state[f"{name}.lora.up.weight"] = module.down, module.up
    config = LoraConfig(r=4, lora_alpha=6, target_modules=sorted(lora["unet"])).to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    again = formats.read_lora(path, models_of(pipeline(tiny_model)))
    assert again.keys() == {"unet"}
    assert_same({n: m.change() for n, m in again["unet"].items()}, lora["unet"])


def test_ranks_and_alphas_of_single_modules_survive(
    lora: LoRA, tiny_model: str, tmp_path: Path
) -> None:
    modules = dict(lora["unet"])
    name = next(iter(modules))
    modules[name] = Module(modules[name].down[:2], modules[name].up[:, :2], 1.0)
    mixed = {"unet": modules}
    formats.write_peft(mixed, tmp_path / "peft", "random-tiny")
    assert_same(
        changes(PeftModel.from_pretrained(pipeline(tiny_model).unet, tmp_path / "peft" / "unet")),
        modules,
    )
    formats.write_diffusers(mixed, tmp_path / "d.safetensors")
    pipe = pipeline(tiny_model)
    pipe.load_lora_weights(tmp_path / "d.safetensors")
    assert_same(changes(pipe.unet), modules)
    formats.write_kohya(mixed, tmp_path / "k.safetensors", {})
    again = formats.read_lora(tmp_path / "k.safetensors", models_of(pipe))
    assert_same({name: module.change() for name, module in again["unet"].items()}, modules)


def test_rank_stabilised_adapters_keep_their_strength(tiny_model: str, tmp_path: Path) -> None:
    from peft import get_peft_model

    unet = pipeline(tiny_model).unet
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q"], init_lora_weights=False
    )
    handle = get_peft_model(unet, config)
    handle.save_pretrained(tmp_path / "unet")
    expected = changes(handle)
    again = formats.read_lora(tmp_path, models_of(pipeline(tiny_model)))["unet"]
    assert_same(expected, again)


def test_bk_sdm_tinys_lora_fits_full_stable_diffusion_after_renaming() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        small = UNet2DConditionModel(**random_models.BK_SDM_TINY.unet)
        full = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    lora = {
        "unet": {
            name: Module(
                torch.zeros(2, *layer.weight.shape[1:], device="meta"),
                torch.zeros(len(layer.weight), 2, device="meta"),
                2.0,
            )
            for name, layer in small.named_modules()
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        }
    }
    assert sum("attn" in name for name in lora["unet"]) == 72
    renamed = formats.for_sd1(lora)["unet"]
    assert len(renamed) == len(lora["unet"]) == 151
    for name, module in renamed.items():
        shape = (len(module.up), *module.down.shape[1:])
        assert full.get_submodule(name).weight.shape == shape, name
    outside = {name for name in lora["unet"] if not name.startswith("up_blocks")}
    assert outside < renamed.keys() and len(outside) == 53


def test_a_lora_for_another_model_is_refused_by_name(
    lora: LoRA, tiny_model: str, tmp_path: Path
) -> None:
    wide = {"unet": {n: Module(torch.ones(4, 999), m.up, 4.0) for n, m in lora["unet"].items()}}
    formats.write_kohya(wide, tmp_path / "wide.safetensors", {})
    with pytest.raises(BunnyLoraError, match=r"another base model(.|\n)*999 inputs"):
        formats.read_lora(tmp_path / "wide.safetensors", models_of(pipeline(tiny_model)))
    save_file({"lora_unet_nowhere.lora_down.weight": torch.ones(1, 1)}, tmp_path / "odd.safetensors")
    with pytest.raises(BunnyLoraError, match="lora_unet_nowhere"):
        formats.read_lora(tmp_path / "odd.safetensors", models_of(pipeline(tiny_model)))


def test_what_is_no_lora_is_refused(tiny_model: str, tmp_path: Path) -> None:
    models = models_of(pipeline(tiny_model))
    (tmp_path / "broken.safetensors").write_bytes(b"PK\x03\x04 a pickle in disguise")
    save_file({"some.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    for name, reason in (
        ("broken.safetensors", "safetensors"),
        ("other.safetensors", "No LoRA"),
        ("", "No LoRA"),
    ):
        with pytest.raises(BunnyLoraError, match=reason):
            formats.read_lora(tmp_path / name, models)
    nan = {"unet.x.lora_A.weight": torch.tensor([[float("nan")]])}
    save_file(nan, tmp_path / "nan.safetensors")
    with pytest.raises(BunnyLoraError, match="NaN"):
        formats.read_lora(tmp_path / "nan.safetensors", models)
    state = {"unet.x.lora_A.weight": torch.ones(1, 1)}
    save_file(state, tmp_path / "half.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(BunnyLoraError, match=r"half\.safetensors.*no JSON"):
        formats.read_lora(tmp_path / "half.safetensors", models)


def test_several_add_up_with_their_weights(lora: LoRA) -> None:
    modules = lora["unet"]
    name = next(iter(modules))
    other = {"unet": {name: Module(modules[name].down[:2], modules[name].up[:, :2], 3.0)}}
    both = formats.combined([(lora, 0.5), (other, -2.0)])
    expected = 0.5 * modules[name].change() - 2 * other["unet"][name].change()
    torch.testing.assert_close(both["unet"][name].change(), expected)
    assert both["unet"][name].rank == 6
    rest = [n for n in modules if n != name]
    for n in rest:
        torch.testing.assert_close(both["unet"][n].change(), 0.5 * modules[n].change())
    assert both["text_encoder"].keys() == lora["text_encoder"].keys()
    assert formats.combined([(lora, 1.0)]) is lora


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_more_than_plain_lora_is_refused(
    kind: str, lora: LoRA, tiny_model: str, tmp_path: Path
) -> None:
    path = tmp_path / "dora.safetensors"
    if kind == "kohya":
        formats.write_kohya(lora, path, {})
    else:
        formats.write_diffusers(lora, path)
    state = load_file(path)
    stem = next(iter(state)).rsplit(".", 2)[0]
    save_file(state | {f"{stem}.dora_scale": torch.ones(1)}, path)
    with pytest.raises(BunnyLoraError, match=r"dora\.safetensors holds DoRA, .*dora_scale"):
        formats.read_lora(path, models_of(pipeline(tiny_model)))


def test_ranks_and_alphas_that_make_no_sense_are_refused(
    lora: LoRA, tiny_model: str, tmp_path: Path
) -> None:
    models = models_of(pipeline(tiny_model))
    name, module = next(iter(lora["unet"].items()))
    path = tmp_path / "odd.safetensors"
    for down, up in (
        (module.down[:2], module.up),
        (module.down[0], module.up),
        (module.down, torch.tensor(1.0)),
        (module.down[:0], module.up[:, :0]),
        (module.down, module.up[:, :, None, None]),
    ):
        formats.write_kohya({"unet": {name: Module(down, up, 2.0)}}, path, {})
        with pytest.raises(BunnyLoraError, match=r"odd.* is damaged: the matrices of down_blocks"):
            formats.read_lora(path, models)
    formats.write_kohya({"unet": {name: module}}, path, {})
    state = load_file(path)
    alpha = next(key for key in state if key.endswith(".alpha"))
    save_file(state | {alpha: torch.ones(3)}, path)
    with pytest.raises(BunnyLoraError, match="is damaged"):
        formats.read_lora(path, models)
    formats.write_diffusers({"unet": {name: module}}, path)
    told = {"lora_adapter_metadata": '{"unet.alpha_pattern": [1]}'}
    save_file(load_file(path), path, told)
    with pytest.raises(BunnyLoraError, match="is damaged"):
        formats.read_lora(path, models)


# ---------------------------------------------------------------------------- training on


def attached(pipe: StableDiffusionPipeline, parts: tuple[str, ...], **section: object) -> dict:
    models = {part: getattr(pipe, part) for part in parts}
    for model in models.values():
        model.requires_grad_(False)
    lora = LoRASection.model_validate(section)
    return {
        part: adapters.attach(model, part, lora, base_model="random-tiny", seed=5)
        for part, model in models.items()
    }


def test_training_can_start_from_a_lora_of_another_rank_and_alpha(lora: LoRA, tiny_model: str) -> None:
    pipe = pipeline(tiny_model)
    handles = attached(pipe, PARTS, rank=6, alpha=20)
    adapters.start_from(handles, lora)
    for part, handle in handles.items():
        assert_same(changes(handle), lora[part])
        for name, parameter in adapters.trainable_parameters(getattr(pipe, part)).items():
            assert parameter.requires_grad and parameter.dtype == torch.float32
            if "lora_A" in name:
                assert bool((parameter.detach().abs().sum(1) > 0).all()), "each row can still learn"


@pytest.mark.parametrize(
    ("parts", "section", "way_out"),
    [
        (PARTS[:1], {"rank": 4}, "train_text_encoder: true"),
        (PARTS, {"rank": 3}, "lora.rank: 4 or more"),
        (PARTS, {"rank": 4, "target_modules": ["to_q"]}, r"leaves out: add to_(k|v|out\.0) to them"),
        (
            PARTS,
            {"rank": 4, "text_encoder_target_modules": ["q_proj"]},
            "lora.text_encoder_target_modules leaves out",
        ),
    ],
)
def test_a_lora_that_does_not_fit_the_settings_says_which_to_change(
    parts: tuple[str, ...], section: dict, way_out: str, lora: LoRA, tiny_model: str
) -> None:
    handles = attached(pipeline(tiny_model), parts, **section)
    with pytest.raises(BunnyLoraError, match=way_out):
        adapters.start_from(handles, lora)
