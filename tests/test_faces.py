"""Faces tied to names, and what a view from near shows and is called."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import draw_frames, open_image, tiny_config
from PIL import Image

from bunny_lora.core.files import write_json
from bunny_lora.data.captions import name_only, near_caption
from bunny_lora.data.frames import Sample
from bunny_lora.data.summary import SCHEMA_VERSION, SUMMARY
from bunny_lora.dataset import ImageDataset
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model.image_encoder import FeatureExtractor
from bunny_lora.training import faces, latents, masks, setup

FURS = {"ellie": "red", "rex": "lime", "phil": "blue", "nobody": "yellow", "grey": "#808080"}
PLACES = [(10, 20, 18, 28), (44, 20, 52, 28), (78, 20, 86, 28)]  # far enough apart for crops of one


def mean_colour(images: list[Image.Image]) -> torch.Tensor:
    centres = [image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for image in images]
    return torch.tensor(centres, dtype=torch.float32)


COLOURS = FeatureExtractor("colours", mean_colour)


def frame(folder: Path, names: str, furs: str) -> Sample:
    """A frame with these names on it, in which these characters are seen from left to right."""
    image = Image.new("RGB", (96, 54))
    seen = list(zip(furs.split(), PLACES, strict=False))
    for fur, (x1, y1, x2, y2) in seen:
        image.paste(FURS[fur], (x1 - 8, y1 - 8, x2 + 8, y2 + 8))
    folder.mkdir(exist_ok=True)
    path = folder / f"{len(list(folder.glob('*.png'))):02d}.png"
    image.save(path)
    boxes = tuple(tuple(map(float, box)) for _, box in seen)
    who = tuple(names.split())
    caption = ", ".join([" and ".join(who), "wide shot"])
    return Sample(path.stem, path, caption, who, faces=boxes, size=(96, 54))  # type: ignore[arg-type]


def dataset(samples: list[Sample]) -> ImageDataset:
    return ImageDataset(samples, resolution=32, center_crop=False)


@pytest.fixture
def alone(tmp_path: Path) -> list[Sample]:
    """Pictures that leave no doubt, of three characters."""
    return [frame(tmp_path / "frames", name, name) for name in ("ellie", "rex", "phil", "ellie")]


@pytest.mark.parametrize(
    "names, furs, tied",
    [
        ("ellie rex", "rex ellie", ("rex", "ellie")),
        ("ellie rex phil", "phil ellie rex", ("phil", "ellie", "rex")),
        ("rex", "nobody rex", (None, "rex")),
        ("ellie rex", "phil rex ellie", (None, "rex", "ellie")),
        ("ellie rex", "rex", ("rex",)),
        ("ellie phil rex", "rex ellie", ("rex", "ellie")),
        ("ellie", "ellie", ("ellie",)),
        ("ellie", "", ()),
        ("", "ellie rex", (None, None)),
        ("ellie victoria", "ellie nobody", ("ellie", None)),
        ("victoria ellie rex", "nobody rex ellie", (None, "rex", "ellie")),
    ],
)
def test_each_name_gets_the_face_that_is_like_it_elsewhere(
    tmp_path: Path, alone: list[Sample], names: str, furs: str, tied: tuple
) -> None:
    images = dataset([*alone, frame(tmp_path / "frames", names, furs)])
    assert faces.tie_faces(images, COLOURS)[4] == tied


@pytest.mark.parametrize(
    "names, furs, doubt",
    [
        ("ellie", "ellie ellie", faces.UNCLEAR),
        ("ellie rex", "ellie phil", faces.UNCLEAR),  # Rex is not seen, and Phil is not meant
        ("ellie rex", "grey grey", faces.UNCLEAR),
        ("victoria", "ellie nobody", faces.NO_PROTOTYPE),
        ("ellie rex victoria", "ellie nobody", faces.HIDDEN),
        ("ellie victoria", "grey nobody", faces.UNCLEAR),
    ],
)
def test_where_it_is_in_doubt_nobody_is_tied_and_that_is_said(
    tmp_path: Path,
    alone: list[Sample],
    names: str,
    furs: str,
    doubt: str,
    capsys: pytest.CaptureFixture,
) -> None:
    images = dataset([*alone, frame(tmp_path / "frames", names, furs)])
    assert faces.tie_faces(images, COLOURS)[4] == (None, None)
    said = "face_encoder: 4 faces in 4 pictures are tied to names; 1 pictures are in doubt"
    assert f"{said} and taken as they are: 1 {doubt}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "others, tied",
    [
        (["ellie grey", "grey rex"], (None, "victoria")),
        (["ellie grey"], (None, None)),  # may be a passer-by
        (["ellie grey", "nobody rex"], (None, None)),  # one of them is
    ],
)
def test_who_is_alone_nowhere_is_known_by_the_faces_that_are_left(
    tmp_path: Path, alone: list[Sample], others: list[str], tied: tuple
) -> None:
    samples = list(alone)
    for furs in others:
        names = furs.replace("grey", "victoria").replace("nobody", "victoria")
        samples.append(frame(tmp_path / "frames", names, furs))
    samples.append(frame(tmp_path / "frames", "victoria", "nobody grey"))
    found = faces.tie_faces(dataset(samples), COLOURS)
    assert found[-1] == tied
    assert ("victoria" in found[4]) == (tied[1] == "victoria")


def test_a_crowd_is_left_alone(tmp_path: Path, alone: list[Sample], monkeypatch) -> None:
    monkeypatch.setattr(faces, "MAX_MATCHES", 5)
    images = dataset([*alone, frame(tmp_path / "frames", "ellie rex phil", "ellie rex phil")])
    assert faces.tie_faces(images, COLOURS)[4] == (None,) * 3


def test_each_named_face_has_a_view_from_near(tmp_path: Path, alone: list[Sample]) -> None:
    images = dataset([*alone, frame(tmp_path / "frames", "ellie rex", "nobody rex ellie")])
    assert [images.faces_to_zoom(index) for index in range(5)] == [[0]] * 4 + [[]]
    images.face_names = faces.tie_faces(images, COLOURS)
    assert images.faces_to_zoom(4) == [1, 2]
    for face, fur in ((1, "rex"), (2, "ellie")):
        near = (images.zoomed(4, face) + 1) * 127.5
        assert near.shape == (3, 32, 32)
        expected = torch.tensor(Image.new("RGB", (1, 1), FURS[fur]).getpixel((0, 0)))
        assert torch.equal(near[:, 16, 16].round(), expected.float())
    assert images.zoomed_caption(4, 1) == "rex, medium shot"
    assert images.zoomed_caption(4, 2) == "ellie, medium shot"


@pytest.mark.parametrize(
    "caption, near",
    [
        ("ellie and rex, a fox, wide shot, snow", "ellie, a fox, medium shot, snow"),
        ("rex and ellie, from far away", "ellie, medium shot"),
        ("ellie jumping, rex waving, snow", "ellie jumping, snow"),
        ("rex waving, ellie jumping, snow", "ellie jumping, snow"),
        ("Extreme wide-angle shot of ellie", "medium shot of ellie"),
        ("ellie, full-body shot, portrait", "ellie, full-body shot, portrait"),
        ("ellie, close-up", "ellie, close-up"),
    ],
)
def test_a_view_from_near_is_called_what_it_shows(caption: str, near: str) -> None:
    assert near_caption(caption, "ellie", ["rex"]) == near


@pytest.mark.parametrize(
    "caption, n_faces, ellie, rex",
    [
        ("ellie and rex, animated characters, a bunny in a bow waving, a red fox sitting, snow", 2,
         "ellie, animated character, a bunny in a bow waving, snow",
         "rex, animated character, a red fox sitting, snow"),
        ("rex and ellie, a fox, a bunny, snow", 2, "ellie, a bunny, snow", "rex, a fox, snow"),
        ("ellie, a bunny waving, a cream cat sitting, snow", 2, "ellie, a bunny waving, snow", None),
        ("ellie and rex, a bunny, a fox, a cream cat sitting", 3, "ellie, a bunny", "rex, a fox"),
        ("ellie, a bunny, a heart on the chest", 1, "ellie, a bunny, a heart on the chest", None),
        ("ellie and rex, a bunny with a bow, snow", 2, "ellie, a bunny with a bow, snow",
         "rex, a bunny with a bow, snow"),
        ("ellie and rex, huge grey bunny smiling up at rex from the grass, flowers", 1,
         "ellie, huge grey bunny smiling up, flowers",
         "rex, huge grey bunny smiling up at rex from the grass, flowers"),
        ("ellie and rex, fat bunny on his side while rex flies past, watching rex fly", 1,
         "ellie, fat bunny on his side", None),
    ],
)  # fmt: skip
def test_a_view_from_near_keeps_the_looks_of_the_one_it_shows(
    caption: str, n_faces: int, ellie: str, rex: str | None
) -> None:
    assert near_caption(caption, "ellie", ["rex"], n_faces=n_faces) == ellie
    if rex is not None:
        assert near_caption(caption, "rex", ["ellie"], n_faces=n_faces) == rex


def test_a_square_that_shows_some_has_the_looks_of_the_others_taken_out() -> None:
    caption = "ellie and rex, a bunny waving, a fox sitting, snow"
    assert name_only(caption, ["ellie", "phil"], ["rex"], 2) == "ellie, a bunny waving, snow"
    assert name_only(f"{caption}, a cat", ["ellie"], ["rex"], 3) == "ellie, a bunny waving, snow, a cat"


def test_a_face_that_fills_the_picture_makes_a_portrait(tmp_path: Path, alone: list[Sample]) -> None:
    large = replace(frame(tmp_path / "frames", "ellie", "ellie"), faces=((20.0, 6.0, 56.0, 42.0),))
    images = dataset([*alone, large])
    images.face_names = faces.tie_faces(images, COLOURS)
    assert images.zoomed_caption(0, 0) == "ellie, medium shot"
    assert images.zoomed_caption(4, 0) == "ellie, portrait"


@pytest.mark.parametrize("mirrored", [False, True])
def test_neighbours_in_a_view_from_near_are_masked(tmp_path: Path, mirrored: bool) -> None:
    """The view is 18 x 18 around the first face; the other's body is at its right edge."""
    sample = frame(tmp_path / "frames", "ellie rex", "ellie rex")
    sample = replace(sample, faces=((30.0, 10.0, 38.0, 18.0), (45.0, 14.0, 53.0, 22.0)))
    images = ImageDataset([sample], resolution=64, center_crop=False)
    images.face_names = [("ellie", "rex")]
    mask = latents._own_part(latents.View(0, True, mirrored), images)
    assert mask is not None and mask.shape == (8, 8)
    masked = mask.flip(-1) == 0 if mirrored else mask == 0
    assert masked.any(0).tolist() == [False] * 7 + [True]  # 45 - 3.2 px is 16.8 of 18 px into the view
    assert masked[:, 7].tolist() == [False] + [True] * 7
    assert masks.own_part(images, 0, 1) is not None
    images.samples = [replace(sample, faces=(sample.faces[0],))]
    assert masks.own_part(images, 0, 0) is None


@pytest.fixture
def data(project: Path) -> Path:
    """Five frames of which the last names two, whose faces are as those of the first two."""
    folder = draw_frames(project / "data" / "instance_images", 5)
    boxes = [list(map(float, box)) for box in (PLACES[0], PLACES[2])]
    who = [["ellie"], ["rex"], [], [], ["ellie", "rex"]]
    images = []
    for path, names in zip(sorted(folder.glob("*.png")), who, strict=True):
        image = open_image(path)
        for name, (x1, y1, x2, y2) in zip(names, PLACES[::2], strict=False):
            image.paste(FURS[name], (x1 - 8, y1 - 8, x2 + 8, y2 + 8))
        image.save(path)
        seen = {"characters": names, "faces": boxes[: len(names)]}
        images.append({"file_name": path.name, "size": [96, 54]} | seen)
    write_json(folder.parent / SUMMARY, {"schema_version": SCHEMA_VERSION, "images": images})
    rows = [f'{{"file_name": "{path.name}", "text": "ellie and rex, wide shot"}}\n' for path in
            sorted(folder.glob("*.png"))]  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def test_a_run_shows_all_who_are_named_from_near_as_often_as_whole(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    options: dict = {"zoom_on_faces": True, "center_crop": False}
    plain = setup.set_up(tiny_config(tiny_model, **options)).learner.images
    assert [len(views) for views in plain.views] == [2, 2, 1, 1, 1] and plain.view_captions == []
    encoder: dict = {"face_encoder": "bunny-world", "center_crop": False}
    config = tiny_config(tiny_model, zoom_on_faces=True, **encoder)
    images = setup.set_up(config).learner.images
    assert "face_encoder: 4 faces in 3 pictures" in capsys.readouterr().out
    assert [len(views) for views in images.views] == [2, 2, 1, 1, 4]
    called = [view.caption for view in images.views[4]]
    assert called == [None, None, "ellie, medium shot", "rex, medium shot"]
    seen = images.batch(0, 0, 1000, 1000).captions
    assert set(called[2:]) < set(seen)
    near = setup.set_up(tiny_config(tiny_model, zoom_on_faces="only", **encoder)).learner.images
    assert [len(views) for views in near.views] == [1, 1, 1, 1, 2]
    assert "zoom_on_faces does nothing" not in capsys.readouterr().out


def test_a_square_names_nobody_whose_face_it_cuts_off(tiny_model: str, data: Path) -> None:
    """The faces of the last frame lie too far apart for a square of 32 px; its third is of nobody."""
    config = tiny_config(tiny_model, face_encoder="bunny-world", center_crop=False)
    images = setup.set_up(config).learner.images
    assert images.view_captions == []
    captions = {images._draw(0, position, 4, 1000).captions[0] for position in range(40)}
    assert captions == {"ellie, wide shot", "rex, wide shot"}
    assert {images._draw(0, position, 2, 1000).captions[0] for position in range(5)} == {
        "ellie and rex, wide shot"
    }


@pytest.mark.parametrize("mirrored", [False, True])
def test_who_is_unseen_is_told_by_the_middle_of_the_face(mirrored: bool) -> None:
    """Who has no face, or one that nobody knows, may be anywhere."""
    boxes = [[0.0, 0.0, 2.0, 2.0], [3.0, 1.0, 5.0, 3.0], [6.0, 2.0, 8.0, 4.0]]
    if mirrored:
        boxes = [[8 - x2, y1, 8 - x1, y2] for x1, y1, x2, y2 in boxes]
    view = latents.EncodedView(torch.zeros(2, 4, 4, 8), boxes, face_names=("ellie", None, "rex"))
    left, right = ("ellie", "rex")[:: -1 if mirrored else 1]
    assert view.unseen(0, 0, 4) == {right} and view.unseen(4, 0, 4) == {left}
    assert view.unseen(2, 0, 4) == {left, right} and view.unseen(0, 0, 8) == set()


def test_the_middle_square_names_nobody_who_was_cut_off(tiny_model: str, data: Path) -> None:
    config = tiny_config(tiny_model, face_encoder="bunny-world")
    images = setup.set_up(config).learner.images
    called = ["rex, wide shot", "ellie, wide shot", None, None, "wide shot"]
    assert [views[0].caption for views in images.views] == called


def test_what_is_masked_counts_for_nothing_in_the_loss(
    tiny_model: str, data: Path, capsys: pytest.CaptureFixture
) -> None:
    options: dict = {"zoom_on_faces": True, "mask_neighbours": True, "center_crop": False}
    config = tiny_config(tiny_model, face_encoder="bunny-world", **options)
    learner = setup.set_up(config).learner
    assert "mask_neighbours does nothing: no view from near is known" in capsys.readouterr().out
    plain = learner.loss(0)
    views = learner.images.views
    half = torch.ones(4, 4).index_fill(1, torch.tensor([0, 1]), 0.0)
    losses = []
    for mask in (half, 1 - half):
        masked = [[replace(view, mask=mask) for view in of_one] for of_one in views]
        learner.images = replace(learner.images, views=masked)
        losses.append(learner.loss(0))
    assert losses[0] != losses[1]
    torch.testing.assert_close((losses[0] + losses[1]) / 2, plain)
    batch = learner.images.batch(0, 0, 1, 1000)
    joined = latents.Batch.joined([batch, replace(batch, mask=None)])
    assert joined.mask is not None and joined.mask[1].all() and joined.mask.shape == (2, 1, 4, 4)


def test_an_unknown_encoder_is_refused(tiny_model: str, data: Path) -> None:
    with pytest.raises(BunnyLoraError, match='Unknown face_encoder "clipp": choose bunny-world'):
        setup.set_up(tiny_config(tiny_model, face_encoder="clipp"))
