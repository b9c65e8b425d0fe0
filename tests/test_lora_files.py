"""LoRAs as people have them: what diffusers and peft read is read as they do, the rest is named."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_formats import assert_same, changes, models_of, pipeline
from test_ldm import SMALL

from bunny_lora import inference
from bunny_lora.cli import main
from bunny_lora.core import files
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, formats, ldm, random_models
from bunny_lora.model.lora import KOHYA_PREFIXES, LoRA, Module

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pipe(tiny_model: str) -> StableDiffusionPipeline:
    """The base model; tests that load an adapter into it unload it again."""
    return pipeline(tiny_model)


@pytest.fixture(scope="module")
def lora(pipe: StableDiffusionPipeline) -> LoRA:
    """Attention layers of both parts, of rank 4 and alpha 6."""
    random = torch.Generator().manual_seed(5)
    ends = {
        "unet": (".to_q", ".to_k", ".to_v", ".to_out.0"),
        "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
    }
    return {
        part: {
            name: Module(
                0.1 * torch.randn(4, layer.in_features, generator=random),
                0.1 * torch.randn(layer.out_features, 4, generator=random),
                6.0,
            )
            for name, layer in model.named_modules()
            if name.endswith(ends[part])
        }
        for part, model in models_of(pipe).items()
    }


def as_ours(path: Path, pipe: StableDiffusionPipeline) -> LoRA:
    return formats.read_lora(path, models_of(pipe))


def as_diffusers(path: Path, pipe: StableDiffusionPipeline) -> dict[str, State]:
    pipe.load_lora_weights(path)
    try:
        found = {part: changes(model) for part, model in models_of(pipe).items()}
    finally:
        pipe.unload_lora_weights()
    return {part: change for part, change in found.items() if change}


def kohya(lora: LoRA, path: Path) -> State:
    formats.write_kohya(lora, path, {})
    return load_file(path)


def old_names(lora: LoRA) -> State:
    """As diffusers wrote it when a LoRA hung on the attention's processor."""
    state = {}
    ends = {"unet": ("to_{}", "to_out.0"), "text_encoder": ("{}_proj", "out_proj")}
    for part, modules in lora.items():
        is_text, (plain, out) = part == "text_encoder", ends[part]
        before, after = ("text_encoder.text_model.", "") if is_text else ("unet.", ".processor")
        for name, module in modules.items():
            for letter in ("q", "k", "v", "out"):
                end = out if letter == "out" else plain.format(letter)
                if name.endswith(f".{end}"):
                    stem = before + name.removesuffix(f".{end}") + after
                    state[f"{stem}.to_{letter}_lora.down.weight"] = module.down
                    state[f"{stem}.to_{letter}_lora.up.weight"] = module.up
    return state


# ---------------------------------------------------------------------------- read as others do

WHOLE = {
    "whole alphas": lambda state: {
        name: torch.tensor(6) if name.endswith(".alpha") else t for name, t in state.items()
    },
    "no alphas": lambda state: {n: t for n, t in state.items() if not n.endswith(".alpha")},
    "te1": lambda state: {n.replace("lora_te_", "lora_te1_"): t for n, t in state.items()},
    "text encoder alone": lambda state: {n: t for n, t in state.items() if n.startswith("lora_te_")},
    "unet alone": lambda state: {n: t for n, t in state.items() if n.startswith("lora_unet_")},
    "half precision": lambda state: {n: t.half() for n, t in state.items()},
}


@pytest.mark.parametrize("kind", WHOLE)
def test_kohyas_files_are_read_as_diffusers_reads_them(
    kind: str, lora: LoRA, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    path = tmp_path / "k.safetensors"
    save_file(WHOLE[kind](kohya(lora, path)), path)
    theirs, ours = as_diffusers(path, pipe), as_ours(path, pipe)
    assert theirs.keys() == ours.keys()
    for part, modules in ours.items():
        assert_same(theirs[part], modules)


def test_layers_without_alpha_among_others_get_what_diffusers_gives_them(
    lora: LoRA, pipe: StableDiffusionPipeline, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "k.safetensors"
    state = kohya(lora, path)
    lacking = [n for n in state if n.endswith(("to_k.alpha", "k_proj.alpha"))]
    save_file({name: tensor for name, tensor in state.items() if name not in lacking}, path)
    theirs, ours = as_diffusers(path, pipe), as_ours(path, pipe)
    said = capsys.readouterr().out
    for part, modules in ours.items():
        assert_same(theirs[part], modules)
        n_lacking = sum(name.startswith(KOHYA_PREFIXES[part]) for name in lacking)
        assert f"no alpha of {n_lacking} of its {len(modules)} layers of the {part}:" in said
    # Where a whole part has none, they are the ranks, as they are where the file has none.
    save_file({n: t for n, t in state.items() if not n.startswith("lora_te") or "alpha" not in n}, path)
    theirs, ours = as_diffusers(path, pipe), as_ours(path, pipe)
    assert_same(theirs["text_encoder"], ours["text_encoder"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("shape", [SMALL, random_models.TINY], ids=["full", "two blocks"])
def test_layers_named_as_in_the_ldm_layout_are_read_as_diffusers_converts_them(
    shape: random_models.Shape, tmp_path: Path
) -> None:
    pipe, path = random_models.build_pipeline(shape), tmp_path / "ldm.safetensors"
    layers = dict(pipe.unet.named_modules())
    random = torch.Generator().manual_seed(2)
    state = {}
    for written, name in ldm.unet_layers(pipe.unet).items():
        # To diffusers input_blocks_10 is a name of input_blocks_1; no attention is in the 10th.
        if shape is SMALL and "attentions" not in name:
            continue
        if isinstance(layer := layers[name], torch.nn.Linear | torch.nn.Conv2d):
            stem, (n_out, *rest) = f"lora_unet_{written.replace('.', '_')}", layer.weight.shape
            state[f"{stem}.lora_down.weight"] = torch.randn(2, *rest, generator=random)
            state[f"{stem}.lora_up.weight"] = torch.randn(n_out, 2, *[1] * (len(rest) - 1))
            state[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(state, path)
    pipe.load_lora_weights(path, unet_config=pipe.unet.config)
    assert_same(changes(pipe.unet), as_ours(path, pipe)["unet"])


def test_old_files_of_diffusers_are_read_as_diffusers_reads_them(
    lora: LoRA, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    state = old_names(lora)
    assert any(".processor.to_out_lora.down" in name for name in state)
    save_file(state, path)
    theirs, ours = as_diffusers(path, pipe), as_ours(path, pipe)
    assert theirs.keys() == ours.keys() == lora.keys()
    for part, modules in ours.items():
        assert_same(theirs[part], modules)


def test_files_of_attention_processors_that_name_no_part_are_read(
    lora: LoRA, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """`save_attn_procs` wrote the UNet's layers as they are."""
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({n.removeprefix("unet."): t for n, t in old_names({"unet": lora["unet"]}).items()}, path)
    pipe.unet.load_lora_adapter(load_file(path), prefix=None)
    theirs = changes(pipe.unet)
    pipe.unload_lora_weights()
    assert_same(theirs, as_ours(path, pipe)["unet"])


@pytest.mark.parametrize("end", [".lora_linear_layer.{}.weight", ".lora_{}.weight"])
def test_text_encoders_are_read_under_each_of_diffusers_names(
    end: str, lora: LoRA, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    path, (down, up) = tmp_path / "d.safetensors", ("down", "up") if "layer" in end else ("A", "B")
    state = {}
    for name, module in lora["text_encoder"].items():
        state[f"text_encoder.text_model.{name}{end.format(down)}"] = module.down
        state[f"text_encoder.text_model.{name}{end.format(up)}"] = module.up
    save_file(state, path)
    theirs = as_diffusers(path, pipe)
    assert theirs.keys() == {"text_encoder"}
    assert_same(theirs["text_encoder"], as_ours(path, pipe)["text_encoder"])


PEFT = {
    "pattern of targets": ("unet", {"target_modules": r".*\.(to_k|to_q|to_out\.0)$"}),
    "patterns of ranks": (
        "unet",
        {
            "target_modules": ["to_q", "to_k", "conv_out"],
            "rank_pattern": {r"down_blocks.*\.to_q": 2, "up_blocks.0.attentions.1.*to_k": 3},
            "alpha_pattern": {r"attn\d+\.to_k": 9, r"^conv_out": 1},
        },
    ),
    "rank-stabilised patterns": (
        "unet",
        {"target_modules": ["to_q"], "rank_pattern": {"up_blocks.*": 2}, "use_rslora": True},
    ),
    "some layers": (
        "text_encoder",
        {
            "target_modules": ["q_proj", "fc1"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    ),
    "exclusions": ("text_encoder", {"target_modules": ["q_proj", "fc1"], "exclude_modules": ".*0.*"}),
    "all linear layers": ("text_encoder", {"target_modules": "all-linear"}),
}


@pytest.mark.parametrize("kind", PEFT)
def test_pefts_folders_are_read_as_peft_reads_them(kind: str, tiny_model: str, tmp_path: Path) -> None:
    part, settings = PEFT[kind]
    models = models_of(pipeline(tiny_model))
    handle = get_peft_model(
        models[part], LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    )
    theirs = changes(handle)
    handle.save_pretrained(tmp_path / part)
    assert_same(theirs, formats.read_lora(tmp_path, models_of(pipeline(tiny_model)))[part])
    # The same folder, named by itself.
    assert adapters.find_weights(tmp_path / part) == tmp_path / part
    assert formats.read_lora(tmp_path / part, models_of(pipeline(tiny_model))).keys() == {part}


def test_settings_that_diffusers_puts_into_its_files_count(
    lora: LoRA, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    state = {}
    for name, module in lora["unet"].items():
        state[f"{name}.lora.down.weight"], state[f"{name}.lora.up.weight"] = module.down, module.up
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=sorted(lora["unet"]),
        alpha_pattern={r"attn2\.to_k": 11},
        use_rslora=True,
    ).to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=settings
    )
    path = adapters.find_weights(tmp_path)
    assert_same(as_diffusers(path, pipe)["unet"], as_ours(path, pipe)["unet"])


# ---------------------------------------------------------------------------- what else there is


def adapter(folder: Path) -> None:
    files.write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    save_file(
        {f"base_model.model.x.self_attn.lora_{m}.weight": torch.ones(8, 8) for m in "AB"},
        folder / "adapter_model.safetensors",
    )


def made(root: Path, *names: str) -> Path:
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
            adapter(root / name)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("held", "found", "says"),
    [
        (["unet/", "text_encoder/"], "", ""),
        (["final/unet/", "checkpoint-2/unet/", "samples/a.png"], "final", ""),
        (
            ["peft/unet/", "pytorch_lora_weights.safetensors", "x.safetensors", "README.md"],
            "peft",
            "peft",
        ),
        (
            ["pytorch_lora_weights.safetensors", "x.safetensors"],
            "pytorch_lora_weights.safetensors",
            "pytorch_lora_weights.safetensors",
        ),
        (
            ["checkpoint-5/optimizer.bin", "pytorch_lora_weights.safetensors"],
            "pytorch_lora_weights.safetensors",
            "pytorch_lora_weights.safetensors",
        ),
        (["x.safetensors", "x.png", ".hidden.safetensors"], "x.safetensors", "x.safetensors"),
    ],
)
def test_a_folder_that_holds_a_lora_is_taken_for_it(
    held: list[str], found: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = made(tmp_path / "exp", *held)
    assert adapters.find_weights(folder) == folder / found
    said = capsys.readouterr().out
    assert said.endswith(f"exp is {says}.\n") if says else not said
    assert adapters.find_weights(folder / found) == folder / found
    assert not capsys.readouterr().out, "what is named in full needs no word"


def test_one_part_of_a_lora_is_taken_alone_and_said_to_be_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made(tmp_path / "final", "unet/", "text_encoder/")
    part = tmp_path / "final" / "text_encoder"
    assert adapters.find_weights(part) == part
    assert "is one part of a LoRA; final has the unet too" in capsys.readouterr().out
    assert adapters.adapter_parts(part) == {"text_encoder": part}
    assert adapters.find_weights(part / "adapter_model.safetensors") == part


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (None, "there is no such file or folder"),
        ([], "there is nothing"),
        (["b.png", "a.txt", "sub/x"], r"there is a\.txt, b\.png, sub/\."),
        (["b.safetensors", "a.safetensors"], r"name one of a\.safetensors, b\.safetensors in it"),
        (["checkpoint-1/unet/", "checkpoint-2/unet/"], "name one of checkpoint-1, checkpoint-2"),
        (["model_index.json", "unet/config.json"], "it is a whole model; name it as the base model"),
    ],
)
def test_a_folder_without_one_lora_says_what_it_holds(
    held: list[str] | None, reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "exp"
    if held is not None:
        folder.mkdir()
        made(folder, *held)
    with pytest.raises(BunnyLoraError, match=f"No LoRA adapter in .*exp.*{reason}"):
        adapters.find_weights(folder)


def ones(*names: str, shape: tuple[int, ...] = (4, 4)) -> State:
    return {name: torch.ones(shape) for name in names}


STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
NAME = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KINDS = {
    "LoHa of the LyCORIS family": ones(f"{STEM}.hada_w1_a", f"{STEM}.hada_w1_b", f"{STEM}.alpha"),
    "LoKr of the LyCORIS family": ones(f"{STEM}.lokr_w1", f"{STEM}.lokr_w2"),
    "LoCon with a Tucker": ones(f"{STEM}.lora_mid.weight", f"{STEM}.lora_up.weight"),
    "whole changes of weights": ones(f"{STEM}.diff"),
    "GLoRA": ones(f"{STEM}.a1.weight", f"{STEM}.b1.weight"),
    "OFT": ones(f"{STEM}.oft_diag"),
    "IA3": ones(f"{STEM}.weight", f"{STEM}.on_input"),
    "DoRA, whose magnitudes": ones(f"{STEM}.lora_down.weight", f"{STEM}.dora_scale"),
    "DoRA.*lora_magnitude_vector": ones(f"{NAME}.lora_A.weight", f"{NAME}.lora_magnitude_vector"),
    "LoRA with a bias": ones(f"{NAME}.lora_A.weight", f"{NAME}.lora_B.bias"),
    "LoRA of Stable Diffusion XL, or": ones("lora_te2_text_model_x.lora_down.weight"),
    "LoRA of Stable Diffusion XL;": ones(f"{STEM}.lora_down.weight", shape=(4, 2048)),
    "Diffusion XL; the base model is another": ones(f"{NAME}.lora_A.weight", shape=(4, 2048)),
    "LoRA of Stable Diffusion 2.x": ones(f"{NAME}.lora.down.weight", shape=(4, 1024)),
    "a diffusion transformer": ones("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
    r"transformer \(Flux, Stable Diffusion 3": ones("transformer.transformer_blocks.0.x.lora_A.weight"),
    "transformer .*and 1 more": ones("diffusion_model.blocks.0.x", "diffusion_model.blocks.1.x"),
    "an embedding .* bundled with a LoRA": ones("bundle_emb.ellie.string_to_param.*", f"{STEM}.alpha"),
    "an embedding .*, no LoRA": ones("emb_params"),
    "a whole Stable Diffusion in one file": ones("model.diffusion_model.input_blocks.0.0.weight"),
    "a ControlNet": ones("control_model.input_blocks.0.0.weight"),
    "other.weight .1 such": ones("other.weight"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_lora_is_told_by_its_name(
    kind: str, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    save_file(KINDS[kind], tmp_path / "style.safetensors")
    with pytest.raises(BunnyLoraError, match=rf"style\.safetensors.*{kind}"):
        as_ours(tmp_path / "style.safetensors", pipe)


def test_the_size_of_a_lora_that_does_not_fit_is_told(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    state = ones(f"lora_unet_mid_{STEM[10:]}.lora_down.weight", shape=(4, 768))
    save_file(state, tmp_path / "style.safetensors", {"ss_sd_model_name": "someone/model"})
    with pytest.raises(BunnyLoraError, match=r"size of Stable Diffusion 1\.x.*has no lora_unet_mid"):
        as_ours(tmp_path / "style.safetensors", pipe)


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"x")
    return file.getvalue()


def cut(n_bytes: int) -> Callable[[bytes], bytes]:
    return lambda whole: whole[:n_bytes]


NO_FILES = {
    "is empty": cut(0),
    "is cut off in its first bytes": cut(7),
    "is cut off in its header": cut(30),
    r"is cut off: \d[\d,]* of \d[\d,]* bytes": lambda whole: whole[:-1],
    "is a pickle": lambda _: zipped("archive/data.pkl"),
    "is a pickle .torch's .pt": lambda _: b"\x80\x02}q\x00.",
    "is a zip archive": lambda _: zipped("style.safetensors"),
    "is a Git LFS pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\nsize 9\n",
    "is a web page": lambda _: b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
    'is text, no weights.*"error": "Unauthorized"': lambda _: b'{"error": "Unauthorized"}',
    "is no safetensors file, or a damaged": lambda _: b"\x00" * 90,
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_file_that_holds_no_tensors_is_told_by_what_it_is(
    kind: str, lora: LoRA, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    formats.write_kohya(lora, path, {})
    path.write_bytes(NO_FILES[kind](path.read_bytes()))
    with pytest.raises(BunnyLoraError, match=rf"style\.safetensors {kind}"):
        as_ours(path, pipe)
    with pytest.raises(BunnyLoraError, match=rf"style\.safetensors {kind}"):
        inference.recorded_base_model(path)
    folder = tmp_path / "peft"
    formats.write_peft(lora, folder, "random-tiny")
    path.rename(folder / "unet" / "adapter_model.safetensors")
    with pytest.raises(BunnyLoraError, match=rf"read safely: adapter_model\.safetensors {kind}"):
        as_ours(folder, pipe)


def test_pefts_weights_without_their_configuration_have_no_strength(
    lora: LoRA, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    formats.write_peft(lora, tmp_path, "random-tiny")
    (tmp_path / "unet" / "adapter_config.json").unlink()
    path = tmp_path / "unet" / "adapter_model.safetensors"
    assert adapters.find_weights(path) == path
    with pytest.raises(BunnyLoraError, match=r"PEFT's, and adapter_config\.json.* is not there"):
        as_ours(path, pipe)


def test_a_lora_named_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made(tmp_path / "run", "final/unet/")
    twice = [("run", 0.5), ("run/final", 0.3)]
    with pytest.raises(BunnyLoraError, match="final is named twice; name it once"):
        inference.find_loras((tmp_path / name, weight) for name, weight in twice)
    named = [word for name, w in twice for word in ("--lora-weights", f"{tmp_path / name}={w}")]
    assert main(["generate", *named, "--prompt", "ellie"]) == 2
    assert "named twice" in capsys.readouterr().err


# ---------------------------------------------------------------------------- the base model


def test_a_kohya_file_is_drawn_with_the_base_model_that_it_records(
    lora: LoRA, project: Path, capsys: pytest.CaptureFixture
) -> None:
    formats.write_kohya(lora, project / "ellie.safetensors", {"ss_sd_model_name": "random-tiny"})
    size = ["--steps", "1", "--width", "32", "--height", "32"]
    assert main(["generate", "--lora-weights", "ellie.safetensors", "--prompt", "ellie", *size]) == 0
    assert (project / "out.png").is_file()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "v1-5-pruned.safetensors",
            r"'v1-5-pruned\.safetensors', which is no folder here",
        ),
        ("C:/models/anime/v1.ckpt", "is no folder here and no name on the hub"),
        ("~nobody-of-this-name/sd", "is no folder here and no name on the hub"),
        ("x" * 5000, "is no folder here and no name on the hub"),
        (None, r"style\.safetensors does not record the base model"),
    ],
)
def test_a_file_that_records_no_model_to_be_had_says_so(
    name: str | None, says: str, lora: LoRA, tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    formats.write_kohya(lora, path, {"ss_sd_model_name": name} if name else {"a": "b"})
    with pytest.raises(BunnyLoraError, match=f"{says}.*--base-model"):
        inference.recorded_base_model(path)


def test_a_base_model_on_the_hub_is_recorded_with_its_revision(lora: LoRA, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    formats.write_kohya(lora, path, {"ss_sd_model_name": "nota-ai/bk-sdm-tiny"})
    assert inference.recorded_base_model(path) == "nota-ai/bk-sdm-tiny"
    settings = {"unet.base_model_name_or_path": "owner/name", "unet.revision": "0a1b"}
    formats.write_diffusers(lora, path)
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(settings)})
    assert inference.recorded_base_model(path) == "owner/name@0a1b"
