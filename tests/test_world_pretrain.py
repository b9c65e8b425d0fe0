import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from bunny_lora.errors import BunnyLoraError
from bunny_lora.world.attributes import (
    FURS,
    HEROES,
    REGULAR_LOOKS,
    REGULARS,
    SPECIES,
    random_picture,
)
from bunny_lora.world.captions import vocabulary
from bunny_lora.world.pretraining.data import as_rows, drawn_pictures, to_unit
from bunny_lora.world.pretraining.latents import encode, encoded_pictures
from bunny_lora.world.pretraining.learner import TrainState, learning_rate
from bunny_lora.world.pretraining.lessons import (
    importance,
    lesson_picture,
    lesson_rows,
    training_caption,
)
from bunny_lora.world.pretraining.pairs import (
    EYES_WEIGHT,
    N_EYES,
    Pairs,
    eye_differences,
    with_other_eyes,
)
from bunny_lora.world.pretraining.sd import build_scheduler, pretrain_sd
from bunny_lora.world.pretraining.tokenizer import build_tokenizer, save_tokenizer
from bunny_lora.world.pretraining.vae import channels_exchanged, crops, pretrain_vae

TINY_VAE = {
    "size": 32,
    "channels": (8, 8, 8, 8),
    "batch_size": 2,
    "max_steps": 5,
    "n_pictures": 20,
    "n_heldout": 4,
    "report": lambda _: None,
}


def state_of(folder, name):
    return load_file(folder / name)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_rate_rises_and_falls_to_zero():
    rates = [learning_rate(step, 3000, 1.0) for step in range(3000)]
    assert rates[0] < 0.01 and rates[900] == 1.0 and rates[-1] < 0.01
    assert max(rates) == 1.0


def test_pictures_are_drawn_once_and_completed_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr("bunny_lora.world.pretraining.data._BLOCK", 2)
    monkeypatch.setattr("bunny_lora.world.pretraining.data._SAVE_EVERY", 1)
    whole = np.array(drawn_pictures(tmp_path, 6, size=32, report=lambda _: None))
    assert whole.shape == (6, 4, 32, 32)
    assert np.array_equal(whole[5], as_rows(random_picture(0, 5), 32))
    assert set(np.unique(whole[:, 3])) == {1, 2, 3}
    interrupt(tmp_path / "pictures", n_rows_done=2)
    assert np.array_equal(drawn_pictures(tmp_path, 6, size=32, report=lambda _: None), whole)
    others = drawn_pictures(tmp_path, 6, size=32, seed=1, report=lambda _: None)
    assert not np.array_equal(others, whole)


def interrupt(stem, n_rows_done):
    """Make an array look like one whose filling was interrupted."""
    progress = json.loads(stem.with_suffix(".json").read_text())
    stem.with_suffix(".json").write_text(json.dumps(progress | {"n_rows_done": n_rows_done}))
    torn = np.lib.format.open_memmap(stem.with_suffix(".npy"), "r+")
    torn[n_rows_done:] = 0
    torn.flush()


def test_every_second_crop_lies_around_a_character():
    pictures = np.ones((2, 4, 16, 16), np.uint8)
    pictures[:, :3] = np.random.default_rng(1).integers(256, size=(2, 3, 16, 16))
    pictures[:, 3, 10, 5] = 3
    squares = crops(pictures, 4, 60, np.random.default_rng(0)).numpy()
    assert squares.shape == (60, 4, 4, 4)
    assert (squares[1::2, 3] == 3).any(axis=(1, 2)).all()
    assert (squares[::2, 3] == 3).any(axis=(1, 2)).mean() < 0.3
    windows = np.lib.stride_tricks.sliding_window_view(pictures, (4, 4), axis=(2, 3))
    known = {windows[i, :, y, x].tobytes() for i in range(2) for y in range(13) for x in range(13)}
    assert {square.tobytes() for square in squares} <= known


def test_every_fourth_picture_gets_its_colours_exchanged():
    rows = torch.from_numpy(np.random.default_rng(0).integers(256, size=(400, 4, 2, 2), dtype=np.uint8))
    before = rows.clone()
    after = channels_exchanged(rows, np.random.default_rng(0))
    changed = (after != before).flatten(1).any(1)
    assert torch.equal(rows, before) and not changed.view(-1, 4)[:, 1:].any()
    assert 0.7 < changed[::4].float().mean() < 0.95
    assert torch.equal(after[:, :3].sort(1).values, before[:, :3].sort(1).values)
    assert torch.equal(after[:, 3], before[:, 3])


def test_both_optimisers_learn_and_average(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"layer": torch.nn.Linear(4, 4), "token_embedding": torch.nn.Embedding(3, 4)}
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = TrainState(model, {})
    for _ in range(3):
        state.update(model["layer"](model["token_embedding"].weight).square().mean(), 0.01)
    after = dict(model.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before)
    with state.averaged():
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    state.save(tmp_path / "state.safetensors")
    kinds = {name.split(".", 1)[0] for name in load_file(tmp_path / "state.safetensors")}
    assert kinds == {"model", "ema", "momentum_buffer", "exp_avg", "exp_avg_sq"}


def test_without_muon_all_is_left_to_adamw(tmp_path):
    file = tmp_path / "state.safetensors"
    for _ in range(2):
        torch.manual_seed(0)
        state = TrainState(torch.nn.Linear(4, 4), {}, muon=False)
        before = state.model.weight.detach().clone()
        state.load(file)
        state.update(state.model(torch.ones(1, 4)).square().sum(), 0.01)
        state.save(file)
        assert not torch.equal(state.model.weight, before)
    kept = load_file(file)
    assert {name.split(".", 1)[0] for name in kept} == {"model", "ema", "exp_avg", "exp_avg_sq"}
    assert state.step == 2


def test_training_saves_and_pauses_at_its_times_and_at_the_end(tmp_path):
    def run(name, **options):
        torch.manual_seed(0)
        state = TrainState(torch.nn.Linear(2, 2), {})
        saved, asked, pauses = [], [], []
        save, state.save = state.save, lambda path: (saved.append(state.step), save(path))

        def loss_of(step):
            asked.append(step)
            return state.model(torch.full((1, 2), 1.0 + step)).sum()

        fixed = {"max_steps": 7, "peak_rate": 0.1, "images_per_step": 2, "evaluate_every": 3}
        for progress in state.train(loss_of, tmp_path / name, **fixed, **options):
            pauses.append((state.step, len(progress.losses)))
            assert progress.images_per_sec > 0
            mean = sum(float(loss) for loss in progress.losses) / len(progress.losses)
            assert progress.mean_loss == mean
        return asked, saved, pauses

    whole = run("whole", save_every=2)
    assert whole == (list(range(7)), [2, 4, 6, 7], [(3, 3), (6, 3), (7, 1)])
    assert run("parts", stop_at=4) == ([0, 1, 2, 3], [3, 4], [(3, 3), (4, 1)])
    assert run("parts") == ([4, 5, 6], [6, 7], [(6, 2), (7, 1)])
    assert run("parts") == ([], [], [])
    assert same(load_file(tmp_path / "whole"), load_file(tmp_path / "parts"))


def test_vae_training_resumes_as_if_never_stopped(tmp_path):
    pretrain_vae(tmp_path / "whole", **TINY_VAE)
    pretrain_vae(tmp_path / "parts", **TINY_VAE, stop_at=2)
    folder = pretrain_vae(tmp_path / "parts", **TINY_VAE)
    name = "vae_state.safetensors"
    assert same(state_of(tmp_path / "whole", name), state_of(tmp_path / "parts", name))
    vae = AutoencoderKL.from_pretrained(folder)
    assert vae.config.latent_channels == 4 and vae.config.scaling_factor > 0
    latents = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode()
    assert latents.shape == (1, 4, 4, 4)


def test_other_settings_are_refused(tmp_path):
    pretrain_vae(tmp_path, **TINY_VAE, stop_at=1)
    with pytest.raises(BunnyLoraError, match="other settings"):
        pretrain_vae(tmp_path, **TINY_VAE, seed=1)


TINY_SD = {
    "channels": (32, 32, 32),
    "batch_size": 2,
    "max_steps": 4,
    "n_pictures": 20,
    "size": 32,
    "n_sample_steps": 2,
    "report": lambda _: None,
}


@pytest.fixture(scope="module")
def vae_dir(tmp_path_factory):
    return pretrain_vae(tmp_path_factory.mktemp("vae"), **TINY_VAE, stop_at=1)


def test_every_word_is_one_token_and_new_words_still_tokenize(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.model_max_length == 32
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    ids = [tokenizer(word).input_ids for word in vocabulary()]
    assert all(len(row) == 3 and row[0] == start and row[2] == end for row in ids)
    assert len({row[1] for row in ids}) == len(ids)
    assert tokenizer("A Grey RABBIT").input_ids == tokenizer("a grey rabbit").input_ids
    strange = tokenizer("zaphod émigré 42")
    assert end not in strange.input_ids[:-1]
    assert tokenizer.decode(strange.input_ids, skip_special_tokens=True) == "zaphod émigré 4 2"


def test_training_captions_drop_out_and_call_people_names():
    picture = next(
        p
        for p in (random_picture(0, i) for i in range(99))
        if [bool(c.name) for c in p.characters] == [True]
    )
    traits = picture.characters[0].traits
    texts = [training_caption(picture, 0, step, 0) for step in range(600)]
    assert texts[3] == training_caption(picture, 0, 3, 0)
    said = [text for text in texts if text]
    assert 0.05 < 1 - len(said) / len(texts) < 0.15
    names = [text.split(", ")[0] for text in said]
    regular = REGULARS[traits.species, traits.fur]
    assert 0.8 < names.count(regular) / len(said) < 0.9, "most often, who it always is"
    assert len(set(names)) > 60, "names made up on the spot"
    assert not set(names) & set(HEROES), "a LoRA has to bring them to life"
    untold = [text for name, text in zip(names, said, strict=True) if f"{traits.fur} " not in text]
    assert len(untold) / len(said) < 0.1, "who is not in a regular's whole look is described"


def test_half_of_the_lessons_show_regulars_in_their_whole_look_which_may_go_unsaid():
    pictures = [lesson_picture(0, index) for index in range(300)]
    assert pictures[3] == lesson_picture(0, 3) != lesson_picture(1, 3)
    whole = [p for p in pictures if all(REGULAR_LOOKS.get(c.name) == c.traits for c in p.characters)]
    assert 0.4 < len(whole) / len(pictures) < 0.6
    assert {len(p.characters) for p in whole} == {1, 2}
    (picture,) = [p for p in whole if len(p.characters) == 1][:1]
    (character,) = picture.characters
    said = [text for step in range(300) if (text := training_caption(picture, 0, step, 0))]
    assert all(character.name in text for text in said)
    unsaid = [text for text in said if character.traits.species not in text]
    assert 0.3 < len(unsaid) / len(said) < 0.7


def test_eyes_and_marks_count_most_and_the_background_least():
    index = next(i for i in range(99) if lesson_rows(0, i, 64)[3].max() == 4)
    rows = lesson_rows(0, index, 64)
    plain = as_rows(lesson_picture(0, index), 64)
    assert np.array_equal(rows[:3], plain[:3])
    details = rows[3] == 4
    assert 0 < details.mean() < 0.1 and (plain[3][details] > 1).all()
    weights = importance(torch.from_numpy(rows[3:]), 8)[0]
    assert weights.min() == 1 and weights.max() > 20


def test_pairs_know_what_other_eyes_change(tmp_path, vae_dir):
    shown = {"size": 32, "draw": lesson_rows, "name": "lessons", "report": lambda _: None}
    pictures = drawn_pictures(tmp_path, 20, **shown)
    latents = encoded_pictures(tmp_path, vae_dir, pictures, report=lambda _: None)
    moved = eye_differences(tmp_path, vae_dir, pictures, latents, report=lambda _: None)
    pairs = Pairs.of(0, latents, moved)
    assert len(pairs.with_eyes) and len(pairs.regulars)
    for index in pairs.with_eyes:
        picture = lesson_picture(0, int(index))
        other = with_other_eyes(picture, 0, int(index))
        (before,), (after,) = picture.characters, other.characters
        assert before.traits.eyes != after.traits.eyes
        assert replace(after, traits=before.traits) == before
        image = to_unit(torch.from_numpy(as_rows(other, 32)[None, :3]))
        vae = AutoencoderKL.from_pretrained(vae_dir)
        assert np.allclose(latents[index] - moved[index], encode(vae, image)[0], atol=0.1)
    several = [i for i in range(20) if len(lesson_picture(0, i).characters) > 1]
    assert not moved[several].any()


class _Obedient(torch.nn.Module):
    """Predicts latents that differ by words alone, as they should or not at all."""

    def __init__(self, moved: torch.Tensor, alphas_cumprod: torch.Tensor, share: float) -> None:
        super().__init__()
        self.moved, self.alphas_cumprod, self.share = moved, alphas_cumprod, share
        self.calls = 0

    def forward(self, noisy, timesteps, states):
        self.calls += 1
        s = (1 - self.alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1)
        first = self.calls == 1
        prediction = torch.zeros_like(noisy)
        if first:
            prediction[: len(self.moved)] = -self.share * self.moved / s[: len(self.moved)]
        return SimpleNamespace(sample=prediction)


@pytest.mark.parametrize(("share", "loss"), [(1.0, 0.0), (0.0, EYES_WEIGHT), (0.5, EYES_WEIGHT / 4)])
def test_words_for_eyes_should_move_latents_by_their_difference(share, loss):
    index = next(i for i in range(99) if len(lesson_picture(0, i).characters) == 1)
    latents = np.zeros((index + 1, 4, 4, 4), np.float16)
    differences = np.ones_like(latents)
    alone = np.array([index])
    pairs = Pairs(0, latents, differences, alone, alone)
    alphas_cumprod = build_scheduler().alphas_cumprod
    models = {
        "unet": _Obedient(torch.ones(N_EYES, 4, 4, 4), alphas_cumprod, share),
        "text_encoder": lambda tokens: SimpleNamespace(last_hidden_state=tokens.float()[..., None]),
    }
    got = pairs.loss(models, build_tokenizer(), alphas_cumprod, 0, 0)
    assert float(got) == pytest.approx(loss, abs=1e-6)


def test_each_look_has_one_regular_and_no_hero_is_one():
    assert len(REGULARS) == len(SPECIES) * len(FURS) == len(set(REGULARS.values()))
    assert not set(REGULARS.values()) & set(HEROES)


def test_latents_are_encoded_once_and_completed_after_an_interruption(tmp_path, vae_dir, monkeypatch):
    monkeypatch.setattr("bunny_lora.world.pretraining.data._SAVE_EVERY", 1)
    pictures = drawn_pictures(tmp_path, 10, size=32, report=lambda _: None)
    options = {"batch_size": 4, "report": lambda _: None}
    whole = np.array(encoded_pictures(tmp_path, vae_dir, pictures, **options))
    assert whole.shape == (10, 4, 4, 4) and whole.std() > 0
    interrupt(tmp_path / "latents", n_rows_done=4)
    assert np.array_equal(encoded_pictures(tmp_path, vae_dir, pictures, **options), whole)


@pytest.mark.parametrize(("part", "is_encoded_again"), [("decoder", False), ("encoder", True)])
def test_latents_stay_until_the_encoder_changes(tmp_path, vae_dir, part, is_encoded_again):
    pictures = drawn_pictures(tmp_path, 4, size=32, report=lambda _: None)
    encoded_pictures(tmp_path, vae_dir, pictures, report=lambda _: None)
    file = shutil.copytree(vae_dir, tmp_path / "vae") / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights[f"{part}.conv_in.bias"] += 1
    save_file(weights, file)
    heard = []
    encoded_pictures(tmp_path, file.parent, pictures, report=heard.append)
    assert bool(heard) == is_encoded_again


@pytest.fixture(scope="module")
def whole_sd(tmp_path_factory, vae_dir):
    """A folder in which training went through without a stop, and its pipeline's."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(vae_dir, folder / "vae")
    return folder, pretrain_sd(folder, **TINY_SD)


def test_sd_training_resumes_as_if_never_stopped(tmp_path, vae_dir, whole_sd):
    shutil.copytree(vae_dir, tmp_path / "parts" / "vae")
    pretrain_sd(tmp_path / "parts", **TINY_SD, stop_at=2)
    folder = pretrain_sd(tmp_path / "parts", **TINY_SD)
    name = "sd_state.safetensors"
    assert same(state_of(whole_sd[0], name), state_of(tmp_path / "parts", name))
    assert (tmp_path / "parts" / "samples" / "000004.png").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a grey rabbit", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all()


def test_sd_training_learns_on_from_an_earlier_one(tmp_path, vae_dir, whole_sd):
    second = tmp_path / "second"
    shutil.copytree(vae_dir, second / "vae")
    trained = whole_sd[1]
    heard = []
    options = TINY_SD | {"report": heard.append, "start_from": trained, "peak_rate": 0.0}
    pretrain_sd(second, **options, stop_at=2)
    kept = state_of(second, "sd_state.safetensors")
    weights = load_file(trained / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(kept[f"model.unet.{name}"], w.float()) for name, w in weights.items())
    pretrain_sd(second, **options, stop_at=3)
    with pytest.raises(BunnyLoraError, match="other settings"):
        pretrain_sd(second, **(options | {"start_from": None}))
    with pytest.raises(BunnyLoraError, match="another shape"):
        pretrain_sd(tmp_path / "third", **(options | {"channels": (32, 32, 64)}))


def test_a_decoder_learns_on_while_its_encoder_stays(tmp_path, monkeypatch):
    trained = pretrain_vae(tmp_path / "first", **TINY_VAE)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"scaling_factor": 9.0}))
    options = TINY_VAE | {"start_from": trained}
    sides = []
    monkeypatch.setattr(
        "bunny_lora.world.pretraining.vae.crops",
        lambda rows, side, *rest: sides.append(side) or crops(rows, side, *rest),
    )
    pretrain_vae(tmp_path / "parts", **options, stop_at=2)
    folders = [trained, *(pretrain_vae(tmp_path / name, **options) for name in ("parts", "whole"))]
    first, parts, whole = (load_file(f / "diffusion_pytorch_model.safetensors") for f in folders)
    assert same(parts, whole)
    assert set(sides) == {TINY_VAE["size"]}, "whole pictures alone"
    for name, weight in first.items():
        is_kept = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(weight, whole[name]) == is_kept, name
    configs = [(folder / "config.json").read_text() for folder in folders]
    assert [json.loads(text)["scaling_factor"] for text in configs[1:]] == [9.0, 9.0]
    with pytest.raises(BunnyLoraError, match="another shape"):
        pretrain_vae(tmp_path / "third", **(options | {"channels": (16, 8, 8, 8)}))


def test_what_cannot_be_started_from_is_refused_in_words(tmp_path, capsys):
    from bunny_lora.cli import main

    command = ["world", "pretrain", "clip", "--out", str(tmp_path), "--start-from", str(tmp_path)]
    assert main(command) == 2
    assert "pretrain sd" in capsys.readouterr().err
    with pytest.raises(BunnyLoraError, match="There is no AutoencoderKL in"):
        pretrain_vae(tmp_path, **TINY_VAE, start_from=tmp_path)
