"""Output preservation: without a name, the model goes on predicting as it does without the LoRA."""

from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config
from peft import PeftModel

from bunny_lora.config import Config
from bunny_lora.core.files import write_json
from bunny_lora.data.summary import SCHEMA_VERSION, SUMMARY
from bunny_lora.model import diffusion
from bunny_lora.model.components import encode_prompts
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import setup
from bunny_lora.training.batch import Batch
from bunny_lora.training.lessons import Lesson, noisy_rows, preserved_rows, with_lessons
from bunny_lora.training.objective import Learner
from bunny_lora.training.setup import Setup

N_IMAGES = 4
LORA = {"train_text_encoder": True, "rank": 8, "alpha": 8}


@pytest.fixture
def data(project: Path) -> Path:
    """Frames whose captions name Ellie, and a summary that says so."""
    folder = draw_frames(project / "data" / "instance_images", N_IMAGES)
    know(folder, ["ellie"])
    return folder


def know(folder: Path, characters: list[str]) -> None:
    images = [
        {"file_name": path.name, "characters": characters, "faces": [], "size": [96, 54]}
        for path in sorted(folder.glob("*.png"))
    ]
    write_json(folder.parent / SUMMARY, {"schema_version": SCHEMA_VERSION, "images": images})


def config_of(tiny_model: str, share: float = 0.5, weight: float = 1.0, **overrides: object) -> Config:
    preservation = {"share": share, "weight": weight}
    return tiny_config(tiny_model, preservation=preservation, **overrides)


def loaded(tiny_model: str, share: float = 0.5, weight: float = 1.0, **overrides: object) -> Setup:
    return setup.set_up(config_of(tiny_model, share, weight, **overrides))


def moved(model: PeftModel) -> None:
    """Give a LoRA that begins as no change some effect."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def lessons_at(learner: Learner, position: int) -> tuple[Batch, dict[int, Lesson]]:
    batch = learner._batch(learner.images, position)
    return with_lessons(batch, position, learner.config, learner.images.names, lambda _: True)


def weights(run_dir: Path) -> dict[str, bytes]:
    return {part.parent.name: part.read_bytes() for part in run_dir.glob("final/*/*.safetensors")}


def test_of_each_step_the_share_is_preserved_in_whatever_batches_it_comes(
    tiny_model: str, data: Path
) -> None:
    learner = loaded(tiny_model).learner
    for share, size in ((0.25, 8), (0.25, 4), (0.5, 2), (0.75, 4)):
        learner.config = config_of(tiny_model, share, training={"batch_size": size})
        n_preserved = [
            len(preserved_rows(learner.config, position)) for position in range(0, 10 * size, size)
        ]
        assert n_preserved == [share * size] * 10
        at_once = [row + first for first in (0, size) for row in preserved_rows(learner.config, first)]
        learner.config = config_of(tiny_model, share)
        assert at_once == [
            position for position in range(2 * size) if preserved_rows(learner.config, position)
        ]


@pytest.mark.parametrize("trained", [False, True])
def test_with_a_lora_that_changes_nothing_there_is_nothing_to_preserve(
    tiny_model: str, data: Path, trained: bool
) -> None:
    run = loaded(tiny_model, lora={"train_text_encoder": trained})
    preserved = [position for position in range(8) if preserved_rows(run.learner.config, position)]
    assert preserved == [1, 3, 5, 7]
    assert all(run.learner.loss(position).item() == 0 for position in preserved)
    assert all(run.learner.loss(position).item() > 0.1 for position in (0, 2, 4, 6))
    moved(run.state.models["unet"])
    assert all(run.learner.loss(position).item() > 0 for position in preserved)


@pytest.mark.parametrize("trained", [False, True])
def test_the_loss_is_the_distance_from_what_the_base_model_predicts(
    tiny_model: str, data: Path, trained: bool
) -> None:
    """Its UNet and text encoder without a LoRA are those of a run that has just been set up."""
    options: dict = {"lora": {"train_text_encoder": trained}, "training": {"batch_size": 2}}
    run, base = (loaded(tiny_model, 0.5, 3.0, **options) for _ in range(2))
    for model in run.state.models.values():
        moved(model)
    batch = run.learner._batch(run.learner.images, 4)
    instance, preserved = lessons_at(run.learner, 4)[0].captions
    assert instance == batch.captions[0] and "ellie" not in preserved
    alphas_cumprod = run.parts.noise_scheduler.alphas_cumprod
    noisy = diffusion.add_noise(batch.latents, batch.noise, batch.timesteps, alphas_cumprod)
    with torch.no_grad():
        ours, theirs = (
            setup.parts.unet(
                noisy, batch.timesteps, encode_prompts(setup.parts, [instance, preserved])
            ).sample
            for setup in (run, base)
        )
    target = torch.stack([batch.noise[0], theirs[1]])
    expected = (ours - target).square().flatten(1).mean(1) * torch.tensor([1.0, 3.0])
    torch.testing.assert_close(run.learner.loss(4).detach(), expected.mean())


def test_the_noisiest_samples_stay_as_they_are_names_and_all(tiny_model: str, data: Path) -> None:
    run = loaded(tiny_model, 0.0, training={"batch_size": 4})
    batch = run.learner._batch(run.learner.images, 0)
    order = batch.timesteps.argsort()
    least = int(batch.timesteps[order[2]])
    preservation = {"share": 0.0, "from_timestep": least}
    run.learner.config = tiny_config(tiny_model, preservation=preservation, training={"batch_size": 4})
    noisy = noisy_rows(run.learner.config, batch.timesteps)
    assert sorted(noisy) == sorted(order[2:].tolist())
    losses = run.learner.losses(batch, lessons_at(run.learner, 0)[1])
    assert all(losses[row] < 1e-6 for row in noisy), "a LoRA that changes nothing"
    assert all(losses[row] > 0.1 for row in order[:2].tolist())
    assert run.learner.loss(0).item() == pytest.approx(losses.mean().item())
    plain = run.learner.losses(batch)
    assert all(plain > 0.1), "held-out pictures are judged at every timestep"


def test_names_are_taken_out_of_some_captions_and_others_are_of_another_subject_or_empty(
    tiny_model: str, data: Path
) -> None:
    learner = loaded(tiny_model, training={"batch_size": 1}).learner
    found = [lessons_at(learner, position) for position in range(1, 400, 2)]
    seen = [batch.captions[0] for batch, _ in found]
    assert [lessons[0].caption for _, lessons in found] == seen
    nameless = {f"cartoon bunny number {i}" for i in range(N_IMAGES)}
    assert set(seen) == {"", "cartoon character", *nameless}
    shares = [seen.count("") / 200, seen.count("cartoon character") / 200]
    assert shares == pytest.approx([0.25, 0.25], abs=0.08)
    assert set(seen) <= learner.encode.known.keys(), "a frozen text encoder encodes each only once"


def test_without_known_names_the_captions_themselves_are_never_preserved(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    """Who is in a caption that nobody explains would be kept from being learnt."""
    know(data, [])
    learner = loaded(tiny_model).learner
    assert "preservation.share: the data say of nobody" in capsys.readouterr().out
    seen = {lessons_at(learner, position)[0].captions[0] for position in range(1, 40, 2)}
    assert seen == {"", "cartoon character"}


def test_a_share_of_zero_is_what_there_was_before(tiny_model: str, data: Path) -> None:
    """With or without the section; the golden losses of test_trainer.py hold the rest."""
    plain = LoRATrainer(config=tiny_config(tiny_model, output_dir="plain")).train().parent
    off = LoRATrainer(config=config_of(tiny_model, 0.0, 5.0, output_dir="off")).train().parent
    assert weights(plain) == weights(off)


def test_two_at_once_are_two_in_turn_also_with_class_images(tiny_model: str, data: Path) -> None:
    prior = {"enabled": True, "num_class_images": 2, "class_data_dir": "class"}
    results = {}
    for size in (4, 1):
        run = loaded(
            tiny_model,
            lora=LORA,
            prior_preservation=prior,
            training={"batch_size": size, "gradient_accumulation_steps": 4 // size},
        )
        for model in run.state.models.values():
            moved(model)
        for position in range(0, 4, size):
            (run.learner.loss(position) / (4 // size)).backward()
        results[size] = [parameter.grad for parameter in run.trainable()]
    for at_once, main_process_first in zip(results[4], results[1], strict=True):
        assert at_once is not None and main_process_first is not None
        torch.testing.assert_close(at_once, main_process_first, rtol=1e-3, atol=1e-5)


def test_it_holds_the_empty_prompt_nearer_to_the_base_model(tiny_model: str, data: Path) -> None:
    training = {"max_train_steps": 12, "learning_rate": 1e-2, "batch_size": 4}
    training |= {"gradient_accumulation_steps": 1, "save_minutes": None}
    moved_by = {}
    for share in (0.0, 0.5):
        trainer = LoRATrainer(
            config=config_of(tiny_model, share, output_dir=f"run-{share}", lora=LORA, training=training)
        )
        trainer.train()
        run = trainer.setup
        batch = run.learner._batch(run.learner.images, 1000)
        with torch.no_grad():
            base = run.learner.predict(batch.noise, batch.timesteps, [""] * 4, [0] * 4)
            hidden_states = encode_prompts(run.parts, [""] * 4)
            now = run.parts.unet(batch.noise, batch.timesteps, hidden_states).sample
        moved_by[share] = (now - base).square().mean().item()
    assert 0 < moved_by[0.5] < 0.5 * moved_by[0.0]


def test_a_run_with_another_share_is_another_run(tiny_model: str, data: Path) -> None:
    LoRATrainer(config=config_of(tiny_model, 0.0)).train()
    with pytest.raises(Exception, match=r"preservation\.share: 0\.0 before, 0\.25 now"):
        LoRATrainer(config=config_of(tiny_model, 0.25)).train()


def test_timesteps_are_biased_for_pictures_and_not_for_lessons(tiny_model: str, data: Path) -> None:
    """So many times as often from a range, as `training.timestep_bias_multiplier` says."""
    bias = {"timestep_bias_begin": 200, "timestep_bias_end": 600, "timestep_bias_multiplier": 1e6}
    even, biased = (
        loaded(tiny_model, 0.5, training={"batch_size": 8} | keys).learner for keys in ({}, bias)
    )
    kept, own = [], []
    for position in range(0, 80, 8):
        (before, lessons), (after, _) = lessons_at(even, position), lessons_at(biased, position)
        for row, (one, other) in enumerate(zip(before.timesteps, after.timesteps, strict=True)):
            (kept if row in lessons else own).append((int(one), int(other)))
        assert before.captions == after.captions
    assert len(kept) == len(own) == 40
    assert all(one == other for one, other in kept)
    assert all(200 <= other < 600 for _, other in own)
    assert [other for _, other in sorted(own)] == sorted(other for _, other in own)
    assert not all(200 <= one < 600 for one, _ in own)


def test_a_range_of_timesteps_that_counts_no_more_than_others_is_said(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    for training, said in (({"timestep_bias_end": 700}, True), ({}, False)):
        loaded(tiny_model, 0.5, training=training)
        assert ("timestep_bias_end do nothing with" in capsys.readouterr().out) is said
