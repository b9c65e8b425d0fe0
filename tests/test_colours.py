"""No wrong colour reaches training: pictures of every kind, through preparing, back as pixels."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from bunny_lora.data.images import inspect, open_rgb, plain_bytes, plain_suffix
from bunny_lora.data.writing import prepare
from bunny_lora.dataset import ImageDataset
from bunny_lora.errors import LeftOutError
from bunny_lora.stage4 import read_source

SIDE = 40
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
EXACT, JPEG = 0, 3  # Levels of 256 that the pixels may be off.


def s15f16(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def display_p3() -> bytes:
    """Display-P3 as an ICC profile: the primaries of every recent phone and laptop screen."""
    curve = b"para" + struct.pack(">IHH", 0, 3, 0)
    curve += s15f16(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {
        b"desc": b"desc" + struct.pack(">II", 0, 11) + b"Display P3\0" + bytes(79),
        b"wtpt": b"XYZ " + bytes(4) + s15f16(0.9642, 1, 0.8249),
        b"rXYZ": b"XYZ " + bytes(4) + s15f16(0.51512, 0.2412, -0.00105),
        b"gXYZ": b"XYZ " + bytes(4) + s15f16(0.29198, 0.69225, 0.04189),
        b"bXYZ": b"XYZ " + bytes(4) + s15f16(0.1571, 0.06657, 0.78407),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    return _profile(b"RGB ", tags)


def dark_grey() -> bytes:
    """A grey profile with gamma 1: stored 128 is a much lighter grey on a screen."""
    white = b"XYZ " + bytes(4) + s15f16(0.9642, 1, 0.8249)
    return _profile(b"GRAY", {b"wtpt": white, b"kTRC": b"curv" + struct.pack(">II", 0, 0)})


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, data = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + s15f16(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def flat(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), colour)


def palette(colour: tuple) -> Image.Image:
    image = flat("P", 0)
    image.putpalette([*colour] * 256)
    return image


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png16(colour_type: int, *pixel: int, extra: bytes = b"") -> bytes:
    """A PNG with 16 bits a channel, which Pillow itself cannot write in colour."""
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 16, colour_type, 0, 0, 0)
    rows = (b"\0" + struct.pack(f">{len(pixel)}H", *pixel) * SIDE) * SIDE
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# Display-P3 (128, 200, 64) by the matrix in https://www.w3.org/TR/css-color-4/#color-conversion-code
IN_SRGB = (103, 202, 19)
MOVING = {"save_all": True, "append_images": [flat("RGB", "blue")], "duration": 100}
# name: (picture or bytes, how to save it, the colour on a screen, levels it may be off)
PICTURES = {
    "plain.png": (flat("RGB", (10, 200, 30)), {}, (10, 200, 30), EXACT),
    "plain.jpg": (flat("RGB", (10, 200, 30)), {"quality": 95}, (10, 200, 30), JPEG),
    "really_a_png.jpg": (flat("RGB", RED), {"format": "PNG"}, RED, EXACT),
    "black_and_white.png": (flat("1", 1), {}, (255, 255, 255), EXACT),
    "grey.png": (flat("L", 77), {}, (77, 77, 77), EXACT),
    "grey.jpg": (flat("L", 77), {}, (77, 77, 77), JPEG),
    "grey_alpha.png": (flat("LA", (77, 128)), {}, (166, 166, 166), 1),
    "half_red.png": (flat("RGBA", (255, 0, 0, 128)), {}, (255, 127, 127), 1),
    "clear.webp": (flat("RGBA", (255, 0, 0, 0)), {}, (255, 255, 255), EXACT),
    "clear.tif": (flat("RGBA", (255, 0, 0, 0)), {}, (255, 255, 255), EXACT),
    "palette.png": (palette((10, 200, 30)), {}, (10, 200, 30), EXACT),
    "palette_clear.png": (palette(RED), {"transparency": 0}, (255, 255, 255), EXACT),
    "palette_half.png": (palette(RED), {"transparency": bytes([128] * 256)}, (255, 127, 127), 1),
    "grey16.png": (png16(0, 0x8000), {}, (128, 128, 128), EXACT),
    "grey16.tif": (flat("I;16", 0x8000), {}, (128, 128, 128), EXACT),
    "grey_alpha16.png": (png16(4, 0x8000, 0), {}, (255, 255, 255), EXACT),
    "rgb16.png": (png16(2, 0x8000, 0x4000, 0xC000), {}, (128, 64, 192), EXACT),
    "rgba16.png": (png16(6, 0x8000, 0x4000, 0xC000, 0xFFFF), {}, (128, 64, 192), EXACT),
    "cmyk.jpg": (flat("CMYK", (0, 255, 255, 0)), {"quality": 95}, RED, JPEG),
    "cmyk.tif": (flat("CMYK", (0, 255, 255, 0)), {}, RED, EXACT),
    "lab.tif": (flat("LAB", (255, 128, 128)), {}, (255, 255, 255), 1),
    "ycbcr.tif": (flat("YCbCr", (150, 128, 128)), {}, (150, 150, 150), EXACT),
    "moving.gif": (flat("RGB", RED), MOVING, RED, EXACT),
    "moving.webp": (flat("RGB", RED), MOVING | {"lossless": True}, RED, EXACT),
    "moving.png": (flat("RGB", RED), MOVING, RED, EXACT),
    "pages.tif": (flat("RGB", RED), MOVING, RED, EXACT),
    "srgb.jpg": (flat("RGB", GREEN), {"icc_profile": SRGB, "quality": 95}, GREEN, JPEG),
    "p3.png": (flat("RGB", (128, 200, 64)), {"icc_profile": display_p3()}, IN_SRGB, 2),
    "p3.jpg": (flat("RGB", (128, 200, 64)), {"icc_profile": display_p3()}, IN_SRGB, 5),
    "p3_clear.png": (flat("RGBA", (1, 2, 3, 0)), {"icc_profile": display_p3()}, (255,) * 3, EXACT),
    "p3_palette.png": (palette((128, 200, 64)), {"icc_profile": display_p3()}, IN_SRGB, 2),
    "linear_grey.png": (flat("L", 128), {"icc_profile": dark_grey()}, (188, 188, 188), 2),
    "linear_grey_alpha.png": (flat("LA", (128, 255)), {"icc_profile": dark_grey()}, (188,) * 3, 2),
    "broken_profile.png": (flat("RGB", BLUE), {"icc_profile": b"junk" * 50}, BLUE, EXACT),
    "profile_of_lab.png": (flat("RGB", BLUE), {"icc_profile": LAB}, BLUE, EXACT),
    "profile_of_rgb.png": (flat("L", 77), {"icc_profile": display_p3()}, (77, 77, 77), EXACT),
}


def write(path: Path, image: Image.Image | bytes, options: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        image.save(path, **options)
    return path


def furthest(image: Image.Image, colour: tuple) -> int:
    return int(np.abs(np.asarray(image, np.int16) - np.array(colour)).max())


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_is_shown_in_its_own_colours(tmp_path, name):
    image, options, colour, levels = PICTURES[name]
    path = write(tmp_path / name, image, options)
    assert inspect(path) == (SIDE, SIDE)
    assert furthest(open_rgb(path), colour) <= levels
    # What is written for others: a reader that knows no profile, alpha or rotation shows the same.
    with Image.open(io.BytesIO(plain_bytes(path))) as written:
        assert (written.mode, getattr(written, "n_frames", 1)) == ("RGB", 1)
        assert furthest(written, colour) <= levels
        copied = plain_suffix(path) is not None
        assert copied or not written.info.keys() & {"icc_profile", "transparency", "exif"}


def test_only_files_that_any_reader_shows_alike_are_copied_byte_for_byte(tmp_path):
    copied = {
        name for name, case in PICTURES.items() if plain_suffix(write(tmp_path / name, *case[:2]))
    }
    assert copied == {"plain.png", "plain.jpg", "srgb.jpg"}


def test_all_of_them_train_with_those_colours(project):
    run = project / "outputs" / "run"
    entries = []
    for name, (image, options, *_) in PICTURES.items():
        write(run / "frames" / name, image, options)
        caption = {"sd_caption": f"a flat colour called {name}", "confidence": 0.9}
        entries.append({"frame_path": f"frames/{name}"} | caption)
    path = run / "llm_analysis" / "llm_analysis.json"
    path.parent.mkdir()
    path.write_text(json.dumps(entries))
    source = read_source(path)
    assert (len(source.frames), source.dropped) == (len(PICTURES), [])
    prepare(source, project / "data" / "images")
    images = ImageDataset(project / "data" / "images", resolution=32, center_crop=True)
    for tensor, (name, case) in zip(images, PICTURES.items(), strict=True):
        pixels = ((tensor + 1) * 127.5).round().permute(1, 2, 0).numpy()
        assert np.abs(pixels - np.array(case[2])).max() <= case[3], name


Turn = Image.Transpose
UNDO = [None, Turn.FLIP_LEFT_RIGHT, Turn.ROTATE_180, Turn.FLIP_TOP_BOTTOM, Turn.TRANSPOSE]
UNDO += [Turn.ROTATE_90, Turn.TRANSVERSE, Turn.ROTATE_270]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_all_eight_rotations_are_put_upright(tmp_path, orientation, suffix):
    upright = Image.new("RGB", (64, 48), "white")
    upright.paste("red", (0, 0, 32, 24))
    how = UNDO[orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if how is None else upright.transpose(how)
    path = write(tmp_path / f"turned.{suffix}", stored, {"exif": exif})
    assert inspect(path) == (64, 48)
    for image in (open_rgb(path), Image.open(io.BytesIO(plain_bytes(path)))):
        assert image.size == (64, 48)
        corners = [image.getpixel(point) for point in ((8, 8), (56, 8), (8, 40), (56, 40))]
        assert [pixel[1] > 128 for pixel in corners] == [False, True, True, True]


def test_a_16_bit_transparent_colour_is_left_out_rather_than_guessed(tmp_path):
    one_colour = chunk(b"tRNS", struct.pack(">H", 0x8000))
    path = write(tmp_path / "a.png", png16(0, 0x8000, extra=one_colour), {})
    with pytest.raises(LeftOutError, match=r"broken image: a.png: a transparent colour in 16 bits"):
        inspect(path)
