"""Naming: a name comes to mean what its bearer looks like, as the model itself draws these words."""

from pathlib import Path

import pytest
import torch
from conftest import draw_frames, tiny_config
from test_preservation import know, lessons_at, loaded, moved

from bunny_lora.config import validate
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import diffusion
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training.lessons import (
    LEAST_TIMESTEP,
    naming_rows,
    preserved_rows,
    with_lessons,
    with_looks_told,
)

LOOKS = {"ellie": "grey bunny in a red scarf"}
OPTIONS: dict = {"looks": LOOKS, "naming": {"share": 0.5}, "training": {"batch_size": 4}}


@pytest.fixture
def data(project: Path) -> Path:
    folder = draw_frames(project / "data" / "instance_images", 4)
    know(folder, ["ellie"])
    return folder


@pytest.mark.parametrize(
    ("caption", "told"),
    [
        ("ellie, waving", "ellie, grey bunny in a red scarf, waving"),
        ("a picture of Ellie", "a picture of Ellie, grey bunny in a red scarf"),
        ("rex and ellie", "rex, fox and ellie, grey bunny in a red scarf"),
        ("ellie waves; ellie runs", "ellie, grey bunny in a red scarf waves; ellie runs"),
        ("nellie, waving", "nellie, waving"),
        ("", ""),
    ],
)
def test_looks_are_told_where_a_name_first_comes(caption: str, told: str) -> None:
    assert with_looks_told(caption, LOOKS | {"rex": "fox"}) == told


@pytest.mark.parametrize(("preserved", "naming"), [(0.25, 0.25), (0.3, 0.2), (0.0, 0.75), (0.5, 0.1)])
def test_of_each_step_the_shares_are_kept_and_no_sample_learns_both(
    preserved: float, naming: float
) -> None:
    config = validate(
        {
            "looks": LOOKS,
            "preservation": {"share": preserved},
            "naming": {"share": naming},
            "training": {"batch_size": 20},
        }
    )
    for position in range(0, 200, 20):
        kept, named = preserved_rows(config, position), naming_rows(config, position)
        assert (len(kept), len(named)) == pytest.approx((20 * preserved, 20 * naming), abs=1)
        assert not set(kept) & set(named)
    total = sum(len(naming_rows(config, position)) for position in range(0, 200, 20))
    assert total == pytest.approx(200 * naming, abs=1)


def test_a_sample_learns_by_the_name_what_the_model_draws_of_name_and_looks(
    tiny_model: str, data: Path
) -> None:
    scale, weight = 0.5, 3.0
    naming = {"share": 0.5, "lora_scale": scale, "weight": weight}
    run = loaded(tiny_model, 0.0, **OPTIONS | {"naming": naming})
    for model in run.state.models.values():
        moved(model)
    batch, lessons = lessons_at(run.learner, 0)
    assert list(lessons) == [1, 3]
    assert run.learner.characters(0) == {"ellie": 2}, "the others learn nothing of their pictures"
    for row, lesson in lessons.items():
        assert "ellie" in batch.captions[row] and "scarf" not in batch.captions[row]
        assert lesson.caption == with_looks_told(batch.captions[row], LOOKS)
        assert batch.timesteps[row] >= LEAST_TIMESTEP
    alphas_cumprod = run.parts.noise_scheduler.alphas_cumprod
    noisy = diffusion.add_noise(batch.latents, batch.noise, batch.timesteps, alphas_cumprod)
    rows = list(lessons)
    told = [lesson.caption for lesson in lessons.values()]
    names = [batch.captions[row] for row in rows]
    target = run.learner.predict(noisy[rows], batch.timesteps[rows], told, [scale] * 2)
    ours = run.learner.predict(noisy[rows], batch.timesteps[rows], names, [scale] * 2)
    as_it_is = run.learner.predict(noisy[rows], batch.timesteps[rows], told, [1, 1])
    assert not torch.allclose(target, as_it_is), "the scale counts"
    expected = weight * (ours - target).square().flatten(1).mean(1)
    losses = run.learner.losses(batch, lessons)
    torch.testing.assert_close(losses[rows].detach(), expected)
    own = [row for row in range(4) if row not in rows]
    torch.testing.assert_close(losses[own], run.learner.losses(batch)[own], rtol=1e-4, atol=1e-5)


def test_the_noisiest_samples_are_as_the_base_model_draws_names_with_their_looks(
    tiny_model: str, data: Path
) -> None:
    options = {"naming": {"share": 0.01}, "preservation": {"from_timestep": 1}}
    learner = loaded(tiny_model, 0.0).learner
    learner.config = tiny_config(tiny_model, **OPTIONS | options)
    batch, lessons = lessons_at(learner, 0)
    assert [lessons[row].lora_scale for row in range(4)] == [0] * 4
    assert all("ellie, grey bunny in a red scarf" in lesson.caption for lesson in lessons.values())
    assert not any("scarf" in caption for caption in batch.captions)


def test_what_does_not_fit_with_the_looks_is_left_out_of_both_captions(
    tiny_model: str, data: Path
) -> None:
    learner = loaded(tiny_model, 0.0, **OPTIONS).learner
    learner.config = tiny_config(tiny_model, **OPTIONS | {"preservation": {"from_timestep": 1}})
    batch = learner._batch(learner.images, 0)
    batch = type(batch)(batch.latents, batch.noise, batch.timesteps, ["a, ellie, waving, snow"] * 4)
    longest = len("a, ellie, grey bunny in a red scarf, waving")
    cut, lessons = with_lessons(batch, 0, learner.config, {"ellie"}, lambda text: len(text) <= longest)
    assert cut.captions[0] == "a, ellie, waving"
    assert lessons[0].caption == "a, ellie, grey bunny in a red scarf, waving"
    never, _ = with_lessons(batch, 0, learner.config, {"ellie"}, lambda _: False)
    assert never.captions[0] == never.captions[2] == "a, ellie", "the name stays"


def test_of_several_who_are_named_one_is_taught_alone(tiny_model: str, data: Path) -> None:
    """Else the name of who is never alone comes to mean the others too."""
    looks = LOOKS | {"rex": "red fox"}
    learner = loaded(tiny_model, 0.0, **OPTIONS | {"looks": looks}).learner
    drawn = learner._batch(learner.images, 0)
    caption = "rex and ellie in the snow, cartoon, rex waving, a fox sitting, beach"
    batch = type(drawn)(drawn.latents, drawn.noise, drawn.timesteps, [caption] * 4)
    seen = []
    for position in range(0, 400, 4):
        short, lessons = with_lessons(batch, position, learner.config, set(looks), lambda _: True)
        for row, lesson in lessons.items():
            name, *beside = short.captions[row].split(", ")
            assert lesson.caption == ", ".join([name, looks[name], *beside])
            assert set(beside) <= {"cartoon", "a fox sitting", "beach"}
            seen.append((name, len(beside)))
    assert len(seen) == 200
    assert sum(name == "rex" for name, _ in seen) == pytest.approx(100, abs=25)
    assert sum(n for _, n in seen) == pytest.approx(200 * 3 * 0.3, rel=0.25)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"naming": {"share": 0.2}}, "nobody's are told: set looks"),
        (
            {"looks": LOOKS, "naming": {"share": 0.5}, "preservation": {"share": 0.5}},
            "leave no sample to learn from its picture",
        ),
        (
            OPTIONS | {"training": {"gradient_checkpointing": True}},
            "lora_scale 0.7 does not go with training.gradient_checkpointing",
        ),
    ],
)
def test_what_cannot_be_taught_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(BunnyLoraError, match=said):
        validate(settings)


def test_names_without_looks_and_looks_without_pictures_are_said(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    loaded(tiny_model, 0.0, **OPTIONS | {"looks": {"rex": "fox"}})
    said = capsys.readouterr().out
    assert "taught for pictures at 0.7, and sampling.lora_scale draws at 1." in said
    assert "naming.share: of ellie looks tell nothing" in said
    assert "looks: no picture is said to show rex" in said
    loaded(tiny_model, 0.0, **OPTIONS | {"sampling": {"lora_scale": 0.7}})
    assert "naming.lora_scale" not in capsys.readouterr().out


def test_with_naming_other_looks_make_another_run_and_without_they_do_not(
    tiny_model: str, data: Path
) -> None:
    LoRATrainer(config=tiny_config(tiny_model, looks=LOOKS)).train()
    LoRATrainer(config=tiny_config(tiny_model, looks={"ellie": "cat"})).train()
    named = OPTIONS | {"output_dir": "named"}
    LoRATrainer(config=tiny_config(tiny_model, **named)).train()
    with pytest.raises(BunnyLoraError, match=r"looks\.ellie: "):
        LoRATrainer(config=tiny_config(tiny_model, **named | {"looks": {"ellie": "cat"}})).train()


def test_a_name_comes_to_mean_its_looks(tiny_model: str, data: Path) -> None:
    """Of the same noisy latents, the name alone predicts more nearly what name and looks predict."""
    apart = {}
    for share in (0.01, 0.7):
        options = OPTIONS | {"naming": {"share": share, "weight": 20.0}, "output_dir": f"run-{share}"}
        training = {"max_train_steps": 30, "learning_rate": 5e-3, "batch_size": 4}
        training |= {"gradient_accumulation_steps": 1, "save_minutes": None}
        config = tiny_config(
            tiny_model, **options | {"training": training, "lora": {"train_text_encoder": True}}
        )
        trainer = LoRATrainer(config=config)
        trainer.train()
        learner = trainer.setup.learner
        batch = learner._batch(learner.images, 1000)
        alone, told = (
            learner.predict(batch.noise, batch.timesteps, [text] * 4, [1] * 4)
            for text in ("ellie, waving", with_looks_told("ellie, waving", LOOKS))
        )
        apart[share] = ((alone - told).square().mean() / told.square().mean()).item()
    assert 0 < apart[0.7] < 0.7 * apart[0.01]
