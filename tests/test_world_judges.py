"""The two models that judge pictures of Bunny World: reader and CLIP."""

import json
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
from bunny_lora.world.pretraining.data import as_rows
from bunny_lora.world.pretraining.reader import (
    faces_of,
    labels_of,
    pretrain_reader,
    reader_picture,
    shares_right,
    single_picture,
)
from bunny_lora.world.traits import LOOKS, QUESTIONS, close_up, load_reader

SMALL = {"size": 32, "batch_size": 4, "max_steps": 4, "evaluate_every": 2, "report": lambda _: None}
READER = SMALL | {"n_pictures": 20, "n_heldout": 4}
CLIP = SMALL | {"width": 16, "n_layers": 1, "n_characters": 12, "n_heldout": 3}


def test_a_reader_resumes_reads_and_is_loaded_again(tmp_path):
    whole = pretrain_reader(tmp_path / "whole", **READER)
    pretrain_reader(tmp_path / "parts", **READER, stop_at=2)
    parts = pretrain_reader(tmp_path / "parts", **READER)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    reader = load_reader(whole)
    read = reader.read(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert {name: row.shape for name, row in read.items()} == {
        name: (3, len(answers)) for name, answers in QUESTIONS.items()
    }
    for row in read.values():
        torch.testing.assert_close(row.sum(1), torch.ones(3))
    shares = json.loads((whole / "accuracy.json").read_text())
    assert shares["n_images_per_camera"] == READER["n_heldout"]
    for kind in ("renders", "reconstructions"):
        assert shares[kind].keys() == set(attributes.CAMERAS)
        assert all(0 <= share <= 1 for row in shares[kind].values() for share in row.values())


def test_a_close_up_holds_the_face_alike_from_near_and_far():
    rows = [as_rows(reader_picture(1, 2, camera), 128) for camera in attributes.CAMERAS]
    faces = faces_of(np.stack(rows))
    assert faces[0, 2] > faces[1, 2] > faces[2, 2] > 0.1
    maps = torch.from_numpy(np.stack(rows)[:, 3:]).float()
    shares = (close_up(maps, faces, LOOKS["body"]) > 2.5).float().mean((1, 2, 3))
    assert shares.min() > 0.08 and shares.max() / shares.min() < 1.2
    eyes = close_up(maps, faces, LOOKS["eyes"])
    assert (eyes[:, 0, 20, 20] > 2.5).all() and (eyes > 2.5).float().mean() > 0.4


def test_the_reader_learns_from_all_traits_half_of_them_at_a_medium_distance():
    pictures = [reader_picture(0, index) for index in range(400)]
    labels = labels_of(pictures)
    for column, answers in enumerate(QUESTIONS.values()):
        assert set(labels[:, column].tolist()) - {-100} == set(range(len(answers)))
    cameras = [picture.scene.camera for picture in pictures]
    assert 160 < cameras.count("medium") < 240 < 400 - cameras.count("wide")
    assert reader_picture(0, 3, "wide").scene.camera == "wide"


def test_nobody_is_asked_what_cannot_be_seen():
    pictures = [reader_picture(0, index) for index in range(200)]
    right = labels_of(pictures)
    read = {
        name: torch.nn.functional.one_hot(right[:, column].clamp(min=0), len(answers)).float()
        for column, (name, answers) in enumerate(QUESTIONS.items())
    }
    people = [picture.characters[0] for picture in pictures]
    asleep = torch.tensor([person.pose == "sleeping" for person in people])
    laughing = torch.tensor([person.expression == "laughing" for person in people])
    bare = torch.tensor([person.traits.outfit == "none" for person in people])
    unmarked = torch.tensor([person.traits.mark == "none" for person in people])
    for name, hidden in {
        "eyes": asleep | laughing,
        "outfit": asleep,
        "outfit_colour": asleep | bare,
        "mark_colour": unmarked,
        "species": torch.zeros(200, dtype=torch.bool),
    }.items():
        assert torch.equal(right[:, list(QUESTIONS).index(name)] == -100, hidden), name
        read[name][hidden] = read[name][hidden].roll(1, dims=1)
    assert set(shares_right(read, pictures).values()) == {1.0}
    read["species"][:100] = read["species"][:100].roll(1, dims=1)
    read["outfit"][~asleep] = read["outfit"][~asleep].roll(1, dims=1)
    shares = shares_right(read, pictures)
    assert shares["species"] == 0.5 and shares["outfit"] == 0.0 and shares["pose"] == 1.0


def test_a_plain_caption_says_everything_that_is_asked():
    words = set(vocabulary())
    for index in range(50):
        picture = single_picture(0, index)
        (character,) = picture.characters
        said = plain_caption(picture).replace(",", "").split()
        assert set(said) <= words
        traits = character.traits
        assert {traits.species, traits.fur, traits.eyes, character.pose} <= set(said)
        assert picture.scene.place in said and (traits.outfit == "none" or traits.outfit in said)


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
