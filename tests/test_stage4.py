"""Reading a source: what is used, what is left out, and with which reason."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bunny_lora.data.captions import name_first
from bunny_lora.data.frames import Source
from bunny_lora.data.images import open_rgb
from bunny_lora.errors import BunnyLoraError
from bunny_lora.stage4 import find_source, read_source

CAPTION = "rex, a small green dinosaur in the rain"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A project of its own for every test."""
    root = tmp_path / "project"
    (root / "outputs").mkdir(parents=True)
    monkeypatch.setenv("BUNNY_LORA_ROOT", str(root))
    monkeypatch.chdir(root)
    return root


def film_run() -> Path:
    """The real run beside the checkout, or wherever BUNNY_LORA_FILM_RUN says."""
    places = [folder / "shared/data/big_buck_bunny_run" for folder in Path(__file__).resolve().parents]
    if override := os.environ.get("BUNNY_LORA_FILM_RUN"):
        places = [Path(override)]
    found = next((place for place in places if place.is_dir()), None)
    return found or pytest.skip("the film run is not on this machine")


def picture(path: Path, size=(64, 48), color="green", **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **save)
    return path


def entry(frame="frames/frame_1.jpg", **changes) -> dict:
    record = {
        "frame_id": Path(str(frame).replace("\\", "/")).stem,
        "frame_path": frame,
        "characters_identified": ["rex"],
        "scene_description": "A green dinosaur in the rain",
        "sd_caption": CAPTION,
        "confidence": 0.9,
        "model_used": "a-model",
        "local_detections": [{"bbox": [1, 2, 3, 4], "confidence": 0.5}],
    }
    return record | changes


def write_run(folder: Path, entries) -> Path:
    path = folder / "llm_analysis" / "llm_analysis.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def read(root: Path, *entries, **kw) -> Source:
    """Read a run `outputs/run` of these entries, with one good picture that `entry()` names."""
    run = root / "outputs" / "run"
    picture(run / "frames" / "frame_1.jpg")
    return read_source(write_run(run, list(entries)), **kw)


def only_reason(source: Source) -> str:
    assert source.frames == []
    return source.dropped[0].reason


def kinds(source: Source) -> list[str]:
    return [item.reason.partition(":")[0] for item in source.dropped]


# --- the real run


def test_film_run_has_the_stated_outcome():
    source = read_source(film_run())
    assert (len(source.frames) + len(source.dropped), len(source.frames)) == (84, 76)
    (rescued,) = [frame for frame in source.frames if frame.rescued]
    assert rescued.caption.startswith("buck, A huge grey rabbit")
    expected = ["cut-off JSON", "failed call", *["low confidence"] * 5, "missing frame"]
    assert sorted(kinds(source)) == expected
    assert sum(item.path is None for item in source.dropped) == 2


# --- finding


def test_auto_takes_the_newest_run_and_never_the_demo(root):
    old = write_run(root / "outputs" / "b_old", [entry()])
    new = write_run(root / "outputs" / "a_new", [entry()])
    demo = write_run(root / "outputs" / "demo" / "film", [entry()])
    (root / "outputs" / "lora_weights").mkdir()
    os.utime(old, (1, 1))
    os.utime(new, (2, 2))
    assert find_source() == new
    assert find_source("bunny-world") == demo


@pytest.mark.parametrize("name", ["run", "outputs/run", "outputs/run/llm_analysis/llm_analysis.json"])
def test_a_run_by_name_folder_or_file(root, name):
    path = write_run(root / "outputs" / "run", [entry()])
    assert find_source(name) == path
    assert find_source(str(path.parent.parent)) == path


def test_a_plain_folder_is_found_from_the_working_folder(tmp_path, monkeypatch):
    picture(tmp_path / "elsewhere" / "mine" / "a.jpg")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_source("mine") == tmp_path / "elsewhere" / "mine"


def test_nothing_to_find_says_where_was_looked(root):
    with pytest.raises(BunnyLoraError, match=r"outputs/\*/llm_analysis.*under .*project"):
        find_source()
    with pytest.raises(BunnyLoraError, match="not drawn yet"):
        find_source("bunny-world")


def test_an_unknown_name_lists_the_runs_and_the_nearest(root):
    write_run(root / "outputs" / "episode_1", [entry()])
    with pytest.raises(
        BunnyLoraError, match=r"Did you mean episode_1\?.*Runs under outputs/: episode_1"
    ):
        find_source("episode1")
    (root / "empty").mkdir()
    with pytest.raises(BunnyLoraError, match="No source 'empty'"):
        find_source("empty")


# --- the JSON as a whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off"),
        (b'[{"frame_id": "a"', "cut off"),
        (b"[]", "empty list"),
        (b"{}", "holds a dict"),
        (b'["caf\xe9"]', "not UTF-8"),
        (b"[" * 100_000, "cut off"),
    ],
    ids=["nothing", "cut off", "empty", "object", "latin-1", "deep"],
)
def test_unreadable_json_is_the_users_error(root, content, message):
    path = write_run(root / "outputs" / "run", [])
    path.write_bytes(content)
    with pytest.raises(BunnyLoraError, match=message):
        read_source(path)


def test_byte_order_mark_is_read_over(root):
    path = write_run(root / "outputs" / "run", [])
    picture(root / "outputs" / "run" / "frames" / "frame_1.jpg")
    path.write_text(json.dumps([entry()]), encoding="utf-8-sig")
    assert len(read_source(path).frames) == 1


# --- one entry


def test_a_good_entry(root):
    (frame,) = read(root, entry()).frames
    assert (frame.frame_id, frame.caption, frame.characters) == ("frame_1", CAPTION, ("rex",))
    assert (frame.confidence, frame.rescued, frame.size) == (0.9, False, (64, 48))
    assert frame.faces == ((1, 2, 3, 4),)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_used": "error", "confidence": 0}, "failed call"),
        ({"sd_caption": "Analysis failed: 429"}, "failed call"),
        ({"confidence": 0.37}, "low confidence: 0.37 < 0.5"),
        ({"confidence": None}, "low confidence: 0.0 < 0.5"),
        ({"sd_caption": " \n"}, "no caption"),
        ({"sd_caption": None}, "no caption"),
        ({"sd_caption": "a frame"}, "short caption: 'a frame'"),
        ({"sd_caption": '{"a', "scene_description": '{"b'}, "cut-off JSON"),
        ({"sd_caption": '{"a', "scene_description": ""}, "cut-off JSON"),
        ({"sd_caption": ["a", "b"]}, "invalid entry: sd_caption"),
        ({"confidence": float("nan")}, "invalid entry: confidence"),
        ({"confidence": 10**400}, "invalid entry: confidence"),
        ({"confidence": 90}, "invalid entry: confidence"),
    ],
)
def test_a_bad_entry_is_dropped_with_its_reason_and_its_picture(root, changes, reason):
    source = read(root, entry(**changes))
    assert only_reason(source).startswith(reason)
    assert source.dropped[0].path == root / "outputs" / "run" / "frames" / "frame_1.jpg"


def test_harmless_types_are_coerced(root):
    boxes = [{"bbox": "x"}, {"bbox": [0, 0, 1, float("inf")]}, {"bbox": [0, 0, 1, 1]}]
    odd = entry(
        confidence="0.75",
        frame_id=12,
        characters_identified="Ellie, PHIL,ellie",
        local_detections=[None, *boxes],
    )
    (frame,) = read(root, odd).frames
    assert (frame.confidence, frame.frame_id) == (0.75, "12")
    assert (frame.characters, frame.faces) == (("ellie", "phil"), ((0, 0, 1, 1),))


def test_text_is_tidied_but_keeps_emoji_and_right_to_left(root):
    messy = entry(
        sd_caption="re\x00x,\n a 🦖 \u202eאבגד \ud83d wet  day", characters_identified=["re\nx", None]
    )
    (frame,) = read(root, messy).frames
    assert frame.caption == "rex, a 🦖 \u202eאבגד wet day"
    assert frame.characters == ("re x",)


@pytest.mark.parametrize("cut_off", ['{"sd_caption": "rex', '```json {"sd'])
def test_cut_off_json_is_rescued_with_the_absent_names_in_front(root, cut_off):
    changes = {"sd_caption": cut_off, "characters_identified": ["rex", "ellie"]}
    (frame,) = read(root, entry(scene_description="Ellie rides a trex home", **changes)).frames
    assert frame.rescued
    assert frame.caption == "rex, Ellie rides a trex home"


def test_a_frame_of_nobody_is_kept(root):
    (frame,) = read(root, entry(characters_identified=[])).frames
    assert frame.characters == ()


def test_entries_that_are_no_objects_are_dropped(root):
    source = read(root, None, 3, "x", [], {}, entry())
    assert len(source.frames) == 1
    assert [item.frame_id for item in source.dropped] == [f"entry {n}" for n in range(1, 6)]


def test_the_same_picture_twice_keeps_the_first_good_one(root):
    again = entry("frames/../frames/frame_1.jpg", frame_id="again")
    source = read(root, entry(model_used="error"), entry(), again)
    assert kinds(source) == ["failed call", "listed twice"]
    assert "frame_1" in source.dropped[1].reason


def test_the_digest_follows_text_and_pictures(root):
    first = read(root, entry())
    assert read(root, entry()).digest == first.digest
    assert read(root, entry(sd_caption=CAPTION + "!")).digest != first.digest
    path = write_run(root / "outputs" / "run", [entry()])
    assert read_source(path).digest == first.digest
    picture(first.frames[0].path, color="red")
    assert read_source(path).digest != first.digest


# --- where the frames are


@pytest.mark.parametrize(
    "recorded",
    [
        "frame_1.jpg",
        "frames/frame_1.jpg",
        "frames\\frame_1.jpg",
        "outputs/run/frames/frame_1.jpg",
        "pipeline_data/sprite/frames/frame_1.jpg",
        "C:\\Users\\somebody\\bunny\\outputs\\run\\frames\\frame_1.jpg",
        "\\\\server\\share\\frames\\frame_1.jpg",
        "/home/somebody/bunny/outputs/run/frames/frame_1.jpg",
        "D:/elsewhere/frame_1.jpg",
    ],
)
def test_a_frame_of_a_moved_run_is_found(root, recorded):
    (frame,) = read(root, entry(recorded)).frames
    assert frame.path == root / "outputs" / "run" / "frames" / "frame_1.jpg"


@pytest.mark.parametrize("before", ["", "Z:\\x\\"])
def test_a_path_from_the_pipelines_working_folder(root, before):
    there = picture(root / "pipeline_data" / "sprite" / "frames" / "frame_7.jpg")
    assert read(root, entry(before + "pipeline_data/sprite/frames/frame_7.jpg")).frames[0].path == there


def test_a_deep_file_is_found_by_the_longest_tail_unless_two_are_alike(root):
    run = root / "outputs" / "run"
    right = picture(run / "deep" / "cam_b" / "frame_9.jpg")
    picture(run / "deep" / "cam_a" / "frame_9.jpg")
    assert read(root, entry("D:\\film\\cam_b\\frame_9.jpg")).frames[0].path == right
    assert only_reason(read(root, entry("D:\\film\\cam_c\\frame_9.jpg"))).startswith("missing frame")


def test_a_missing_frame_is_named_without_the_path_of_somebodys_home(root):
    source = read(root, entry("/home/somebody/frames/frame_9.jpg"))
    assert only_reason(source) == "missing frame: frames/frame_9.jpg"
    assert source.dropped[0].path is None


@pytest.mark.parametrize("how", ["dots", "absolute", "symlink"])
def test_pictures_outside_are_never_read(root, tmp_path, how):
    secret = picture(tmp_path / "secret" / "private.jpg")
    recorded = {"dots": "../../../secret/private.jpg", "absolute": str(secret), "symlink": "link.jpg"}
    link = root / "outputs" / "run" / "link.jpg"
    link.parent.mkdir(parents=True)
    link.symlink_to(secret)
    source = read(root, entry(recorded[how]))
    assert only_reason(source).startswith("outside the project and the run folder")
    assert source.dropped[0].path is None


# --- pictures


def test_broken_pictures_are_left_out(root):
    frames = root / "outputs" / "run" / "frames"
    whole = picture(frames / "whole.jpg", size=(300, 300)).read_bytes()
    (frames / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (frames / "zero.jpg").write_bytes(b"")
    (frames / "text.jpg").write_text("not a picture")
    (frames / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    Image.new("F", (64, 64)).save(frames / "float.tiff")
    names = ["cut.jpg", "zero.jpg", "text.jpg", "script.eps", "float.tiff"]
    source = read(root, *(entry(f"frames/{name}") for name in names))
    assert source.frames == []
    for name, item in zip(names, source.dropped, strict=True):
        assert item.reason.startswith(f"broken image: {name}")
        assert item.path is None


@pytest.mark.parametrize(
    ("size", "reason"),
    [((31, 40), "under 32 px"), ((320, 79), "over 4 times"), ((20_001, 40), "over 20000 px")],
)
def test_absurd_sizes_are_left_out(root, size, reason):
    picture(root / "outputs" / "run" / "odd.png", size)
    assert reason in only_reason(read(root, entry("odd.png")))


def test_decompression_bombs_are_left_out(root):
    path = root / "outputs" / "run" / "bomb.png"
    path.parent.mkdir(parents=True)
    Image.new("1", (15_000, 15_000)).save(path)
    assert only_reason(read(root, entry("bomb.png"))).startswith("absurd image")


def test_every_kind_of_picture_becomes_upright_rgb(tmp_path):
    sixteen = np.full((40, 40), 32_768, np.uint16)
    red, blue = (Image.new("RGB", (40, 40), color) for color in ("red", "blue"))
    cases = {
        "grey16.png": (Image.fromarray(sixteen), {}, (128, 128, 128)),
        "grey.png": (Image.new("L", (40, 40), 77), {}, (77, 77, 77)),
        "alpha.png": (Image.new("RGBA", (40, 40), (9, 9, 9, 0)), {}, (255, 255, 255)),
        "palette.png": (Image.new("P", (40, 40), 0), {"transparency": 0}, (255, 255, 255)),
        "moving.gif": (red, {"save_all": True, "append_images": [blue]}, (255, 0, 0)),
        "cmyk.jpg": (Image.new("CMYK", (40, 40), (0, 0, 0, 0)), {}, (255, 255, 255)),
    }
    for name, (image, options, expected) in cases.items():
        image.save(tmp_path / name, **options)
        opened = open_rgb(tmp_path / name)
        assert (opened.mode, opened.getpixel((20, 20))) == ("RGB", expected), name


def test_sizes_are_those_of_the_upright_picture(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(root / "outputs" / "run" / "turned.jpg", (64, 48), exif=exif)
    assert read(root, entry("turned.jpg")).frames[0].size == (48, 64)


# --- plain folders


def test_a_folder_with_metadata_text_files_and_neither(root):
    folder = root / "mine"
    for name in ("a.jpg", "b.png", "c.jpg", "sub/a.jpg"):
        picture(folder / name)
    rows = [
        {"file_name": "a.jpg", "text": "ellie, forest"},
        {"file_name": "sub/a.jpg", "text": "x", "n": 1},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nrubbish\n")
    (folder / "b.txt").write_text("phil,\nrunning\n", encoding="utf-8-sig")
    source = read_source(folder)
    assert source.kind == "folder"
    assert [frame.caption for frame in source.frames] == ["ellie, forest", "x", "phil, running"]
    assert {(frame.characters, frame.confidence) for frame in source.frames} == {((), None)}
    assert kinds(source) == ["invalid entry", "no caption"]
    assert "line 3" in source.dropped[0].reason
    prompted = read_source(folder, instance_prompt="sks dog")
    assert prompted.frames[-1].caption == "sks dog"
    assert prompted.digest != source.digest


def test_a_folder_never_reads_outside_itself(root, tmp_path):
    picture(tmp_path / "secret.jpg")
    (tmp_path / "secret.txt").write_text("a secret caption")
    folder = tmp_path / "mine"
    picture(folder / "a.jpg")
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "metadata.jsonl").write_text('{"file_name": "../secret.jpg", "text": "x"}\n')
    assert kinds(read_source(folder)) == ["outside the project and the run folder", "no caption"]


# --- properties

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
RECORDS = st.fixed_dictionaries({}, optional=dict.fromkeys(entry(), JSON_VALUES))
QUIET = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@QUIET
@given(st.lists(RECORDS | JSON_VALUES, max_size=4) | JSON_VALUES)
def test_any_json_is_read_or_refused_and_nothing_gets_lost(root, data):
    path = write_run(root / "outputs" / "run", data)
    try:
        source = read_source(path)
    except BunnyLoraError:
        return
    assert len(source.frames) + len(source.dropped) == len(data)
    assert all((item.reason + item.frame_id).encode() for item in source.dropped)


@QUIET
@given(st.lists(st.tuples(st.text(max_size=8), JSON_VALUES) | st.binary(max_size=20), max_size=4))
def test_any_metadata_is_read_or_refused(root, rows):
    picture(root / "mine" / "a.jpg")
    lines = [
        row if isinstance(row, bytes) else json.dumps({"file_name": row[0], "text": row[1]}).encode()
        for row in rows
    ]
    (root / "mine" / "metadata.jsonl").write_bytes(b"\n".join(lines))
    try:
        read_source(root / "mine")
    except BunnyLoraError as error:
        assert "UTF-8" in str(error)


# --- names and the tokenizer's limit


class WordTokenizer:
    """One token a word, and one each for start and end."""

    model_max_length = 8

    def __call__(self, text, **_):
        return {"input_ids": [0, *range(len(text.split())), 1]}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("rex and ellie", "rex and ellie"),
        ("rex with ellie in a very long caption", "rex with ellie in a very long caption"),
        ("rex in a very long caption with ellie", "rex, ellie, rex in a very long caption with ellie"),
        ("a trex in a very long caption without", "a trex in a very long caption without"),
        ("a trex in a very long rain with rex", "rex, a trex in a very long rain with rex"),
    ],
)
def test_names_come_first_only_where_cutting_would_lose_one(caption, expected):
    once = name_first(caption, ["rex", "ellie"], WordTokenizer())
    assert once == expected
    assert name_first(once, ["rex", "ellie"], WordTokenizer()) == expected
