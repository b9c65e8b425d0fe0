"""Where a character is seen: references from the film, and windows of other pictures."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from PIL import Image, ImageDraw

from bunny_lora.data.frames import Sample
from bunny_lora.data.images import FACE_TO_BODY
from bunny_lora.evaluation import cutouts
from bunny_lora.evaluation.cutouts import Cutout
from bunny_lora.model.image_encoder import FeatureExtractor
from bunny_lora.training import faces

SKIES = ["#87ceeb", "#204020", "#f5deb3", "#402040", "#dddddd"]


def mean_colour(images: list[Image.Image]) -> torch.Tensor:
    return torch.tensor(
        [image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for image in images]
    )


COLOURS = FeatureExtractor("colours", lambda images: mean_colour(images).float())


def frame(folder: Path, sky: str, furs: list[str], names: str = "", *, found: bool = True) -> Sample:
    """A wide frame with a disc for each fur, and the box of its face where it was found."""
    image = Image.new("RGB", (160, 80), sky)
    boxes = [(20 + 60 * place, 30, 30 + 60 * place, 40) for place in range(len(furs))]
    for (left, top, right, bottom), fur in zip(boxes, furs, strict=True):
        ImageDraw.Draw(image).ellipse([left - 10, top - 10, right + 10, bottom + 20], fill=fur)
    path = folder / f"{len(list(folder.iterdir())):03d}.png"
    image.save(path)
    faces = tuple(boxes) if found else ()
    return Sample(path.stem, path, "a caption", tuple(names.split()), faces=faces, size=image.size)


def test_a_reference_is_a_face_grown_to_a_body_and_one_stands_for_a_shot(
    tmp_path: Path, capsys
) -> None:
    film = [frame(tmp_path, sky, ["red"], "rex") for sky in SKIES[:3] for _ in range(3)]
    hidden = frame(tmp_path, SKIES[3], ["red"], "rex", found=False)
    found = cutouts.references([*film, hidden], ["rex"])
    assert [cutout.path for cutout in found["rex"]] == [film[i].path for i in (0, 3, 6)]
    assert "1 images that name a character show no face" in capsys.readouterr().out
    crop = found["rex"][0].image()
    width = FACE_TO_BODY * 10  # of the frame, all around the face
    assert crop.getpixel((5, 5)) == Image.new("RGB", (1, 1), SKIES[0]).getpixel((0, 0))
    assert crop.getpixel((crop.width // 2, round(crop.height * (20 + 0.9 * width / 2) / width))) == (
        255,
        0,
        0,
    )


def test_who_is_meant_is_told_by_the_faces_that_are_tied_to_names(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    film = [
        frame(tmp_path, SKIES[0], ["red"], "rex"),
        frame(tmp_path, SKIES[1], ["blue", "red"], "rex ellie"),
    ]
    alone = cutouts.references(film, ["rex", "ellie"])
    assert alone["ellie"] == [Cutout(film[1].path, film[1].faces[0])]
    assert "ellie: nowhere alone with one face" in capsys.readouterr().out
    tied = cutouts.references(film, ["rex", "ellie"], [("rex",), ("ellie", "rex")])
    assert [cutout.box for cutout in tied["rex"]] == [film[0].faces[0], film[1].faces[1]]
    assert not capsys.readouterr().out
    monkeypatch.setattr(cutouts, "load_image_encoder", lambda *_: COLOURS)
    monkeypatch.setattr(faces, "MARGIN", 0.01)
    film.append(frame(tmp_path, SKIES[2], ["blue"], "ellie"))
    named = cutouts.tied_faces(film, tiny_config("random-tiny", face_encoder="bunny-world"))
    assert named == [("rex",), ("ellie", "rex"), ("ellie",)]
    by_features = tiny_config("random-tiny", evaluation={"features": "a/clip"})
    assert cutouts.tied_faces(film, by_features) == named
    assert cutouts.tied_faces(film, tiny_config("random-tiny")) is None  # palettes tell nobody


def test_pictures_whose_faces_nobody_looked_for_are_taken_whole_and_that_is_said(
    tmp_path: Path, capsys
) -> None:
    film = [frame(tmp_path, sky, ["red"], "rex", found=False) for sky in SKIES]
    found = cutouts.references(film, ["rex"])
    assert [cutout.box for cutout in found["rex"]] == [None] * 5
    assert found["rex"][0].image().size == (cutouts.CROP_SIZE_PX,) * 2
    by_features = tiny_config("random-tiny", evaluation={"features": "a/clip"})
    assert cutouts.tied_faces(film, by_features) is None  # and nothing is loaded for it
    said = capsys.readouterr().out
    assert "rex: no face was found, so whole images stand in" in said and "left out" not in said


@pytest.mark.parametrize("place", [(0, 0), (32, 32), (16, 48)])
def test_a_character_is_found_wherever_it_is(place: tuple[int, int]) -> None:
    image = Image.new("RGB", (64, 64), "black")
    image.paste(Image.new("RGB", (32, 32), "red"), place)
    image.paste(Image.new("RGB", (8, 8), "blue"), (28, 0))
    seen = cutouts.look([image, Image.new("RGB", (64, 80), "black")], COLOURS)
    assert seen.shape == (2, 14, 3)
    red = COLOURS([Image.new("RGB", (8, 8), "red")])
    found, absent = cutouts.likeness(seen, red)
    assert found == pytest.approx(1, abs=0.02) and absent == pytest.approx(0, abs=0.02)
