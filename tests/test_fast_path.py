"""`training.fast_path`: what is chosen, where it holds, and that nothing but training sees it."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config

from bunny_lora.config import Config, merge, validate
from bunny_lora.core import files
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import components, random_models
from bunny_lora.model.fast import choice, native
from bunny_lora.model.fast.attention import NativeAttnProcessor, Shape, install
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import fingerprint
from bunny_lora.training.checkpoint import list_checkpoints, recorded_environment
from bunny_lora.training.fingerprint import Fingerprint
from bunny_lora.training.resume import Start

CPU = torch.device("cpu")


@pytest.fixture
def kernels(tmp_path_factory: pytest.TempPathFactory, project: Path) -> None:
    """The native kernels, built into the test's own project."""
    native.library.cache_clear()
    choice.speed_up.cache_clear()
    try:
        native.library()
    except BunnyLoraError as error:
        pytest.skip(str(error))


def always(ratio: float):
    return lambda shape, dtype: ratio


def choose(setting: str, model: str, dtype: torch.dtype = torch.float32) -> str:
    return choice.choose(setting, Path(model), 64, CPU, dtype)


def test_every_attention_of_the_real_shape_is_known_by_its_size(tmp_path):
    files.write_json(tmp_path / "unet" / "config.json", random_models.BK_SDM_TINY.unet)
    assert choice.shapes_of(tmp_path, 512) == [
        Shape(4096, 4096, 40), Shape(4096, 77, 40), Shape(1024, 1024, 80), Shape(1024, 77, 80),
        Shape(256, 256, 160), Shape(256, 77, 160),
    ]  # fmt: skip


def test_the_shapes_are_those_that_the_unet_computes(tiny_model, kernels, monkeypatch):
    parts = components.load_components(tiny_model, CPU, torch.float32)
    met = set()
    monkeypatch.setattr(
        "bunny_lora.model.fast.attention.attention",
        lambda q, k, v: met.add(Shape(q.shape[2], k.shape[2], q.shape[3])) or q,
    )
    shapes = choice.shapes_of(Path(tiny_model), 64)
    install(parts.unet, shapes)
    words = torch.zeros(1, choice.N_WORDS, parts.unet.config.cross_attention_dim)
    parts.unet(torch.zeros(1, 4, 8, 8), 1, words)
    assert met == set(shapes)


def test_auto_takes_what_a_trial_finds_faster_on_all_and_off_nothing(tiny_model, kernels, monkeypatch):
    shapes = choice.shapes_of(Path(tiny_model), 64)
    assert choose("off", tiny_model) == "plain"
    assert choice.read(choose("on", tiny_model)) == (shapes, True)
    monkeypatch.setattr(choice, "speed_up", always(1.0))
    assert choose("auto", tiny_model) == "plain"
    monkeypatch.setattr(choice, "speed_up", lambda shape, dtype: 2.0 if shape == shapes[0] else 0.5)
    assert choose("auto", tiny_model) == f"native attention {shapes[0]}"
    assert choice.read(choose("auto", tiny_model)) == (shapes[:1], False)


def test_without_a_kernel_auto_is_plain_and_on_says_why(tiny_model, project, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.library.cache_clear()
    assert choose("auto", tiny_model) == "plain"
    assert "no C++ compiler" in choice.explain(Path(tiny_model), 64, CPU, torch.float32)
    with pytest.raises(BunnyLoraError, match=r"fast_path: on, .*no-such-compiler.*auto or off"):
        choose("on", tiny_model)
    with pytest.raises(BunnyLoraError, match="float16"):
        choose("on", tiny_model, torch.float16)
    native.library.cache_clear()


def test_lora_goes_without_casts_where_there_would_be_some(tiny_model, kernels, project, monkeypatch):
    monkeypatch.setattr(choice, "speed_up", always(1.0))
    assert choose("auto", tiny_model, torch.bfloat16) == "LoRA without casts"
    assert choose("auto", tiny_model, torch.float32) == "plain"
    everything = choose("on", tiny_model)
    assert choice.write(choice.read(everything)) == everything
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.library.cache_clear()
    assert choose("auto", tiny_model, torch.bfloat16) == "LoRA without casts"
    native.library.cache_clear()


def test_a_trial_leaves_random_numbers_as_they_were(kernels):
    before = torch.get_rng_state()
    assert choice.speed_up(Shape(16, 16, 8), torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("word", "meant"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_yamls_words_for_on_and_off_are_understood(word, meant):
    assert validate({"training": {"fast_path": word}}).training.fast_path == meant


def test_it_belongs_to_a_runs_environment_and_not_to_its_mathematics(tiny_model, kernels):
    plain, fast = (
        Fingerprint.of(tiny_config(tiny_model, training={"fast_path": x}), "") for x in ("off", "on")
    )
    assert not fingerprint.mathematical_differences(plain, fast)
    (line,) = fingerprint.environment_differences(plain, fast)
    assert line.startswith("fast_path: plain before, native attention")


# In a run


def trainer_of(model: str, project: Path, **training: object) -> LoRATrainer:
    if not (project / "data").exists():
        draw_frames(project / "data" / "instance_images", 3)
    wanted = merge({"max_train_steps": 2, "save_steps": 1, "validation_prompt": "ellie"}, training)
    return LoRATrainer(config=tiny_config(model, training=wanted))


def is_native(unet: torch.nn.Module) -> bool:
    return any(isinstance(p, NativeAttnProcessor) for p in unet.attn_processors.values())


def test_training_learns_the_same_natively_and_draws_as_torch_does(
    tiny_model, kernels, project, monkeypatch
):
    seen = []
    generate = components.generate

    def watched(pipe, settings):
        seen.append(is_native(pipe.unet))
        return generate(pipe, settings)

    monkeypatch.setattr(components, "generate", watched)
    losses = []
    for setting in ("off", "on"):
        trainer = trainer_of(tiny_model, project, fast_path=setting)
        trainer.config = Config.model_validate(trainer.config.model_dump() | {"output_dir": setting})
        trainer.run_dir = trainer.config.run_dir
        for record in trainer.steps():
            losses.append(record.loss)
            trainer.generate_image("ellie")
            assert is_native(trainer.setup.parts.unet) == (setting == "on")
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-4)
    assert len(seen) >= 8
    assert not any(seen)


def test_what_auto_chose_at_the_beginning_holds_to_the_end(
    tiny_model, kernels, project, monkeypatch, capsys
):
    monkeypatch.setattr(choice, "speed_up", always(2.0))
    trainer = trainer_of(tiny_model, project, fast_path="auto", max_train_steps=1)
    trainer.train()
    assert "fast path      native attention 16x16x" in (said := capsys.readouterr().out)
    assert re.search(r"times as fast as torch's own: 16x16x\d+ 2\.00, 16x77x\d+ 2\.00", said)
    monkeypatch.setattr(choice, "speed_up", always(0.5))
    trainer_of(tiny_model, project, fast_path="auto").train()
    said = capsys.readouterr().out
    assert "(as the run began)" in said
    assert "another environment" not in said
    newest = list(list_checkpoints(trainer.run_dir).values())[-1]
    assert recorded_environment(newest)["fast_path"].startswith("native attention")


def test_a_run_from_before_there_was_a_choice_goes_on_as_it_was(tiny_model, project, capsys):
    trainer = trainer_of(tiny_model, project, max_train_steps=1)
    trainer.train()
    state = list(list_checkpoints(trainer.run_dir).values())[-1] / "training_state.json"
    content = json.loads(state.read_text())
    del content["history"][-1]["environment"]["fast_path"]
    state.write_text(json.dumps(content))
    digest = hashlib.sha256(state.read_bytes()).hexdigest()
    sums = state.parent / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines() if "training_state" not in line]
    sums.write_text("".join(f"{x}\n" for x in [*lines, f"{digest}  training_state.json"]))
    trainer_of(tiny_model, project).train()
    said = capsys.readouterr().out
    assert "Going on after step 1" in said
    assert "another environment" not in said


def test_a_process_without_a_compiler_does_its_share_plainly(tiny_model, project, monkeypatch, capsys):
    draw_frames(project / "data" / "instance_images", 3)
    trainer = trainer_of(tiny_model, project)
    environment = {"fast_path": "native attention 16x16x16"}
    start = Start(history=({"after_step": 0, "environment": environment},))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.library.cache_clear()
    trainer.load(start)
    assert trainer.setup.fast_path == "plain"
    assert "as torch does, not natively: there is no C++ compiler" in capsys.readouterr().out
    native.library.cache_clear()
