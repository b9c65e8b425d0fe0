import errno
import json
from collections import Counter
from dataclasses import asdict
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
from conftest import open_image

from bunny_lora.cli import main
from bunny_lora.errors import BunnyLoraError
from bunny_lora.world.attributes import (
    BARE_CHEST,
    EARS_OF,
    HERO_FURS,
    HEROES,
    PLACES,
    REGULARS,
    fresh_heroes,
)
from bunny_lora.world.film import heldout_frames, write_film

KEYS = {
    "frame_id",
    "frame_path",
    "composite_path",
    "characters_identified",
    "scene_description",
    "sd_caption",
    "confidence",
    "processing_time",
    "model_used",
    "local_detections",
    "llm_raw_response",
    "analyzed_at",
}


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): sha256(f.read_bytes()).hexdigest() for f in files}


def records_of(run):
    return json.loads((run / "llm_analysis" / "llm_analysis.json").read_text("utf-8"))


def truth_of(run):
    return json.loads((run / "world_truth.json").read_text("utf-8"))["frames"]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_film(tmp_path_factory.mktemp("films") / "film", size=(320, 180))


def test_a_short_film_is_byte_identical_every_time(tmp_path):
    first = write_film(tmp_path / "a", n_frames=12, seed=3, size=(320, 180))
    second = write_film(tmp_path / "b" / "c", n_frames=12, seed=3, size=(320, 180))
    other = write_film(tmp_path / "d", n_frames=12, seed=4, size=(320, 180))
    assert digest(first) == digest(second) != digest(other)
    assert sum(frame["usable"] for frame in truth_of(first)) == 12
    names = {name for r in records_of(first) for name in r["characters_identified"]}
    assert names == set(HEROES)


def test_all_keys_and_types(film):
    records = records_of(film)
    assert all(set(record) == KEYS for record in records)
    ids = [record["frame_id"] for record in records]
    assert ids == sorted(set(ids))
    for record in records:
        assert isinstance(record["local_detections"], list) and 0 <= record["confidence"] <= 1
        assert record["frame_path"].replace("\\", "/").endswith(f"frames/{record['frame_id']}.jpg")


def test_usable_frames_and_defects(film):
    truth = truth_of(film)
    assert sum(frame["usable"] for frame in truth) == 65
    assert Counter(frame["defect"] for frame in truth) == {
        "": 63,
        "long caption": 1,
        "cut-off caption": 1,
        "low confidence": 2,
        "failed call": 1,
        "missing frame": 1,
        "cut-off answer": 1,
        "nobody": 2,
    }


def test_records_are_as_usable_as_the_truth_says(film):
    for record, frame in zip(records_of(film), truth_of(film), strict=True):
        there = (film / "frames" / f"{record['frame_id']}.jpg").exists()
        assert there == (frame["defect"] not in ("failed call", "missing frame"))
        assert record["sd_caption"].startswith("{") == frame["defect"].startswith("cut-off")
        assert frame["usable"] == (
            there
            and record["confidence"] >= 0.5
            and bool(record["characters_identified"])
            and not record["scene_description"].startswith("{")
        )


def test_the_film_is_as_hard_as_a_real_one(film):
    usable = [frame for frame in truth_of(film) if frame["usable"]]
    cameras = Counter(frame["scene"]["camera"] for frame in usable)
    assert cameras["wide"] > len(usable) * 0.4
    people = [character for frame in usable for character in frame["characters"]]
    heroes = Counter(person["name"] for person in people if person["name"])
    assert set(heroes) == set(HEROES) and max(heroes.values()) >= 1.5 * min(heroes.values())
    assert not all(person["name"] for person in people)
    small = [person for person in people if person["face_box"][3] - person["face_box"][1] < 40]
    assert len(small) > 20


def test_neighbours_are_nearly_the_same(film):
    frames = [frame for frame in truth_of(film) if not frame["defect"]]
    pairs = [(first, second) for first, second in pairwise(frames) if first["scene"] == second["scene"]]
    assert len(pairs) > 20
    for pair in pairs[:5]:
        images = [open_image(film / "frames" / f"{frame['frame_id']}.jpg") for frame in pair]
        first, second = (np.asarray(image).astype(int) for image in images)
        assert 0 < np.abs(first - second).mean() < 8


def test_detections_lie_on_the_faces(film):
    n_found = 0
    for record, frame in zip(records_of(film), truth_of(film), strict=True):
        faces = [np.array(character["face_box"]) for character in frame["characters"]]
        for detection in record["local_detections"]:
            box = np.array(detection["bbox"])
            assert min(np.abs(box - face).max() for face in faces) <= 2
            n_found += 1
    assert n_found > 65


@pytest.mark.parametrize("seed", range(8))
def test_fresh_heroes_are_new_to_the_models_and_unlike_the_demos(seed):
    cast = fresh_heroes(seed)
    assert cast == fresh_heroes(seed) != fresh_heroes(seed + 1)
    assert len(cast) == 4 and not set(cast) & ({*HEROES} | {*REGULARS.values()})
    looks = {(traits.species, traits.fur) for traits in cast.values()}
    assert not looks & {(traits.species, traits.fur) for traits in HEROES.values()}
    for name in ("species", "fur", "eyes", "outfit", "mark"):
        assert len({getattr(traits, name) for traits in cast.values()}) == 4
    for traits in cast.values():
        assert traits.fur in HERO_FURS and traits.ear in EARS_OF[traits.species]
        assert traits.outfit in BARE_CHEST and "none" not in (traits.outfit, traits.mark)
        assert type(traits.species) is str and type(traits.mark) is str


def test_a_film_can_have_any_heroes(tmp_path, capsys):
    cast = fresh_heroes(1)
    film = write_film(tmp_path / "film", n_frames=12, size=(128, 72), heroes=cast)
    people = [c for frame in truth_of(film) for c in frame["characters"] if c["name"]]
    assert {person["name"] for person in people} == set(cast)
    assert all(person["traits"] == asdict(cast[person["name"]]) for person in people)
    assert heldout_frames(next(iter(cast)), 1, heroes=cast)[0].picture.characters[0].traits in (
        cast.values()
    )
    pair = dict(list(cast.items())[:1])
    alone = write_film(tmp_path / "alone", n_frames=3, size=(128, 72), heroes=pair)
    assert {n for record in records_of(alone) for n in record["characters_identified"]} == set(pair)
    with pytest.raises(BunnyLoraError, match="at least one hero"):
        write_film(tmp_path / "nobody", heroes={})
    command = ["world", "film", "--out", str(tmp_path / "again"), "--frames", "4"]
    assert main([*command, "--fresh-heroes", "1"]) == 0
    assert {n for record in records_of(tmp_path / "again") for n in record["characters_identified"]}
    assert "again" in capsys.readouterr().out


def test_a_film_can_be_drawn_in_another_style(tmp_path, capsys):
    plain, other = tmp_path / "plain", tmp_path / "other"
    for film in (plain, other):
        command = ["world", "film", "--out", str(film), "--frames", "2"]
        assert main([*command, *(["--style", "storybook"] if film == other else [])]) == 0
    pictures = [
        np.asarray(open_image(sorted((film / "frames").iterdir())[0]).convert("HSV"), dtype=float)
        for film in (plain, other)
    ]
    assert pictures[1][..., 1].mean() < 0.95 * pictures[0][..., 1].mean()
    assert [r["sd_caption"] for r in records_of(plain)] == [r["sd_caption"] for r in records_of(other)]
    sides = [
        max(c["face_box"][2] - c["face_box"][0] for f in truth_of(film) for c in f["characters"])
        for film in (plain, other)
    ]
    assert sides[1] > 1.05 * sides[0]
    assert main(["world", "film", "--out", str(tmp_path / "new"), "--style", "noir"]) == 2
    assert "plain, storybook, neon" in capsys.readouterr().err


def test_refuses_a_folder_that_is_in_use(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(BunnyLoraError, match="not empty"):
        write_film(tmp_path / "run", n_frames=4)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "notes.txt"]
    (tmp_path / "empty").mkdir()
    assert any(write_film(tmp_path / "empty", n_frames=4, size=(128, 72)).iterdir())


def test_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("bunny_lora.world.film._dump", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_film(tmp_path / "run", n_frames=1, size=(128, 72))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_in_words(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bunny_lora.world.film._dump", full)
    with pytest.raises(BunnyLoraError, match="No space left"):
        write_film(tmp_path / "run", n_frames=1, size=(128, 72))
    assert not list(tmp_path.iterdir())


def test_heldout_frames_are_new_and_show_one_hero(film):
    frames = heldout_frames("ellie", 7, seed=0)
    assert {frame.picture.scene.place for frame in frames} == set(PLACES)
    assert all(len(f.picture.characters) == 1 and len(f.faces) == 1 for f in frames)
    shown = {frame["scene"]["seed"] for frame in truth_of(film)}
    assert not shown & {frame.picture.scene.seed for frame in frames}
    with pytest.raises(BunnyLoraError, match="no hero"):
        heldout_frames("buck", 1)


def test_the_demo_asks_for_what_its_film_does_not_show(film):
    """What params/demo.yaml promises."""
    seen = {
        (character["pose"], frame["scene"]["place"])
        for frame in truth_of(film)
        for character in frame["characters"]
        if character["name"] in HEROES
    }
    assert len(seen) > 20
    assert not seen & {("sitting", "beach"), ("jumping", "forest")}
