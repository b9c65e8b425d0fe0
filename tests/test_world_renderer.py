from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageChops

from bunny_lora.world import attributes as world
from bunny_lora.world.attributes import Character, Picture, Scene, Traits, hero_picture
from bunny_lora.world.captions import MAX_WORDS, _words, caption, scene_description, vocabulary
from bunny_lora.world.palette import FUR
from bunny_lora.world.renderer import render, render_array, render_scene

PLAIN = Character(
    name="milo",
    traits=Traits("cat", "grey", "blue", "scarf", "red", "spot", "yellow"),
    expression="happy",
    pose="standing",
    facing="front",
    x=0.5,
    y=0.93,
    height=0.6,
    seed=7,
)
MEADOW = Scene("meadow", "day", "medium", (), 3)


def picture_of(character=PLAIN, scene=MEADOW):
    return Picture(scene, (character,), 1.0)


def pixels(character=PLAIN, scene=MEADOW, size=(128, 128)):
    return render_array(picture_of(character, scene), size).astype(int)


def test_random_pictures_are_a_function_of_seed_and_index():
    assert world.random_picture(0, 5) == world.random_picture(0, 5)
    assert world.random_picture(0, 5) != world.random_picture(0, 6)
    assert world.random_picture(0, 5) != world.random_picture(1, 5)


@pytest.mark.parametrize("size", [(128, 128), (64, 64), (640, 360)])
def test_same_picture_and_size_give_the_same_pixels(size):
    picture = world.random_picture(2, 3, aspect=size[0] / size[1])
    first, second = render(picture, size), render(picture, size)
    assert first.image.size == size and first.image.mode == "RGB"
    assert first.image.tobytes() == second.image.tobytes()


def test_random_sampling_never_meets_a_hero():
    marks = {traits.species: traits.mark for traits in world.HEROES.values()}
    seen = set()
    for index in range(3000):
        for character in world.random_picture(0, index).characters:
            traits = character.traits
            seen.add(traits.fur)
            assert traits.fur not in world.HERO_FURS
            assert traits.ear == "plain"
            assert traits.mark == "none" or traits.mark != marks.get(traits.species)
    assert seen == set(world.FURS)


def test_every_hero_has_a_fur_and_an_ear_of_its_own():
    heroes = list(world.HEROES.values())
    assert {traits.fur for traits in heroes} == set(world.HERO_FURS)
    assert len({traits.ear for traits in heroes} - {"plain"}) == len(heroes)
    for traits in heroes:
        ordinary = replace(PLAIN, traits=replace(traits, ear="plain"))
        assert (pixels(ordinary) != pixels(replace(PLAIN, traits=traits))).sum() > 60


@pytest.mark.parametrize("index", range(24))
def test_boxes_cover_what_is_drawn_and_nothing_much_more(index):
    picture = world.random_picture(11, index, aspect=16 / 9)
    picture = replace(picture, characters=picture.characters[-1:])
    size = (320, 180)
    drawn = render(picture, size)
    (x1, y1, x2, y2), face = drawn.bodies[0], drawn.faces[0]
    assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]
    assert x1 <= face[0] < face[2] <= x2 and y1 <= face[1] < face[3] <= y2
    changed = np.asarray(ImageChops.difference(drawn.image, render_scene(picture, size))).max(-1)
    rows, columns = np.nonzero(changed > 60)  # the soft shadow changes less than that
    assert columns.min() >= x1 and columns.max() < x2 and rows.min() >= y1
    inside = changed[y1:y2, x1:x2] > 8
    for edge in (inside[:, :3], inside[:, -3:], inside[:3], inside[-3:]):
        assert edge.any()  # the box is tight
    assert (changed[face[1] : face[3], face[0] : face[2]] > 8).mean() > 0.6


@pytest.mark.parametrize(
    ("change", "in_face"),
    [
        ({"expression": "angry"}, True),
        ({"expression": "laughing"}, True),
        ({"pose": "waving"}, False),
        ({"pose": "sleeping"}, False),
        ({"facing": "left"}, True),
        ({"traits": replace(PLAIN.traits, fur="brown")}, True),
        ({"traits": replace(PLAIN.traits, eyes="amber")}, True),
        ({"traits": replace(PLAIN.traits, outfit_colour="blue")}, False),
        ({"traits": replace(PLAIN.traits, mark="star")}, False),
        ({"traits": replace(PLAIN.traits, species="fox")}, True),
    ],
)
def test_every_attribute_changes_the_picture(change, in_face):
    x1, y1, x2, y2 = render(picture_of()).faces[0]
    difference = np.abs(pixels() - pixels(replace(PLAIN, **change))).max(-1) > 40
    assert difference.sum() >= 4
    assert difference[y1:y2, x1:x2].any() or not in_face


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("species", world.SPECIES),
        ("outfit", world.OUTFITS),
        ("outfit_colour", world.OUTFIT_COLOURS),
        ("mark", world.MARKS),
    ],
)
def test_all_values_of_a_trait_draw_differently(key, options):
    variants = [replace(PLAIN.traits, **{key: option}) for option in options]
    drawn = {pixels(replace(PLAIN, traits=traits)).tobytes() for traits in variants}
    assert len(drawn) == len(options)


def test_all_poses_draw_differently():
    drawn = {pixels(replace(PLAIN, pose=pose)).tobytes() for pose in world.POSES}
    assert len(drawn) == len(world.POSES)


@pytest.mark.parametrize("place", world.PLACES)
def test_places_and_details_differ(place):
    scene = Scene(place, "night" if place == "city" else "day", "wide", (), 5)
    bare = pixels(scene=scene)
    assert np.abs(bare - pixels()).mean() > 5
    for detail in world.DETAILS[place]:
        assert (np.abs(bare - pixels(scene=replace(scene, details=(detail,)))) > 30).any()


def test_night_is_darker_than_day():
    assert pixels(scene=replace(MEADOW, light="night")).mean() < pixels().mean() - 40


@pytest.mark.parametrize("name", world.HEROES)
def test_a_hero_keeps_its_colour_in_a_wide_shot(name):
    picture = hero_picture([name], 0, 1, camera="wide")
    picture = replace(picture, scene=replace(picture.scene, place="snow", light="day"))
    image = render_array(picture).astype(int)
    near = np.abs(image - FUR[world.HEROES[name].fur]).max(-1) < 24
    assert near.sum() > 60


def test_captions_stay_short_and_within_the_vocabulary():
    known = set(vocabulary())
    assert len(known) < 300
    for index in range(1500):
        picture = world.random_picture(4, index)
        text = caption(picture, index)
        assert len(_words(text)) <= MAX_WORDS
        assert set(_words(text)) | set(_words(scene_description(picture, index))) <= known
    assert set(world.HEROES) <= known


def test_captions_name_what_is_drawn_and_nothing_else():
    species = {"bunny", "rabbit", "hare", "cat", "kitten", "bear", "cub", "fox", "mouse"}
    texts = [set(_words(caption(picture_of(), seed))) for seed in range(200)]
    assert all(words & species <= {"cat", "kitten"} for words in texts)
    assert all(words & set(world.NAMES) == {"milo"} for words in texts)
    for word, least in (("meadow", 0.9), ("red", 0.8), ("standing", 0.8), ("grey", 0.3)):
        assert np.mean([word in words for words in texts]) >= least
    assert len({caption(picture_of(), seed) for seed in range(200)}) > 150


def test_captions_never_tell_a_heros_ear():
    for name in world.HEROES:
        for seed in range(50):
            words = set(_words(caption(hero_picture([name], 0, seed), seed)))
            assert name in words and not words & {"bent", "ear", "ears", "bandaged"}


def test_behind_a_character_the_background_is_out_of_focus():
    picture = picture_of()
    (x1, _, x2, _) = render(picture).bodies[0]
    columns = [x for x in range(127) if x < x1 - 8 or x > x2 + 8]

    def contrast(image):
        return np.abs(np.diff(np.asarray(image, float), axis=1))[:, columns].mean()

    assert len(columns) > 20
    assert contrast(render(picture).image) < 0.85 * contrast(
        render(replace(picture, characters=())).image
    )
