from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config

from bunny_lora import memory
from bunny_lora.errors import BunnyLoraError
from bunny_lora.trainer import LoRATrainer


def needed(tiny_model: str, **overrides: object) -> float:
    trainer = LoRATrainer(config=tiny_config(tiny_model, **overrides))
    trainer.load()
    return memory.step_bytes(trainer)


def test_the_estimate_follows_what_takes_memory(tiny_model: str, project: Path) -> None:
    draw_frames(project / "data" / "instance_images", 2)
    plain = needed(tiny_model, resolution=128)
    assert needed(tiny_model, resolution=256) > 3 * plain
    assert needed(tiny_model, resolution=128, training={"batch_size": 2}) > 1.5 * plain
    less = needed(tiny_model, resolution=128, training={"gradient_checkpointing": True})
    assert less < plain
    trained = needed(tiny_model, resolution=128, lora={"train_text_encoder": True})
    assert trained > plain


def test_what_does_not_fit_is_refused_before_training_with_what_to_lower(
    tiny_model: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_frames(project / "data" / "instance_images", 2)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1e6)
    trainer = LoRATrainer(config=tiny_config(tiny_model, training={"batch_size": 2}))
    with pytest.raises(BunnyLoraError, match=r"(?s)0\.0 GB of memory.*checkpointing.*batch_size.*32"):
        trainer.train()
    assert not (trainer.run_dir / "checkpoint-4").exists()
    assert not any(p.grad is not None for p in trainer.trainable())


def test_the_free_memory_is_a_number_of_bytes() -> None:
    assert 1e6 < memory.free_bytes(torch.device("cpu")) < 1e14
