"""The two models that judge pictures of Bunny World: reader and CLIP."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel

from bunny_lora.evaluation.features import load_feature_extractor
from bunny_lora.world import attributes
from bunny_lora.world.attributes import hero_picture
from bunny_lora.world.captions import plain_caption, vocabulary
from bunny_lora.world.pretraining.clip import (
    character_traits,
    drawn_characters,
    hue_rotation,
    hues_turned,
    pretrain_clip,
    same_hero_auc,
    view,
)
from bunny_lora.world.pretraining.reader import (
    QUESTIONS,
    load_reader,
    pretrain_reader,
    shares_right,
    single_picture,
    truth,
)

SMALL = {"size": 32, "batch_size": 4, "max_steps": 4, "evaluate_every": 2, "report": lambda _: None}
READER = SMALL | {"widths": (8, 8), "n_pictures": 20, "n_heldout": 4}
CLIP = SMALL | {"width": 16, "n_layers": 1, "n_characters": 12, "n_heldout": 3}


def test_a_reader_resumes_reads_and_is_loaded_again(tmp_path):
    whole = pretrain_reader(tmp_path / "whole", **READER)
    pretrain_reader(tmp_path / "parts", **READER, stop_at=2)
    parts = pretrain_reader(tmp_path / "parts", **READER)
    first, second = load_file(whole), load_file(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    reader = load_reader(whole)
    answers = reader.read(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    for name, known in QUESTIONS.items():
        assert answers[name].shape == (3,) and int(answers[name].max()) < len(known)


def test_the_truth_is_what_the_picture_shows():
    picture = single_picture(0, 3, camera="wide")
    (character,) = picture.characters
    assert picture.scene.camera == "wide"
    answers = [known[i] for known, i in zip(QUESTIONS.values(), truth(picture), strict=True)]
    traits = character.traits
    assert answers == [traits.species, traits.fur, picture.scene.place, character.pose, traits.outfit]


def test_nobody_is_asked_what_a_sleeper_wears():
    pictures = [single_picture(0, index) for index in range(60)]
    right = torch.tensor([truth(picture) for picture in pictures])
    asleep = torch.tensor([picture.characters[0].pose == "sleeping" for picture in pictures])
    assert 0 < asleep.sum() < 60
    answers = {name: right[:, column].clone() for column, name in enumerate(QUESTIONS)}
    answers["outfit"][asleep] += 1
    assert set(shares_right(answers, pictures).values()) == {1.0}
    answers["species"][:30] += 1
    answers["outfit"][~asleep] += 1
    shares = shares_right(answers, pictures)
    assert shares["species"] == 0.5 and shares["outfit"] == 0.0 and shares["pose"] == 1.0


def test_a_plain_caption_says_everything_that_is_asked():
    words = set(vocabulary())
    for index in range(50):
        picture = single_picture(0, index)
        (character,) = picture.characters
        said = plain_caption(picture).replace(",", "").split()
        assert set(said) <= words
        assert {character.traits.species, character.traits.fur, character.pose} <= set(said)
        assert picture.scene.place in said and (
            character.traits.outfit == "none" or character.traits.outfit in said
        )


def test_twins_differ_in_one_trait_and_no_hero_is_among_them():
    n_twins = 0
    for index in range(0, 400, 2):
        first, second = character_traits(0, index), character_traits(0, index + 1)
        assert first != second
        differences = {key for key, value in asdict(first).items() if value != asdict(second)[key]}
        n_twins += len(differences - {"mark"}) <= 1
        for traits in (first, second):
            assert traits.ear == "plain" and traits.fur in attributes.FURS
            assert traits.mark == "none" or traits.mark != attributes.HERO_MARKS.get(traits.species)
    assert 60 < n_twins < 160


def test_two_views_of_a_character_share_its_traits_alone():
    (first, _), (second, _) = view(0, 5, 0), view(0, 5, 1)
    assert first.characters[0].traits == second.characters[0].traits == character_traits(0, 5)
    assert first.scene != second.scene
    assert view(0, 5, 0)[0] == first


def test_the_clip_resumes_and_looks_at_pictures_as_evaluation_features(tmp_path):
    whole = pretrain_clip(tmp_path / "whole", **CLIP)
    pretrain_clip(tmp_path / "parts", **CLIP, stop_at=2)
    pretrain_clip(tmp_path / "parts", **CLIP)
    first, second = (
        load_file(tmp_path / name / "clip_state.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert CLIPModel.from_pretrained(whole).dtype == torch.float32
    rendering = drawn_characters(tmp_path / "whole", 12, size=32, seed=0, report=lambda _: None)
    assert rendering.shape == (12, 2, 3, 32, 32)
    image = Image.fromarray(np.ascontiguousarray(rendering[0, 0].transpose(1, 2, 0)))
    vectors = load_feature_extractor(str(whole))([image, image.rotate(180)])
    assert vectors.shape == (2, 16) and not torch.equal(vectors[0], vectors[1])


def test_families_are_recoloured_together_and_said_to_be():
    images = torch.randint(60, 196, (40, 2, 3, 4, 4), dtype=torch.uint8)
    images[:, :, :, 0, 0] = 128
    images[:, :, :, 1, 1] = torch.tensor([200, 100, 100], dtype=torch.uint8)
    after, kept = hues_turned(images, np.random.default_rng(0))
    assert torch.equal(after[kept], images[kept]) and 4 < int(kept.sum()) < 24 and kept[0]
    assert torch.equal(kept[::2], kept[1::2])
    assert (after[:, :, :, 0, 0] == 128).all()  # grey has no hue
    reds = after[:, :, :, 1, 1].view(20, 4, 3)
    assert (reds == reds[:, :1]).all() and len(reds[:, 0].unique(dim=0)) > 8
    assert ((reds.sum(2) - 400).abs() <= 2).all()


def test_a_third_of_a_turn_exchanges_the_channels():
    colours = hue_rotation(2 * np.pi / 3) @ torch.tensor([[1.0], [2.0], [3.0]])
    torch.testing.assert_close(colours.flatten(), torch.tensor([3.0, 1.0, 2.0]))
    torch.testing.assert_close(hue_rotation(0.0), torch.eye(3))


def stills(*said):
    """Pictures of heroes, each told as (hero, place, pose)."""
    found = []
    for name, place, pose in said:
        picture = hero_picture([name], 0, 0)
        character = replace(picture.characters[0], pose=pose)
        found.append(
            replace(picture, scene=replace(picture.scene, place=place), characters=(character,))
        )
    return found


def test_auc_is_the_share_of_pairs_that_come_in_the_right_order():
    pictures = stills(
        ("ellie", "snow", "waving"),
        ("ellie", "city", "sitting"),
        ("rex", "beach", "running"),
        ("rex", "desert", "jumping"),
    )
    angles = torch.tensor([0.0, 0.1, 1.0, 1.2])
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert same_hero_auc(vectors, pictures) == 1.0
    assert same_hero_auc(vectors[[0, 2, 1, 3]], pictures) == pytest.approx(2 / 8)
    assert same_hero_auc(torch.ones(4, 2), pictures) == 0.5


def test_auc_leaves_out_pairs_that_share_a_place_or_a_pose():
    pictures = stills(
        ("ellie", "snow", "waving"),
        ("ellie", "city", "sitting"),
        ("rex", "snow", "running"),
        ("rex", "desert", "sitting"),
    )
    # alike are only two of different heroes that share the place, and they do not count
    angles = torch.tensor([0.0, 0.5, 0.0, 0.5])
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert same_hero_auc(vectors, pictures) == 0.5
