"""Files that are no good picture: each is left out with its reason, and the rest is trained on."""

import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bunny_lora.data.images import inspect, plain_bytes
from bunny_lora.data.writing import prepare
from bunny_lora.errors import BunnyLoraError, LeftOutError
from bunny_lora.stage4 import read_source


def noise(width=64, height=48, mode="RGB"):
    random = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(random).convert(mode)


def encoded(kind: str, image: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or noise()).save(buffer, kind, **options)
    return buffer.getvalue()


WHOLE = {
    "jpg": encoded("JPEG"),
    "png": encoded("PNG"),
    "gif": encoded("GIF"),
    "webp": encoded("WEBP", lossless=True),
    "bmp": encoded("BMP"),
    "tif": encoded("TIFF", compression="tiff_deflate"),
}
MOVING = [encoded(kind, save_all=True, append_images=[noise()]) for kind in ("GIF", "WEBP", "PNG")]
BROKEN = {
    **{f"cut.{kind}": (data[: len(data) // 2], "broken image: cut.") for kind, data in WHOLE.items()},
    **{f"head.{kind}": (data[:12], "broken image: head.") for kind, data in WHOLE.items()},
    "zero.jpg": (b"", "broken image: zero.jpg is an empty file"),
    "zeros.png": (bytes(4096), "is not a picture in a known format"),
    "text.jpg": (b"not a picture", "is not a picture in a known format"),
    "page.png": (b"<!DOCTYPE html><html>404</html>", "is not a picture in a known format"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "not a picture in a known"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture in a known format"),
    "other.jp2": (encoded("JPEG2000"), "format not read: other.jp2 is JPEG 2000; save it as PNG"),
    "integers.tif": (
        encoded("TIFF", Image.new("I", (40, 40), 70_000)),
        "32-bit pixels (mode I) have no",
    ),
    "floats.tif": (encoded("TIFF", Image.new("F", (40, 40), 0.5)), "32-bit pixels (mode F) have no"),
    "point.png": (
        encoded("PNG", noise(1, 1)),
        "absurd image: point.png is 1 x 1 px, a side under 32 px",
    ),
    "thin.png": (encoded("PNG", Image.new("RGB", (20_000, 32))), "one side over 4 times the other"),
    "wide.png": (encoded("PNG", Image.new("1", (20_001, 4400))), "a side over 20000 px"),
    "bomb.png": (encoded("PNG", Image.new("1", (19_000, 19_000))), "more than 89 million pixels"),
    "bomb.gif": (encoded("GIF", Image.new("L", (10_000, 10_000))), "more than 89 million pixels"),
}


def test_each_bad_file_is_left_out_with_its_reason_and_the_good_one_is_trained_on(project):
    run = project / "outputs" / "run"
    (run / "llm_analysis").mkdir(parents=True)
    files = {name: data for name, (data, _) in BROKEN.items()} | {"good.jpg": WHOLE["jpg"]}
    for name, data in files.items():
        (run / name).write_bytes(data)
    entry = {"sd_caption": "rex, a small green dinosaur", "confidence": 0.9}
    records = [entry | {"frame_path": name, "frame_id": name} for name in files]
    (run / "llm_analysis" / "llm_analysis.json").write_text(json.dumps(records))
    summary = prepare(read_source(run), project / "data" / "images")
    reasons = {item["frame_id"]: item["reason"] for item in summary["dropped"]}
    assert list(reasons) == list(BROKEN)
    assert [name for name, (_, reason) in BROKEN.items() if reason not in reasons[name]] == []
    assert all(str(project) not in reason for reason in reasons.values())
    assert [image["frame_id"] for image in summary["images"]] == ["good.jpg"]
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == files


@pytest.mark.parametrize("name", ["loop.jpg", "dangling.jpg", "folder.jpg"])
def test_what_is_no_file_is_a_missing_frame(project, name):
    run = project / "outputs" / "run"
    (run / "llm_analysis").mkdir(parents=True)
    (run / "folder.jpg").mkdir()
    (run / "loop.jpg").symlink_to(run / "loop.jpg")
    (run / "dangling.jpg").symlink_to(run / "nowhere.jpg")
    record = {"frame_path": name, "sd_caption": "rex, a small green dinosaur", "confidence": 0.9}
    (run / "llm_analysis" / "llm_analysis.json").write_text(json.dumps([record]))
    assert read_source(run).dropped[0].reason == f"missing frame: {name}"


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_picture_that_breaks_between_reading_and_writing_stops_with_the_old_data_whole(
    project, spoil
):
    folder = project / "mine"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(WHOLE["jpg"])
    data_dir = project / "data" / "images"
    prepare(read_source(folder, instance_prompt="rex"), data_dir)
    before = {path: path.read_bytes() for path in data_dir.iterdir()}
    source = read_source(folder, instance_prompt="a dinosaur")
    spoil(folder / "a.jpg")
    with pytest.raises(BunnyLoraError, match=r"a\.jpg.*changed while it was read.*again"):
        prepare(source, data_dir)
    assert {path: path.read_bytes() for path in data_dir.iterdir()} == before


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([*WHOLE.values(), *MOVING]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    st.floats(0.2, 1),
)
def test_any_damage_is_left_out_or_gives_a_whole_picture(tmp_path, data, changes, kept):
    spoilt = bytearray(data)
    for place, value in changes:
        spoilt[int(place * (len(spoilt) - 1))] = value
    path = tmp_path / "a.bin"
    path.write_bytes(spoilt[: int(kept * len(spoilt))])
    try:
        size = inspect(path)
    except LeftOutError as error:
        assert str(error).startswith(("broken image: a.bin", "absurd image: a.bin"))
        return
    with Image.open(io.BytesIO(plain_bytes(path))) as written:
        written.load()
        assert (written.mode, written.size) == ("RGB", size)
