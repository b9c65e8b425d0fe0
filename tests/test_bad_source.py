"""Bad stage-4 runs, made here one by one: refused or left out with a reason, and nothing lost."""

import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bunny_lora.config import validate
from bunny_lora.data.writing import prepare
from bunny_lora.dataset import load_summary
from bunny_lora.errors import BunnyLoraError
from bunny_lora.prepare import _read
from bunny_lora.stage4 import find_source, read_source

CAPTION = "rex, a small green dinosaur in the rain"


@pytest.fixture
def run(project):
    """A run of one good picture, whose JSON the tests write."""
    folder = project / "outputs" / "run"
    (folder / "llm_analysis").mkdir(parents=True)
    (folder / "frames").mkdir()
    Image.new("RGB", (64, 48), "green").save(folder / "frames" / "good.jpg")
    return folder


def entry(**changes):
    good = {
        "frame_id": "good",
        "frame_path": "frames/good.jpg",
        "sd_caption": CAPTION,
        "confidence": 0.9,
    }
    return good | changes


def read(run, content, **options):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (run / "llm_analysis" / "llm_analysis.json").write_bytes(data)
    return read_source(run, **options)


GOOD = json.dumps([entry()])
UNREADABLE = {
    "zero bytes": (b"", "cut off or not JSON"),
    "white space": (b" \n", "cut off or not JSON"),
    "zeros after a crash": (bytes(512), "cut off or not JSON"),
    "truncated": (GOOD[: len(GOOD) // 2].encode(), "cut off or not JSON"),
    "one bracket missing": (GOOD[:-1].encode(), "cut off or not JSON"),
    "a comma too many": (b"[{},]", "cut off or not JSON"),
    "two documents": (GOOD.encode() * 2, "cut off or not JSON"),
    "lines, not a list": (b'{"a": 1}\n{"a": 2}\n', "cut off or not JSON"),
    "latin-1": ('["caf\xe9, a place"]'.encode("latin-1"), r"not UTF-8 text \(byte 5\)"),
    "binary": (b"\x89PNG\r\n\x1a\n\xff", "not UTF-8 text"),
    "deep nesting": (b"[" * 200_000, "cut off or not JSON"),
    "null": (b"null", "holds a NoneType, not a list"),
    "a text": (b'"[]"', "holds a str, not a list"),
    "an object": (b'{"frames": []}', "holds a dict, not a list"),
    "an empty list": (b"[]", "an empty list: stage 4 described no frame"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_is_unreadable_as_a_whole_is_refused_and_prepared_data_kept(run, project, name):
    data_dir = project / "data" / "images"
    before = prepare(read(run, [entry()]), data_dir)
    content, message = UNREADABLE[name]
    with pytest.raises(BunnyLoraError, match=f"(?s)llm_analysis.json.*{message}.*Let stage 4 finish"):
        read(run, content)
    assert load_summary(data_dir) == before
    assert (data_dir / "good.jpg").is_file()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_of_unicode_are_read(run, encoding):
    text = json.dumps([entry(sd_caption="rex, a café in the rain 🦖")], ensure_ascii=False)
    assert read(run, text.encode(encoding)).frames[0].caption == "rex, a café in the rain 🦖"


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1",
        "2",
        '"high"',
        "[]",
        "{}",
        "9" * 5000,
        "1" + "0" * 400,
    ],
    ids=lambda value: value[:9],
)
def test_one_wrong_number_costs_one_entry(run, value):
    source = read(run, f'[{{"frame_id": "odd", "confidence": {value}}}, {GOOD[1:]}'.encode())
    assert [frame.frame_id for frame in source.frames] == ["good"]
    assert source.dropped[0].frame_id == "odd"
    assert source.dropped[0].reason.startswith("invalid entry: confidence")


@pytest.mark.parametrize("wrong", [[], {}, ["x"], {"a": 1}, [[[[]]]]], ids=str)
@pytest.mark.parametrize("key", ["frame_id", "frame_path", "sd_caption", "model_used", "confidence"])
def test_one_wrong_type_costs_one_entry(run, key, wrong):
    source = read(run, [entry(**{key: wrong}), entry()])
    assert len(source.frames) == 1
    assert [item.reason.split(": ")[:2] for item in source.dropped] == [["invalid entry", key]]


def test_an_entry_listed_twice_trains_once(run):
    source = read(run, [entry(), entry(), entry(frame_id="other name", frame_path="frames\\good.jpg")])
    assert len(source.frames) == 1
    assert [item.reason for item in source.dropped] == [
        "listed twice: the same picture as good",
        "listed twice: the same picture as good",
    ]


ODD_PATHS = {
    "dots to nowhere": "../../../../../../../../etc/no such file.jpg",
    "many dots": "../" * 5_000 + "a.jpg",
    "many parts": "a/" * 5_000 + "b.jpg",
    "very long": "x" * 50_000 + ".jpg",
    "newline": "frames/a\nb.jpg",
    "NUL": "frames/a\0b.jpg",
    "half a character": "frames/\ud800.jpg",
    "emoji": "frames/🦖.jpg",
    "right to left": "frames/\u202egpj.exe",
    "a folder": "frames",
    "a device": "/dev/zero",
    "empty": "",
    "home": "~/a.jpg",
    "address": "https://example.org/a.jpg",
    "Windows": "C:\\Users\\somebody\\frames\\a.jpg",
    "Windows share": "\\\\server\\share\\a.jpg",
    "Windows device": "\\\\?\\C:\\a.jpg",
}


@pytest.mark.parametrize("name", ODD_PATHS)
def test_an_odd_path_is_a_missing_frame_told_on_one_short_line(run, name):
    source = read(run, [entry(frame_path=ODD_PATHS[name]), entry()])
    assert len(source.frames) == 1
    (item,) = source.dropped
    assert item.reason.startswith("missing frame: ")
    assert len(item.reason) < 200
    assert item.reason.encode() and "\n" not in item.reason


@pytest.mark.parametrize(
    "name", ["a\nb.jpg", "🦖 שמש.jpg", "\u202eabc.jpg", "x" * 240 + ".jpg", "-rf *.jpg"]
)
def test_a_picture_with_an_odd_name_is_trained_on_under_a_tame_one(run, project, name):
    Image.new("RGB", (64, 48), "red").save(run / "frames" / name)
    summary = prepare(
        read(run, [entry(frame_path=f"frames/{name}", frame_id="odd")]), project / "d" / "i"
    )
    (file_name,) = [image["file_name"] for image in summary["images"]]
    assert (project / "d" / "i" / file_name).is_file()
    assert len(file_name) < 100
    assert not set(file_name) & set('\n\u202e*?"<>|:\\/ ') and file_name[0] not in ".-"


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/passwd", "con", "a\nb", "🦖", "x" * 50_000, "{name}"]
)
def test_a_characters_name_is_never_a_path(run, project, name):
    before = {path for path in project.rglob("*") if "d" not in path.parts}
    summary = prepare(read(run, [entry(characters_identified=[name])]), project / "d" / "i")
    assert list(summary["characters"]) == [" ".join(name.split()).lower()]
    assert {
        path for path in project.rglob("*") if "d" not in path.relative_to(project).parts
    } - before <= {run / "llm_analysis" / "llm_analysis.json"}


# --- outside the folders that were named


@pytest.fixture
def secret(tmp_path):
    """A picture that is none of our business."""
    (tmp_path / "secret").mkdir()
    path = tmp_path / "secret" / "private.jpg"
    Image.new("RGB", (64, 48), "red").save(path)
    return path


def ways_out(run, secret):
    (run / "link.jpg").symlink_to(secret)
    (run / "linked").symlink_to(secret.parent)
    (run / "chain").symlink_to(run / "linked")
    absolute, dots = str(secret), os.path.relpath(secret, run)
    return [absolute, dots, f"frames/../{dots}", "link.jpg", "linked/private.jpg", "chain/private.jpg"]


def test_nothing_outside_is_read_however_it_is_named(run, secret, monkeypatch):
    ways = ways_out(run, secret)
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *a, **k: opened.append(path) or real(path, *a, **k))
    source = read(run, [entry(), *(entry(frame_path=way) for way in ways)])
    assert [frame.frame_id for frame in source.frames] == ["good"]
    assert {item.reason.partition(":")[0] for item in source.dropped} == {
        "outside the project and the run folder"
    }
    assert all("allow_outside_paths: true" in item.reason for item in source.dropped)
    assert all(path.resolve().is_relative_to(run) for path in opened)


def test_allow_outside_paths_reads_them_and_goes_from_the_configuration_to_the_reader(run, secret):
    for way in ways_out(run, secret):
        assert read(run, [entry(frame_path=way)], allow_outside_paths=True).frames[0].path == secret
    for allowed, n_frames in ((False, 0), (True, 1)):
        config = validate({"source": "run", "allow_outside_paths": allowed})
        assert len(_read(config).frames) == n_frames


def test_a_source_with_an_impossible_name_is_an_unknown_one(project):
    for name in ("x" * 5000, "a\0b", "\ud800", "a\nb"):
        with pytest.raises(BunnyLoraError, match="No source") as error:
            find_source(name)
        assert len(str(error.value)) < 1000


# --- size


def test_a_hundred_thousand_entries_are_all_accounted_for_in_good_time(run):
    n = 100_000
    started = time.monotonic()
    source = read(run, [entry(frame_id=f"f{i}", confidence=0.1 * (i % 5)) for i in range(n)])
    assert len(source.frames) + len(source.dropped) == n
    assert time.monotonic() - started < 30


QUIET = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@QUIET
@given(st.binary(max_size=60), st.integers(0, len(GOOD)))
def test_any_damage_to_the_file_is_refused_or_reported(run, junk, place):
    try:
        source = read(run, GOOD[:place].encode() + junk + GOOD[place + len(junk) :].encode())
    except BunnyLoraError as error:
        assert "llm_analysis.json" in str(error)
        return
    assert len(source.frames) + len(source.dropped) >= 1
    assert all(item.reason for item in source.dropped)


@QUIET
@given(st.text(max_size=200), st.lists(st.text(max_size=30), max_size=3), st.text(max_size=30))
def test_any_text_reaches_the_metadata_whole_or_is_left_out(run, caption, names, frame_id):
    changes = {"sd_caption": caption, "characters_identified": names, "frame_id": frame_id}
    source = read(run, json.dumps([entry(**changes)]).encode())
    for frame in source.frames:
        assert frame.caption == " ".join(frame.caption.split())
        assert (frame.caption + frame.frame_id + "".join(frame.characters)).encode()
    assert len(source.frames) + len(source.dropped) == 1
