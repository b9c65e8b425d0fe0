"""Prepared data: what is written, when it is left alone, and how it is read back."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from conftest import open_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_stage4 import film_run
from transformers import CLIPTokenizer

from bunny_lora.data import writing
from bunny_lora.data.frames import Dropped, Sample, Source
from bunny_lora.data.writing import prepare
from bunny_lora.dataset import ImageDataset, load_summary, read_samples, sample_indices
from bunny_lora.errors import BunnyLoraError
from bunny_lora.stage4 import read_source


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A project of its own for every test."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.setenv("BUNNY_LORA_ROOT", str(root))
    return root


@pytest.fixture
def data_dir(root) -> Path:
    return root / "training_data" / "instance_images"


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with one token a letter and no merges, cut at 24 tokens."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz,.-'":
        vocab |= {letter: len(vocab), f"{letter}</w>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)


def make_frame(path: Path, caption="rex, a dinosaur", mode="RGB", size=(64, 48), **save) -> Sample:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 77).save(path, **save)
    return Sample(path.stem, path, caption, ("rex",), 0.9, False, ((1, 2, 3, 4),), size)


def make_source(root: Path, *frames: Sample, digest="d1") -> Source:
    run = root / "outputs" / "run"
    frames = frames or (
        make_frame(run / "frames" / "frame_1.jpg"),
        make_frame(run / "frames" / "b.jpg"),
    )
    dropped = [
        Dropped("x", None, "missing frame: x.jpg"),
        Dropped("y", frames[0].path, "low confidence: 0"),
    ]
    return Source(run, "stage-4", list(frames), dropped, digest, 0.5)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def captions(data_dir: Path) -> dict[str, str]:
    rows = map(json.loads, (data_dir / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["file_name"]: row["text"] for row in rows}


# --- the real run


def test_film_run_is_written_loaded_by_datasets_and_left_alone(data_dir, tmp_path):
    source = read_source(film_run())
    summary = prepare(source, data_dir)
    assert (summary["n_entries"], summary["n_images"], summary["n_rescued"]) == (84, 76, 1)
    assert summary["characters"] == {"birdie": 16, "buck": 60, "flutter": 16}
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(data_dir), cache_dir=str(tmp_path / "hf")
    )
    assert loaded["train"]["text"] == [frame.caption for frame in source.frames]
    before = contents(data_dir.parent)
    assert prepare(read_source(film_run()), data_dir) == summary | {"unchanged": True}
    assert contents(data_dir.parent) == before
    assert len(ImageDataset(data_dir, resolution=64, center_crop=True)) == 76


# --- what is written


def test_summary_says_everything_and_nothing_of_this_machine(root, data_dir, tmp_path):
    summary = prepare(make_source(root), data_dir)
    assert load_summary(data_dir) == summary
    assert summary["source"] == "outputs/run"
    assert summary["dropped_by_reason"] == {"low confidence": 1, "missing frame": 1}
    assert [item["path"] for item in summary["dropped"]] == [None, "outputs/run/frames/frame_1.jpg"]
    assert summary["confidence"] == {"min": 0.9, "median": 0.9, "max": 0.9}
    assert summary["caption_tokens"] is None
    assert summary["sizes"] == {"64x48": 2}
    assert summary["images"][0] | {"sha256": ""} == {
        "file_name": "frame_1.jpg",
        "frame_id": "frame_1",
        "characters": ["rex"],
        "confidence": 0.9,
        "rescued": False,
        "faces": [[1, 2, 3, 4]],
        "size": [64, 48],
        "caption_tokens": None,
        "prompted": False,
        "repeats": 1,
        "sha256": "",
    }
    assert str(tmp_path) not in (data_dir.parent / "data_summary.json").read_text()


def test_a_source_elsewhere_is_named_without_its_absolute_path(tmp_path, data_dir):
    frame = make_frame(tmp_path / "film" / "frames" / "a.jpg")
    source = Source(
        tmp_path / "film", "stage-4", [frame], [Dropped("a", frame.path, "no caption")], "d"
    )
    summary = prepare(source, data_dir)
    assert (summary["source"], summary["dropped"][0]["path"]) == ("film", "film/frames/a.jpg")


def test_plain_pictures_are_copied_and_others_made_plain(root, data_dir):
    run = root / "outputs" / "run"
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = make_frame(run / "plain.jpg"), make_frame(run / "turned.jpg", exif=exif)
    grey, lying = make_frame(run / "grey.png", mode="L"), make_frame(run / "lying.png")
    lying.path.rename(run / "lying.jpg")
    frames = (plain, turned, grey, replace(lying, path=run / "lying.jpg"))
    prepare(make_source(root, *frames), data_dir)
    assert list(captions(data_dir)) == ["plain.jpg", "turned.png", "grey.png", "lying.png"]
    assert (data_dir / "plain.jpg").read_bytes() == plain.path.read_bytes()
    assert open_image(data_dir / "turned.png").size == (48, 64)
    assert {open_image(data_dir / name).mode for name in captions(data_dir)} == {"RGB"}


def test_names_that_collide_get_a_suffix(root, data_dir):
    run = root / "outputs" / "run"
    names = ["one/a.jpg", "two/a.jpg", "three/A.jpg", "four/a.png", "five/a_2.jpg"]
    frames = [make_frame(run / name, caption=f"caption of {name}") for name in names]
    prepare(make_source(root, *frames), data_dir)
    expected = ["a.jpg", "a_2.jpg", "A_3.jpg", "a.png", "a_2_2.jpg"]
    assert captions(data_dir) == {e: f"caption of {n}" for e, n in zip(expected, names, strict=True)}


def test_datasets_loads_every_picture_whatever_its_name(root, data_dir, tmp_path):
    run = root / "outputs" / "run"
    names = [
        "test_1.jpg",
        "the val 2.jpg",
        "frame_3.jpg",
        "שמש [4]*.png",
        ".hidden.jpg",
        "x" * 200 + ".jpg",
    ]
    frames = [make_frame(run / name, caption=f"caption {i} 🦖") for i, name in enumerate(names)]
    prepare(make_source(root, *frames), data_dir)
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(data_dir), cache_dir=str(tmp_path / "hf")
    )
    assert {split: sorted(part["text"]) for split, part in loaded.items()} == {
        "train": [f"caption {i} 🦖" for i in range(len(names))]
    }


def test_long_captions_keep_their_names(root, data_dir, tokenizer):
    run = root / "outputs" / "run"
    late = make_frame(run / "late.jpg", "a small green dinosaur called rex")
    early = make_frame(run / "early.jpg", "rex, a small green dinosaur in rain")
    short = make_frame(run / "short.jpg", "rex in the rain")
    source = make_source(root, late, early, short)
    summary = prepare(source, data_dir, tokenizer=tokenizer)
    assert captions(data_dir)["late.jpg"] == "rex, a small green dinosaur called rex"
    assert captions(data_dir)["early.jpg"] == early.caption
    tokens = summary["caption_tokens"]
    assert (tokens["limit"], tokens["n_truncated"], tokens["n_names_moved"]) == (24, 2, 1)
    assert tokens["min"] == summary["images"][2]["caption_tokens"] == 14
    for image in summary["images"]:
        cut = tokenizer(captions(data_dir)[image["file_name"]], truncation=True)["input_ids"]
        assert "rex" in tokenizer.decode(cut, skip_special_tokens=True)
    assert prepare(source, data_dir, tokenizer=tokenizer)["unchanged"]
    assert "unchanged" not in prepare(source, data_dir)


# --- when it is left alone


def test_preparing_twice_changes_nothing(root, data_dir):
    summary = prepare(make_source(root), data_dir)
    before = {path: path.stat().st_mtime_ns for path in data_dir.parent.rglob("*")}
    assert prepare(make_source(root), data_dir) == summary | {"unchanged": True}
    assert {path: path.stat().st_mtime_ns for path in data_dir.parent.rglob("*")} == before


def test_a_changed_input_and_a_lost_folder_are_written_anew(root, data_dir):
    prepare(make_source(root), data_dir)
    frame = make_frame(root / "outputs" / "run" / "new.jpg")
    summary = prepare(make_source(root, frame, digest="d2"), data_dir)
    assert "unchanged" not in summary
    assert set(contents(data_dir)) == {"metadata.jsonl", "new.jpg"}
    for path in data_dir.iterdir():
        path.unlink()
    assert prepare(make_source(root, frame, digest="d2"), data_dir) == summary
    assert set(contents(data_dir)) == {"metadata.jsonl", "new.jpg"}


@pytest.mark.parametrize("when", ["at a picture", "at the swap"])
def test_a_crash_half_way_leaves_the_old_data_whole(root, data_dir, monkeypatch, when):
    prepare(make_source(root), data_dir)
    before = contents(data_dir.parent)
    frames = [make_frame(root / "outputs" / "run" / f"new_{n}.jpg") for n in range(3)]

    def fail(*_):
        raise OSError(28, "No space left on device")

    if when == "at a picture":
        real = writing.plain_bytes
        monkeypatch.setattr(
            writing, "plain_bytes", lambda p: real(p) if p == frames[0].path else fail()
        )
    else:
        monkeypatch.setattr("bunny_lora.core.files._swap", fail)
    with pytest.raises(BunnyLoraError, match="No space left"):
        prepare(make_source(root, *frames, digest="d2"), data_dir)
    assert contents(data_dir.parent) == before


def test_a_crash_before_the_summary_heals_itself(root, data_dir, monkeypatch):
    prepare(make_source(root), data_dir)
    changed = make_source(root, make_frame(root / "outputs" / "run" / "new.jpg"), digest="d2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "bunny_lora.core.files.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        prepare(changed, data_dir)
    assert prepare(changed, data_dir)["input_sha256"] == "d2"
    assert prepare(changed, data_dir)["unchanged"]
    assert not list(data_dir.parent.glob("*.backup-*"))


def edit_captions(data_dir: Path) -> None:
    path = data_dir / "metadata.jsonl"
    path.write_text(path.read_text().replace("dinosaur", "dragon"))


def edit_picture(data_dir: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(data_dir / "b.jpg")


def add_picture(data_dir: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(data_dir / "mine.jpg")


def lose_summary(data_dir: Path) -> None:
    (data_dir.parent / "data_summary.json").unlink()
    add_picture(data_dir)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_captions, "captions in metadata.jsonl were changed by hand"),
        (edit_picture, r"pictures were changed by hand.*\(b.jpg\)"),
        (add_picture, r"pictures were changed by hand.*\(mine.jpg\)"),
        (lose_summary, "holds files that were not written by this step"),
    ],
)
@pytest.mark.parametrize("digest", ["d1", "d2"])
def test_work_by_hand_is_refused_and_with_overwrite_kept_beside(root, data_dir, edit, message, digest):
    prepare(make_source(root), data_dir)
    edit(data_dir)
    edited = contents(data_dir)
    with pytest.raises(BunnyLoraError, match=f"(?s){message}.*overwrite=True"):
        prepare(make_source(root, digest=digest), data_dir)
    assert contents(data_dir) == edited
    for number in (1, 2):
        summary = prepare(make_source(root, digest=digest), data_dir, overwrite=True)
        assert summary == load_summary(data_dir)
        assert contents(data_dir.with_name(f"instance_images.backup-{number}")) == edited
        edit(data_dir)


@pytest.mark.parametrize("step", ["bunny_lora.data.writing.plain_bytes", "bunny_lora.core.files._swap"])
def test_a_failed_overwrite_leaves_the_work_in_its_place(root, data_dir, monkeypatch, step):
    prepare(make_source(root), data_dir)
    edit_captions(data_dir)
    before = contents(data_dir.parent)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, fail)
    with pytest.raises(BunnyLoraError, match="No space left"):
        prepare(make_source(root, digest="d2"), data_dir, overwrite=True)
    assert contents(data_dir.parent) == before


def test_impossible_targets_are_refused(root, data_dir):
    source = make_source(root)
    with pytest.raises(BunnyLoraError, match=r"No usable picture.*1 low confidence, 1 missing frame"):
        prepare(replace(source, frames=[]), data_dir)
    with pytest.raises(BunnyLoraError, match="holds the whole project"):
        prepare(source, root.parent, overwrite=True)
    with pytest.raises(BunnyLoraError, match="lie in data_dir itself"):
        prepare(source, root / "outputs", overwrite=True)
    (data_dir.parent).mkdir()
    (data_dir.parent / "data_summary.json").write_text("{")
    with pytest.raises(BunnyLoraError, match=r"data_summary.json.*Delete it"):
        prepare(source, data_dir)


# --- reading back


@pytest.mark.parametrize(
    ("size", "center_crop", "shape"),
    [
        ((640, 360), True, (3, 64, 64)),
        ((40, 90), True, (3, 64, 64)),
        ((640, 360), False, (3, 64, 112)),
        ((360, 640), False, (3, 112, 64)),
        ((320, 176), False, (3, 64, 120)),
        ((50, 50), False, (3, 64, 64)),
    ],
)
def test_geometry(root, data_dir, size, center_crop, shape):
    prepare(make_source(root, make_frame(root / "outputs" / "a.png", size=size)), data_dir)
    tensor = ImageDataset(data_dir, resolution=64, center_crop=center_crop)[0]
    assert (tensor.shape, tensor.dtype) == (shape, torch.float32)


def test_pixels_are_upright_in_order_and_in_range(root, data_dir):
    data_dir.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned to the right when shown: what is left in the file is on top.
    image = Image.new("RGB", (64, 64), "black")
    image.paste("red", (0, 0, 32, 64))
    image.save(data_dir / "a.png", exif=exif)
    (data_dir / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    tensor = ImageDataset(data_dir, resolution=64, center_crop=True)[0]
    assert tensor[:, 10, 50].tolist() == [1, -1, -1]
    assert tensor[:, 50, 10].tolist() == [-1, -1, -1]


def test_captions_names_and_characters_in_the_order_of_the_file(root, data_dir):
    prepare(make_source(root), data_dir)
    with (data_dir / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "b.jpg"}\n')
    data = ImageDataset(data_dir, resolution=64, center_crop=True, instance_prompt="sks dog")
    names = ["frame_1.jpg", "b.jpg", "b.jpg"]
    assert (len(data), [sample.path.name for sample in data.samples]) == (3, names)
    captions = ["rex, a dinosaur", "rex, a dinosaur", "sks dog"]
    assert [sample.caption for sample in data.samples] == captions
    assert [sample.characters for sample in data.samples] == [("rex",)] * 3


def test_a_frame_comes_back_as_the_sample_it_was_with_the_path_of_its_copy(root, data_dir):
    source = make_source(root)
    prepare(source, data_dir)
    there = [replace(frame, path=data_dir / frame.path.name) for frame in source.frames]
    assert read_samples(data_dir) == there
    assert ImageDataset(data_dir, resolution=64, center_crop=True).samples == there


def test_a_line_taken_out_by_hand_is_no_sample_and_a_foreign_picture_is_a_plain_one(root, data_dir):
    prepare(make_source(root), data_dir)
    make_frame(data_dir / "mine.png")
    (data_dir / "metadata.jsonl").write_text('{"file_name": "mine.png"}\n')
    local_shard = Sample("mine", data_dir / "mine.png", "(no caption)", prompted=True)
    assert read_samples(data_dir) == [local_shard]


def test_a_tokenizer_moves_names_to_where_cutting_cannot_lose_them(root, data_dir, tokenizer):
    long = "a very long sentence " * 30 + "with rex"
    prepare(make_source(root, make_frame(root / "outputs" / "a.png", caption=long)), data_dir)
    (sample,) = ImageDataset(data_dir, resolution=64, center_crop=True, tokenizer=tokenizer).samples
    assert sample.caption == f"rex, {long}" and sample.tokens > tokenizer.model_max_length


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No training data"),
        ("", "is empty"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_na', "line 2: should read"),
        ('{"file_name": "a.png"}', "line 1: should read"),
        ("[]", "line 1: should read"),
        ('{"file_name": "b.png", "text": "x"}', "line 1: there is no picture 'b.png'"),
        ('{"file_name": "../secret.png", "text": "x"}', "line 1: there is no picture"),
        (b"\xff\xfe\xff", "not UTF-8"),
    ],
)
def test_broken_metadata_names_the_line(data_dir, text, message):
    make_frame(data_dir / "a.png")
    make_frame(data_dir.parent / "secret.png")
    if text is not None:
        path = data_dir / "metadata.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BunnyLoraError, match=message):
        ImageDataset(data_dir, resolution=64, center_crop=True)


def test_a_picture_that_broke_since_is_the_users_error(root, data_dir):
    prepare(make_source(root), data_dir)
    data = ImageDataset(data_dir, resolution=64, center_crop=True)
    (data_dir / "b.jpg").write_bytes(b"")
    with pytest.raises(BunnyLoraError, match=r"Could not read .*b.jpg"):
        data[1]


# --- the sample stream


@given(st.integers(0, 2**40), st.integers(1, 12), st.integers(0, 60), st.integers(0, 40))
def test_the_stream_is_a_pure_function_of_position(seed, n_images, start, count):
    whole = sample_indices(seed, n_images, 0, start + count)
    assert sample_indices(seed, n_images, start, count) == whole[start:]
    for first in range(0, len(whole) - n_images + 1, n_images):
        assert sorted(whole[first : first + n_images]) == list(range(n_images))


def test_the_stream_never_changes():
    """Golden: a change here would break every run that is resumed across it."""
    assert sample_indices(42, 5, 0, 10) == [0, 1, 3, 2, 4, 4, 0, 1, 2, 3]
