"""Layers chosen by what they are: attention, feed-forward, all; trained, saved, exported, read back."""

from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config
from safetensors.torch import load_file
from test_formats import assert_same, changes, models_of, pipeline

from bunny_lora import export
from bunny_lora.config import LoRASection
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, formats
from bunny_lora.model.targets import resolve_targets
from bunny_lora.trainer import LoRATrainer

ATTENTION = {"to_q", "to_k", "to_v", "to_out.0"}
FEED_FORWARD = {"ff.net.0.proj", "ff.net.2"}
OTHERS = {
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "proj_in",
    "proj_out", "time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2", "conv_in",
    "conv_out",
}  # fmt: skip
EVERYTHING = {"train_text_encoder": True, "target_modules": "all", "text_encoder_target_modules": "all"}


def ends(names: list[str], known: set[str]) -> set[str]:
    """Which of the ends these names have; each has one."""
    found = [next(end for end in known if f".{name}".endswith(f".{end}")) for name in names]
    return set(found)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("attention", ATTENTION),
        ("attention+ff", ATTENTION | FEED_FORWARD),
        ("all", ATTENTION | FEED_FORWARD | OTHERS),
    ],
)
def test_groups_are_layers_of_a_kind(group: str, expected: set[str], tiny_model: str) -> None:
    unet = pipeline(tiny_model).unet
    names = resolve_targets(unet, "unet", [group])
    assert ends(names, ATTENTION | FEED_FORWARD | OTHERS) == expected
    by_end = resolve_targets(unet, "unet", [*sorted(expected), group])
    assert by_end == names, "the same as by the ends of their names"
    plain = sorted(expected & ATTENTION)
    assert resolve_targets(unet, "unet", plain) == plain, "names of layers stay as they are"


def test_groups_are_known_in_the_text_encoder_too_and_mix_with_names(tiny_model: str) -> None:
    text_encoder = pipeline(tiny_model).text_encoder
    projections, both = {"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}
    resolved = {
        group: ends(resolve_targets(text_encoder, "text_encoder", group), projections | both)
        for group in (("attention",), ("attention+ff",), ("all",), ("attention", "fc1"))
    }
    assert resolved[("attention",)] == projections
    assert resolved[("attention+ff",)] == resolved[("all",)] == projections | both
    assert resolved[("attention", "fc1")] == projections | {"fc1"}


def test_a_group_is_named_alone_or_in_a_list(tiny_model: str) -> None:
    assert LoRASection(target_modules="all").target_modules == ["all"]
    with pytest.raises(BunnyLoraError, match="'attentoin' is none, the nearest: attention"):
        resolve_targets(pipeline(tiny_model).unet, "unet", ["attentoin"])
    with pytest.raises(BunnyLoraError, match="'attention' is none"):
        resolve_targets(torch.nn.Sequential(torch.nn.Linear(1, 1)), "unet", ["attention"])


@pytest.fixture(scope="module")
def run_dir(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on every layer, in one go."""
    root = tmp_path_factory.mktemp("all")
    return trained(root, tiny_model, 2)


def trained(root: Path, tiny_model: str, n_steps: int) -> Path:
    if not (root / "data").exists():
        draw_frames(root / "data" / "instance_images", 3)
    folders = {"data_dir": str(root / "data" / "instance_images"), "output_dir": str(root / "foxes")}
    training = {"max_train_steps": n_steps, "save_steps": 1}
    LoRATrainer(config=tiny_config(tiny_model, lora=EVERYTHING, training=training, **folders)).train()
    return root / "foxes"


def test_every_layer_learns_and_going_on_ends_at_the_same_bytes(
    run_dir: Path, tiny_model: str, tmp_path: Path
) -> None:
    trained(tmp_path, tiny_model, 1)
    resumed = trained(tmp_path, tiny_model, 2)
    for part in formats.PARTS:
        whole = load_file(run_dir / "final" / part / "adapter_model.safetensors")
        again = load_file(resumed / "final" / part / "adapter_model.safetensors")
        assert whole.keys() == again.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
        n_moved = sum(bool(t.any()) for name, t in whole.items() if "lora_B" in name)
        assert n_moved == len(whole) / 2 == len(resolve_targets(_part(tiny_model, part), part, ["all"]))


def _part(tiny_model: str, part: str) -> torch.nn.Module:
    return models_of(pipeline(tiny_model))[part]


def test_every_format_is_written_and_read_back_by_others_and_by_us(
    run_dir: Path, tiny_model: str, tmp_path: Path
) -> None:
    """An export fails unless diffusers and PEFT see the same changes; kohya's once more by hand."""
    lora = formats.read_lora(run_dir / "final", models_of(pipeline(tiny_model)))
    kinds = ["peft", "diffusers", "kohya", "merged"]
    written = export.export(run_dir, tmp_path / "out", kinds=kinds)
    pipe = pipeline(tiny_model)
    for path in written[:3]:
        ours = formats.read_lora(path, models_of(pipe))
        for part in formats.PARTS:
            assert_same({n: m.change() for n, m in ours[part].items()}, lora[part])
    pipe.load_lora_weights(tmp_path / "out" / "foxes.safetensors")
    for part, model in models_of(pipe).items():
        assert_same(changes(model), lora[part])


def test_convolutions_have_the_names_and_shapes_of_locon(
    run_dir: Path, tiny_model: str, tmp_path: Path
) -> None:
    lora = formats.read_lora(run_dir / "final", models_of(pipeline(tiny_model)))
    formats.write_kohya(lora, tmp_path / "k.safetensors", {})
    state = load_file(tmp_path / "k.safetensors")
    unet = pipeline(tiny_model).unet
    for name in ("conv_in", "down_blocks.0.resnets.0.conv1", "up_blocks.0.upsamplers.0.conv"):
        weight, stem = unet.get_submodule(name).weight, f"lora_unet_{name.replace('.', '_')}"
        assert state[f"{stem}.lora_down.weight"].shape == (2, *weight.shape[1:]), name
        assert state[f"{stem}.lora_up.weight"].shape == (len(weight), 2, 1, 1), name
        assert state[f"{stem}.alpha"] == 2
    assert state["lora_unet_time_embedding_linear_1.lora_down.weight"].ndim == 2


def test_training_starts_from_a_lora_of_every_layer(run_dir: Path, tiny_model: str) -> None:
    lora = formats.read_lora(run_dir / "final", models_of(pipeline(tiny_model)))
    models = models_of(pipeline(tiny_model))
    section = LoRASection(rank=3, alpha=5, **EVERYTHING)
    handles = {
        part: adapters.attach(model, part, section, base_model="random-tiny", seed=1)
        for part, model in models.items()
    }
    adapters.start_from(handles, lora)
    for part, handle in handles.items():
        assert_same(changes(handle), lora[part])
    both = formats.combined([(lora, 0.5), (lora, 0.5)])
    for part, modules in both.items():
        assert_same({name: m.change() for name, m in modules.items()}, lora[part])
