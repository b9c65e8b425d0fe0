import weakref
from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import components, devices
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import memory


def needed(tiny_model: str, **overrides: object) -> float:
    trainer = LoRATrainer(config=tiny_config(tiny_model, **overrides))
    trainer.load()
    return memory.step_bytes(trainer.setup)


def test_the_estimate_follows_what_takes_memory(tiny_model: str, project: Path) -> None:
    draw_frames(project / "data" / "instance_images", 2)
    plain = needed(tiny_model, resolution=128)
    assert needed(tiny_model, resolution=256) > 3 * plain
    assert needed(tiny_model, resolution=128, training={"batch_size": 2}) > 1.5 * plain
    less = needed(tiny_model, resolution=128, training={"gradient_checkpointing": True})
    assert less < plain
    trained = needed(tiny_model, resolution=128, lora={"train_text_encoder": True})
    assert trained > plain


class Tensors(TorchDispatchMode):
    """Counts the bytes of real tensors that are made under it and alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.before: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.before |= {s._cdata for s in storages((args, kwargs))} - self.alive.keys()
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            key = storage._cdata
            if key not in self.before and key not in self.alive:
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def storages(tree: object) -> list[torch.UntypedStorage]:
    leaves = tree_leaves(tree)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"training": {"batch_size": 2}},
        {"training": {"gradient_checkpointing": True}},
        {"training": {"mixed_precision": "bf16"}},
        {"training": {"mixed_precision": "bf16", "fast_path": "auto"}},
        {"training": {"fast_path": "on"}},
        {"lora": {"train_text_encoder": True}},
        {"prior_preservation": {"enabled": True, "num_class_images": 1, "class_data_dir": "class"}},
    ],
    ids=str,
)
def test_the_estimate_is_what_a_real_step_takes(
    tiny_model: str, project: Path, overrides: dict
) -> None:
    """The margins for allocator and kernels aside, which no count of tensors can see."""
    draw_frames(project / "data" / "instance_images", 2)
    trainer = LoRATrainer(config=tiny_config(tiny_model, resolution=64, **overrides))
    trainer.load()
    trainer.setup.set_training_mode(True)
    estimated = memory.step_bytes(trainer.setup)
    with Tensors() as measured:
        trainer.setup.learner.loss(0).backward()
        trainer.setup.state.optimizer.step()
    moments = sum(2 * 4 * p.numel() for p in trainer.setup.trainable())
    unet = trainer.setup.parts.unet
    packed = memory.REPACKED[unet.dtype] * sum(p.numel() * p.element_size() for p in unet.parameters())
    tensors = (estimated - moments - packed) / memory.GAPS
    assert measured.peak == pytest.approx(tensors, rel=0.02)
    assert measured.peak + moments < estimated


def test_what_does_not_fit_is_refused_before_training_with_what_to_lower(
    tiny_model: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_frames(project / "data" / "instance_images", 2)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1e6)
    monkeypatch.setattr(memory, "image_bytes", lambda *_: -memory.SPARE)
    trainer = LoRATrainer(config=tiny_config(tiny_model, training={"batch_size": 2}))
    with pytest.raises(BunnyLoraError, match=r"(?s)0\.0 GB of memory.*checkpointing.*batch_size.*32"):
        trainer.train()
    assert not (trainer.run_dir / "checkpoint-4").exists()
    assert not any(p.grad is not None for p in trainer.setup.trainable())


def test_pictures_that_do_not_fit_are_refused_before_the_first_is_encoded(
    tiny_model: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = draw_frames(project / "data" / "instance_images", 2)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1e6)
    with pytest.raises(BunnyLoraError, match=r"A picture needs about .*\n  - resolution below 32"):
        LoRATrainer(config=tiny_config(tiny_model)).train()
    assert not (folder.parent / "latents").exists()


def test_a_picture_needs_four_times_as_much_at_twice_the_side(tiny_model: str) -> None:
    parts = components.load_components(tiny_model, torch.device("cpu"), torch.float32)
    fixed = memory.REPACKED[torch.float32] * sum(4 * p.numel() for p in parts.vae.parameters())
    small, large = (memory.image_bytes(parts, side) - fixed for side in (256, 512))
    assert large == pytest.approx(4 * small, rel=0.2)


def test_the_free_memory_is_a_number_of_bytes() -> None:
    assert 1e6 < devices.free_bytes(torch.device("cpu")) < 1e14
