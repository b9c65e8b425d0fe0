"""Folders as people's tools leave them: every file is used or listed, and nothing is guessed unsaid."""

import json
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from conftest import CHECKOUT, open_image, tiny_config
from PIL import Image, PngImagePlugin, features
from PIL.PngImagePlugin import PngInfo
from test_colours import display_p3

from bunny_lora import dataset
from bunny_lora.cli import main
from bunny_lora.config import load_config
from bunny_lora.data.captions import names_in
from bunny_lora.data.frames import Source
from bunny_lora.data.images import inspect, open_rgb, plain_suffix
from bunny_lora.data.summary import remarks
from bunny_lora.data.writing import prepare
from bunny_lora.errors import BunnyLoraError
from bunny_lora.prepare import check_as_it_is, draw_demo_film, prepare_data
from bunny_lora.stage4 import find_source, read_source
from bunny_lora.trainer import LoRATrainer


@pytest.fixture
def folder(project: Path) -> Path:
    path = project / "mine"
    path.mkdir()
    return path


def draw(path: Path, kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = sum(path.as_posix().encode()) % 256
    Image.new("RGB", (48, 40), (shade, 90, 200)).save(path, kind)
    return path


def fill(folder: Path, **texts: str | bytes) -> Path:
    """Write a picture `<name>.png` for each name and, if it is not empty, its `<name>.txt`."""
    for name, text in texts.items():
        draw(folder / f"{name}.png")
        if text:
            (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def captions(source: Source) -> dict[str, str]:
    return {frame.path.name: frame.caption for frame in source.frames}


def as_it_is(folder: Path, **options: object) -> dict[str, str]:
    return {s.path.name: s.caption for s in dataset.read_samples(folder, "sks", **options)}


def reasons(source: Source) -> dict[str, str]:
    dropped = {item.frame_id: item.reason for item in source.dropped}
    return dropped | {item.file: item.reason for item in source.unused}


def jsonl(folder: Path, *rows: dict, name: str = "metadata.jsonl") -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- captions beside pictures


@pytest.mark.parametrize(
    "name", ["a.txt", "a.caption", "a.TXT", "A.Caption", "a.png.txt", "a.PNG.caption"]
)
def test_a_caption_is_read_under_every_name_that_tools_give_it(folder, name):
    draw(folder / "a.png")
    (folder / name).write_text("rex, waving")
    assert captions(read_source(folder)) == as_it_is(folder) == {"a.png": "rex, waving"}
    assert not read_source(folder).unused


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_caption_in_unicode_is_read_and_another_left_out(folder, encoding):
    fill(folder, a="café, waving".encode(encoding), b="café".encode("latin-1"))
    source = read_source(folder)
    assert captions(source) == {"a.png": "café, waving"}
    assert reasons(source) == {"b": "invalid entry: the caption b.txt is not UTF-8 text"}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_match_in_every_unicode_form(folder, form):
    name, other = (unicodedata.normalize(f, "café") for f in (form, {"NFC": "NFD"}.get(form, "NFC")))
    draw(folder / f"{name}.png")
    (folder / f"{other}.txt").write_text("rex")
    assert list(captions(read_source(folder)).values()) == ["rex"]
    assert list(as_it_is(folder).values()) == ["rex"]
    (folder / f"{other}.txt").unlink()
    jsonl(folder, {"file_name": f"{other}.png", "text": "rex in a table"})
    assert list(captions(read_source(folder)).values()) == ["rex in a table"]
    assert list(as_it_is(folder).values()) == ["rex in a table"]


def test_names_match_in_another_case_only_where_there_is_no_doubt(folder):
    for name in ("IMG_1.JPG", "b.png", "B.png"):
        draw(folder / name)
    jsonl(
        folder,
        {"file_name": "img_1.jpg", "text": "rex"},
        {"file_name": "b.PNG", "text": "phil"},
    )
    source = read_source(folder)
    assert captions(source) == {"IMG_1.JPG": "rex"}
    assert [item.reason for item in source.dropped] == [
        "missing frame: b.PNG",
        "unclear caption: a table's b.PNG is this picture or another",
        "unclear caption: a table's b.PNG is this picture or another",
    ]
    with pytest.raises(BunnyLoraError, match=r"line 2: there is no picture 'b.PNG'"):
        dataset.read_samples(folder)


def test_a_text_that_may_be_two_pictures_is_that_of_the_one_it_names(folder):
    fill(folder, c="rex")
    draw(folder / "C.png")
    source = read_source(folder, instance_prompt="sks")
    assert captions(source) == {"c.png": "rex", "C.png": "sks"}


# --- tables


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_caption_column_is_recognised_and_said(folder, name, column):
    draw(folder / "a.png")
    if name.endswith("csv"):
        (folder / name).write_text(f'file_name,n,{column}\na.png,1,"rex, waving"\n')
    else:
        jsonl(folder, {"file_name": "a.png", "n": 1, column: "rex, waving"})
    source = read_source(folder)
    assert captions(source) == as_it_is(folder) == {"a.png": "rex, waving"}
    said = f"captions are the column '{column}' of {name}, which has no 'text'"
    assert source.notes == [said] * (column != "text")


def test_the_configuration_names_any_column_and_a_wrong_name_is_refused(folder):
    draw(folder / "a.png")
    jsonl(folder, {"file_name": "a.png", "text": "short", "description": "long"})
    assert captions(read_source(folder, caption_column="description")) == {"a.png": "long"}
    assert as_it_is(folder, caption_column="description") == {"a.png": "long"}
    config = tiny_config("random-tiny", source="mine", caption_column="descripton")
    with pytest.raises(
        BunnyLoraError, match=r"no column 'descripton'.*'file_name', 'text', 'description'"
    ):
        prepare_data(config)


def test_what_was_prepared_is_read_whatever_column_the_source_had(folder, project):
    draw(folder / "a.png")
    jsonl(folder, {"file_name": "a.png", "description": "long"})
    prepare(read_source(folder, caption_column="description"), project / "data" / "images")
    assert as_it_is(project / "data" / "images", caption_column="description") == {"a.png": "long"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file_name,text\na.png,rex, waving\n", "line 2 of metadata.csv .*commas need quotes"),
        ("file_name,text\na.png\n", "line 2 of metadata.csv has no file_name, or not the header's"),
        ("name,text\na.png,rex\n", "line 2 of metadata.csv has no file_name"),
    ],
)
def test_a_row_that_does_not_fit_its_header_is_left_out_not_cut(folder, table, message):
    draw(folder / "a.png")
    (folder / "metadata.csv").write_text(table)
    assert captions(read_source(folder)) == {}
    assert re.search(message, read_source(folder).dropped[0].reason)


def test_a_table_with_an_open_quote_is_refused(folder):
    draw(folder / "a.png")
    (folder / "metadata.csv").write_text('file_name,text\na.png,"rex\nb.png,phil\n')
    with pytest.raises(BunnyLoraError, match=r"metadata.csv, after line 1: .*quotes around it"):
        read_source(folder)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_of_every_office_program(folder, separator):
    draw(folder / "a.png")
    rows = [["file_name", "text"], ["a.png", "rex"]]
    text = "\r\n".join(separator.join(row) for row in rows)
    (folder / "metadata.csv").write_text(text, encoding="utf-8-sig")
    assert captions(read_source(folder)) == as_it_is(folder) == {"a.png": "rex"}


def test_a_caption_that_is_no_text_is_an_invalid_entry(folder):
    draw(folder / "a.png")
    jsonl(folder, {"file_name": "a.png", "text": ["rex", "waving"]})
    source = read_source(folder, instance_prompt="sks")
    assert reasons(source) == {"a": "invalid entry: 'text' in line 1 of metadata.jsonl is a list"}


def test_a_table_in_a_folder_of_the_folder_is_read_too(folder):
    for name in ("one/a.png", "two/a.png"):
        draw(folder / name)
        jsonl((folder / name).parent, {"file_name": "a.png", "text": f"caption of {name}"})
    source = read_source(folder)
    assert [frame.caption for frame in source.frames] == [
        "caption of one/a.png",
        "caption of two/a.png",
    ]


# --- nothing is passed over


def test_every_file_is_used_or_listed_with_its_reason(folder):
    fill(folder, a="rex", b="1 0.5 0.5 0.2 0.2", c="", d=" ")
    (folder / "a.caption").write_text("other")
    for name in ("a.json", "captions.json", "nobody.txt", "a.npz", "notes.pdf", ".hidden", "Thumbs.db"):
        (folder / name).write_bytes(b"x")
    for name in ("a-masklabel.png", "masks/c.png", "e_mask.png"):
        draw(folder / name)
    for name in ("x.heic", "y.jxl"):
        (folder / name).write_bytes(b"x")
    draw(folder / "photo", "JPEG")
    draw(folder / "reg/1_fox/r.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    source = read_source(folder, instance_prompt="sks")
    assert captions(source) == {
        "a.png": "rex", "b.png": "sks", "c.png": "sks", "d.png": "sks", "e_mask.png": "sks",
    }  # fmt: skip
    assert sum(frame.prompted for frame in source.frames) == 4
    said = reasons(source)
    assert {name: reason.split(";")[0][:30] for name, reason in said.items()} == {
        "gone": "a link to nothing, or no file",
        "x": "format not read: x.heic is HEI",
        "y": "format not read: y.jxl is JPEG",
        "notes": "format not read: notes.pdf is ",
        "reg": "regularisation images: see pri",
        "a-masklabel.png": "a mask, which is not used: of ",
        "masks/c.png": "a mask, which is not used: of ",
        "b.txt": "no caption: numbers, as of box",
        "d.txt": "no caption: empty",
        "a.caption": "its picture has another captio",
        "a.json": "beside its picture, but not re",
        "captions.json": "metadata of a kind that is not",
        "nobody.txt": "a text of no picture's name",
        "a.npz": "a cache or weights",
        "photo": "JPEG under an ending that is n",
    }
    summary = prepare(source, folder.parent / "data" / "images")
    assert summary["n_instance_prompt"] == 4
    assert {item["file"] for item in summary["unused"]} == {item.file for item in source.unused}
    lines = remarks(summary)
    assert lines[0] == "4 of 5 have no caption and get the instance_prompt for one"
    assert sum(line.startswith("not used: ") for line in lines) == len(
        {i.reason for i in source.unused}
    )


def test_a_second_table_of_a_folder_is_listed(folder):
    draw(folder / "a.png")
    jsonl(folder, {"file_name": "a.png", "text": "rex"})
    (folder / "metadata.csv").write_text("file_name,text\na.png,phil\n")
    source = read_source(folder)
    assert captions(source) == {"a.png": "rex"}
    assert reasons(source) == {"metadata.csv": "metadata.jsonl lies beside it"}


def test_preparing_says_on_screen_how_many_have_no_caption(folder, capsys):
    fill(folder, a="rex, waving", b="")
    assert main(["prepare", "--source", "mine", "--set", "base_model=random-tiny"]) == 0
    assert "1 of 2 have no caption and get the instance_prompt" in capsys.readouterr().out


def test_one_caption_for_all_is_asked_about_and_taken_when_it_is_named(folder, tiny_model):
    fill(folder, a="", b="")
    config = tiny_config(tiny_model, source="mine")
    with pytest.raises(BunnyLoraError, match=r"None of the 2 pictures in mine.*--set instance_prompt"):
        prepare_data(config)
    assert not config.data_path.exists()
    summary = prepare_data(tiny_config(tiny_model, source="mine", instance_prompt="cartoon character"))
    assert (summary["n_images"], summary["n_instance_prompt"]) == (2, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", "a.json beside a picture, which is not read.*move such files away"),
        ("a.png.tags", "rex", "a.png.tags beside a picture, which is not read"),
    ],
)
def test_a_named_prompt_does_not_hide_captions_that_are_not_read(
    folder, tiny_model, name, content, message
):
    fill(folder, a="", b="")
    (folder / name).write_text(content)
    with pytest.raises(BunnyLoraError, match=message):
        prepare_data(tiny_config(tiny_model, source="mine", instance_prompt="sks dog"))


def test_a_table_without_captions_is_asked_about_by_its_columns(folder, tiny_model):
    draw(folder / "a.png")
    jsonl(folder, {"file_name": "a.png", "description": "rex"})
    with pytest.raises(
        BunnyLoraError, match=r"'file_name', 'description'; if one of them.*caption_column"
    ):
        prepare_data(tiny_config(tiny_model, source="mine"))


# --- kohya's folders, folders in folders, links


def test_kohyas_folders_count_as_their_names_say(folder):
    fill(folder / "10_zorblax fox", a="zorblax, waving", b="")
    fill(folder / "2_mimi" / "deep", a="mimi, sleeping")
    fill(folder / "0_never", c="x")
    fill(folder / "2024_holiday", d="a beach")
    source = read_source(folder)
    assert [(frame.caption, frame.repeats) for frame in source.frames] == [
        ("zorblax, waving", 10), ("zorblax fox", 10), ("a beach", 1), ("mimi, sleeping", 2),
    ]  # fmt: skip
    assert reasons(source) == {"c": "no repeats: its folder's name says 0 times"}
    assert source.notes == [
        "1 without a caption of their own have their folder's name as one: 'zorblax fox'",
        "folders' names say how often a picture counts: 1 of them 1 times, 1 of them 2 times, 2 of them"
        " 10 times",
    ]
    assert read_source(folder / "10_zorblax fox").frames[0].repeats == 10


def test_repeats_reach_training_from_a_prepared_folder_and_from_one_as_it_is(folder, project):
    fill(folder / "3_rex", a="rex")
    fill(folder / "1_phil", b="phil")
    prepare(read_source(folder), project / "data" / "images")
    for place in (project / "data" / "images", folder):
        images = dataset.ImageDataset(place, resolution=32, center_crop=True)
        told = {
            s.caption: n for s, n in zip(images.samples, images.repeats(balance=False), strict=True)
        }
        assert told == {"rex": 3, "phil": 1}


def test_a_cameras_folder_is_nobodys_repeats(folder):
    fill(folder / "100_FUJI", a="rex")
    assert read_source(folder).frames[0].repeats == 1


def test_pictures_in_folders_of_folders_make_a_source(folder):
    fill(folder / "one" / "two", a="rex")
    assert captions(read_source(find_source("mine"))) == {"a.png": "rex"}


def test_a_run_of_the_same_name_does_not_hide_a_folder(folder, project):
    draw(project / "outputs" / "mine" / "samples" / "0.png")
    fill(folder, a="rex")
    assert find_source("mine") == folder


def test_links_out_of_the_folder_name_the_switch_and_are_followed_with_it(folder, tmp_path):
    outside = fill(tmp_path / "outside", a="rex", b="phil")
    fill(folder, c="")
    (folder / "a.png").symlink_to(outside / "a.png")
    (folder / "a.txt").symlink_to(outside / "a.txt")
    (folder / "linked").symlink_to(outside)
    (folder / "circle").symlink_to(folder)
    source = read_source(folder, instance_prompt="sks")
    assert captions(source) == {"c.png": "sks"}
    said = reasons(source)
    assert said.pop("circle") == "a link to a folder that is read already"
    assert set(said) == {"a", "a.txt", "linked"}
    assert all("allow_outside_paths: true" in reason for reason in said.values())
    followed = read_source(folder, instance_prompt="sks", allow_outside_paths=True)
    assert captions(followed) == {"a.png": "rex", "b.png": "phil", "c.png": "sks"}
    assert as_it_is(folder, allow_outside_paths=True)["a.png"] == "rex"


# --- a folder that is trained on as it is


def test_a_folder_of_ones_own_is_trained_on_as_it_is_and_told_about(folder, tiny_model, capsys):
    fill(folder, a="rex, waving", b="phil, waving", c="")
    (folder / "d.heic").write_bytes(b"x")
    trainer = LoRATrainer(config=tiny_config(tiny_model, data_dir="mine"))
    trainer.prepare_data()
    out = capsys.readouterr().out
    assert "1 of 3 have no caption and get the instance_prompt" in out
    assert "not used: d: format not read: d.heic is HEIC" in out
    assert sorted(path.name for path in folder.glob("*.png")) == ["a.png", "b.png", "c.png"]


def test_pictures_that_a_table_does_not_list_are_told_about(folder, tiny_model):
    fill(folder, a="", b="phil")
    jsonl(folder, {"file_name": "a.png", "text": "rex"})
    assert as_it_is(folder) == {"a.png": "rex"}
    config = tiny_config(tiny_model, data_dir="mine", character_names=["rex"])
    assert check_as_it_is(config) == ["not used: b.png: a picture that the table does not list"]


def test_one_caption_for_all_of_a_folder_as_it_is_is_asked_about(folder, tiny_model):
    draw(folder / "a.png")
    jsonl(folder, {"file_name": "a.png"})
    with pytest.raises(BunnyLoraError, match="None of the 1 pictures in mine"):
        check_as_it_is(tiny_config(tiny_model, data_dir="mine"))
    assert check_as_it_is(tiny_config(tiny_model, data_dir="mine", instance_prompt="sks dog"))


def test_the_hash_of_a_folder_as_it_is_follows_captions_and_pictures(folder):
    fill(folder, a="rex")
    first = dataset.data_sha256(folder)
    assert dataset.data_sha256(folder) == first
    (folder / "a.txt").write_text("phil")
    second = dataset.data_sha256(folder)
    Image.new("RGB", (48, 40)).save(folder / "a.png")
    assert len({first, second, dataset.data_sha256(folder)}) == 3


# --- the demo and somebody's own frames


@pytest.fixture
def checkout(project: Path) -> Path:
    for name in ("cpu", "demo"):
        shutil.copy(CHECKOUT / "params" / f"{name}.yaml", project / "params")
    return project


@pytest.mark.parametrize("how", [["--source", "mine"], ["--set", "source=mine"]])
def test_a_named_source_goes_into_a_folder_of_its_own(folder, checkout, capsys, how):
    fill(folder, a="rex, waving")
    assert main(["prepare", *how, "--set", "base_model=random-tiny"]) == 0
    assert "params/cpu.yaml (you named a source of your own)" in capsys.readouterr().out
    assert (checkout / "training_data" / "instance_images" / "a.png").is_file()
    assert not (checkout / "outputs" / "demo").exists()


@pytest.mark.parametrize("first", ["mine", "bunny-world"])
def test_the_demos_film_and_ones_own_frames_never_replace_each_other(folder, tiny_model, first):
    fill(folder, a="rex, waving")
    draw_demo_film()
    configs = {name: tiny_config(tiny_model, source=name) for name in ("mine", "bunny-world")}
    prepare_data(configs.pop(first))
    (other,) = configs.values()
    before = sorted(path.name for path in other.data_path.iterdir())
    for step in (prepare_data, lambda config: LoRATrainer(config=config).prepare_data()):
        with pytest.raises(BunnyLoraError, match="kept apart: set data_dir"):
            step(other)
    assert sorted(path.name for path in other.data_path.iterdir()) == before


def test_ones_own_frames_never_go_into_the_demos_folder(folder, checkout):
    fill(folder, a="rex, waving")
    config = load_config("params/demo.yaml", {"source": "mine", "base_model": "random-tiny"})
    with pytest.raises(BunnyLoraError, match=r"outputs/demo/.* is the demo's.*params/cpu.yaml"):
        prepare_data(config)
    assert not config.data_path.exists()


def test_another_source_that_replaces_the_first_is_said(folder, project, tiny_model):
    fill(folder, a="rex, waving")
    fill(project / "other", b="rex, running")
    config = tiny_config(tiny_model, source="other", character_names=["rex"])
    prepare_data(tiny_config(tiny_model, source="mine"))
    assert remarks(prepare_data(config)) == ["This replaces what was prepared from mine"]
    assert remarks(prepare_data(config)) == []


# --- who is who


def run_of(project: Path, *known: object, caption: str = "a small grey bunny in a meadow") -> Path:
    run = project / "outputs" / "film"
    (run / "llm_analysis").mkdir(parents=True, exist_ok=True)
    records = []
    for number, names in enumerate(known):
        draw(run / f"{number}.png")
        record = {"frame_path": f"{number}.png", "sd_caption": caption, "confidence": 1}
        records.append(record | {"characters_identified": names})
    (run / "llm_analysis" / "llm_analysis.json").write_text(json.dumps(records))
    return run


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["none"], ()),
        (["unknown"], ()),
        ("None", ()),
        (["N/A", "-", "?"], ()),
        (["No named characters", "unidentified bunny"], ()),
        (["ellie and rex"], ("ellie", "rex")),
        ("Ellie, Rex and Phil", ("ellie", "rex", "phil")),
        (["ellie & rex", "Rex"], ("ellie", "rex")),
        (["andy", "noone's cat", "nonna", "🦖"], ("andy", "noone's cat", "nonna", "🦖")),
    ],
)
def test_what_is_no_name_is_none_and_what_is_two_is_two(project, given, names):
    (frame,) = read_source(run_of(project, given)).frames
    assert frame.characters == names


def test_what_was_taken_for_no_name_is_said(project):
    source = read_source(run_of(project, ["none"], ["none", "ellie and rex"], ["ellie"], None))
    assert source.notes == [
        "characters_identified: no names: 'none' (2)",
        "characters_identified: several names in one: 'ellie and rex' (1)",
    ]


def test_data_in_which_nobody_is_named_say_so_until_the_key_names_them(folder, tiny_model):
    fill(folder, a="Zorblax the fox, waving", b="a trexed fox", c="zorblax and rex")
    (line,) = remarks(prepare_data(tiny_config(tiny_model, source="mine")))
    assert line.startswith("nobody is named in these data") and "character_names" in line
    names = ["zorblax", "Rex", "mimi"]
    summary = prepare_data(tiny_config(tiny_model, source="mine", character_names=names))
    assert summary["characters"] == {"rex": 1, "zorblax": 2}
    assert remarks(summary)[0] == "character_names: no caption has 'mimi'"
    assert [image["characters"] for image in summary["images"]] == [["zorblax"], [], ["zorblax", "rex"]]


def test_the_key_names_characters_of_stage_4_and_of_a_folder_as_it_is(folder, project, tiny_model):
    run = run_of(project, [], ["phil"], caption="rex, a small grey bunny")
    frames = read_source(run, character_names=["rex"]).frames
    assert [frame.characters for frame in frames] == [("rex",), ("phil", "rex")]
    fill(folder, a="rex, waving")
    assert dataset.read_samples(folder, character_names=["rex"])[0].characters == ("rex",)
    config = tiny_config(tiny_model, data_dir="mine")
    assert check_as_it_is(config)[0].startswith("nobody is named")
    assert check_as_it_is(tiny_config(tiny_model, data_dir="mine", character_names=["rex"])) == []


@pytest.mark.parametrize(
    "caption", ["森の中のエリー", "エリーが走る", "엘리가 걷다 エリー", "café エリー"]
)
def test_names_are_found_in_scripts_that_do_not_part_their_words(caption):
    assert names_in(caption, ["エリー"]) and not names_in("a trex", ["rex"])
    assert names_in(unicodedata.normalize("NFC", f"{caption} rex"), ["rex"])


# --- pictures of every kind


@pytest.mark.parametrize(
    "ending", ["jpg", "jpeg", "JPEG", "jpe", "jfif", "jif", "jfi", "pjpeg", "pjp", "mpo"]
)
def test_a_jpeg_is_read_and_copied_under_every_ending(folder, project, ending):
    path = draw(folder / f"a.{ending}", "JPEG")
    (folder / "a.txt").write_text("rex")
    (image,) = prepare(read_source(folder), project / "data" / "images")["images"]
    assert image["file_name"].lower() in ("a.jpg", "a.jpeg")
    assert (project / "data" / "images" / image["file_name"]).read_bytes() == path.read_bytes()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_is_read(folder, project):
    draw(folder / "a.avif")
    (image,) = prepare(read_source(folder, instance_prompt="rex"), project / "d" / "i")["images"]
    assert image["file_name"] == "a.png"


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "HEIC"),
        (b"\xff\x0a\0\0", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n", "JPEG XL"),
    ],
)
def test_a_phones_picture_under_a_false_name_is_told_apart_from_a_broken_one(folder, start, kind):
    (folder / "a.jpg").write_bytes(start + bytes(64))
    (item,) = read_source(folder, instance_prompt="rex").dropped
    advice = f"a.jpg is {kind}; save it as PNG or JPEG, whatever its ending says"
    assert item.reason == f"format not read: {advice}"


def chunks(place: str) -> dict[str, PngInfo | bytes]:
    info = PngInfo()
    if place == "zTXt":
        info.add_text("workflow", "x" * (2 << 20), zip=True)
    elif place == "iTXt":
        info.add_itxt("workflow", "x" * (2 << 20), zip=True)
    elif place == "tEXt":
        for number in range(3):
            info.add_text(f"history {number}", "x" * (24 << 20))
    return {"pnginfo": info}


@pytest.mark.parametrize("place", ["zTXt", "iTXt", "tEXt"])
def test_a_png_with_a_huge_text_is_read_and_written_without_it(folder, project, place):
    picture = Image.new("RGB", (48, 40), (10, 200, 30))
    picture.save(folder / "a.png", **chunks(place))
    with pytest.raises(ValueError, match=r"Decompressed data too large|Too much memory"):
        Image.open(folder / "a.png").load()
    prepare(read_source(folder, instance_prompt="rex"), project / "data" / "images")
    written = open_image(project / "data" / "images" / "a.png")
    assert written.tobytes() == picture.tobytes() and not written.info
    jsonl(folder, {"file_name": "a.png", "text": "rex"})
    assert dataset.ImageDataset(folder, resolution=32, center_crop=True)[0].shape == (3, 32, 32)


def test_a_png_with_a_huge_profile_keeps_its_colours(folder, monkeypatch):
    picture = Image.new("RGB", (48, 40), (100, 150, 200))
    picture.save(folder / "a.png", icc_profile=display_p3())
    expected = open_rgb(folder / "a.png").tobytes()
    assert expected != picture.tobytes()
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 16)
    with pytest.raises(ValueError, match="too large"):
        Image.open(folder / "a.png")
    assert open_rgb(folder / "a.png").tobytes() == expected
    assert inspect(folder / "a.png") == (48, 40) and plain_suffix(folder / "a.png") is None


# --- text beyond the encoder's limit


LONG = "walking through a wide forest " * 30


@pytest.mark.parametrize("place", ["source", "data_dir"])
def test_what_of_captions_is_cut_is_said_with_the_names_in_it(folder, tiny_model, place):
    def said(*names: str) -> str:
        config = tiny_config(tiny_model, character_names=list(names), **{place: "mine"})
        lines = remarks(prepare_data(config)) if place == "source" else check_as_it_is(config)
        return next((line for line in lines if "tokens" in line), "")

    fill(folder, a="rex, walking")
    assert said("rex") == ""
    fill(folder, b=LONG + "rex", c=f"{LONG} phil")
    assert re.fullmatch(
        r"2 of 3 captions are longer than the 77 tokens that the text encoder reads: of the longest,"
        r" the last \d+ are lost; no name is, since in 2 they were put in front",
        said("rex", "phil"),
    )
    assert said().endswith("are lost, and maybe a name")
    crowd = [f"somebody called number {number}" for number in range(40)]
    fill(folder, d=", ".join(crowd))
    assert re.search(r"and in some a name: .*'somebody called number 39'", said("rex", *crowd))


# --- messages that know their reason


@pytest.mark.parametrize(
    ("rows", "message", "absent"),
    [
        ("nonsense\n", r"1 invalid entry\. line 1: invalid entry: line 1 of metadata.jsonl", "confid"),
        ('{"file_name": "b.png"}\n', r"1 missing frame\. b: missing frame: b.png\. Copy", "instance_p"),
        ('{"file_name": "a.png"}\n', r"1 no caption\. a: no caption.*instance_prompt", "confid"),
        ('{"file_name": "a.txt", "text": "x"}\n', r"1 broken image\. .*Save broken", "confid"),
    ],
)
def test_what_helps_has_to_do_with_the_reason(folder, project, rows, message, absent):
    if "a.png" in rows:
        draw(folder / "a.png")
    (folder / "a.txt").write_text(" ")
    (folder / "metadata.jsonl").write_text(rows)
    with pytest.raises(BunnyLoraError, match=message) as error:
        prepare(read_source(folder), project / "data" / "images")
    assert absent not in str(error.value)


def test_low_confidence_is_helped_by_a_lower_bound(project):
    run = run_of(project, [])
    with pytest.raises(BunnyLoraError, match=r"1 low confidence\..*A lower min_confidence"):
        prepare(read_source(run, min_confidence=1.1), project / "data" / "images")


def test_only_what_can_be_trained_on_is_told_to_be(folder, project):
    fill(folder, a="rex, waving")
    data_dir = draw(project / "data" / "images" / "own.png").parent
    with pytest.raises(BunnyLoraError, match=r"It has no captions.*name it as the source") as error:
        prepare(read_source(folder), data_dir)
    assert "go on without" not in str(error.value)
    (data_dir / "own.txt").write_text("phil, waving")
    with pytest.raises(BunnyLoraError, match="To train on it as it is, go on without preparing"):
        prepare(read_source(folder), data_dir)


def test_a_data_dir_inside_its_own_source_is_refused(folder):
    fill(folder, a="rex, waving")
    with pytest.raises(BunnyLoraError, match="lies in the source"):
        prepare(read_source(folder), folder / "prepared")
    assert not (folder / "prepared").exists()
