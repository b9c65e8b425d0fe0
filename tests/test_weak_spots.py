"""What a run would learn badly, on made data with one fault each, and the key that answers it."""

from pathlib import Path

import pytest
from conftest import draw_frames, tiny_config
from PIL import Image

from bunny_lora import cli, report
from bunny_lora.config import Config, validate
from bunny_lora.core.files import write_json
from bunny_lora.data.frames import Sample
from bunny_lora.data.summary import SCHEMA_VERSION, SUMMARY
from bunny_lora.data.weak_spots import Facts, WeakSpot, find_weak_spots
from bunny_lora.model.bpe import build_clip_tokenizer

TOKENIZER = build_clip_tokenizer()
FACE = (40.0, 10.0, 56.0, 26.0)  # in the middle square of 96 x 54, 19 latent pixels wide at 512
LEFT = (0.0, 10.0, 16.0, 26.0)


def sample(
    number: int, names: str, caption: str = "", faces: tuple = (FACE,), tokens: int = 9
) -> Sample:
    who = tuple(names.split())
    caption = caption or ", ".join([*who, "in the snow"])
    name = f"frame_{number}"
    return Sample(name, Path(name), caption, who, faces=faces, size=(96, 54), tokens=tokens)


def spots(samples: list[Sample], shot: list[int] | None = None, **settings: object) -> list[WeakSpot]:
    """The weak spots without the names' pieces, which are always said."""
    config = validate({"center_crop": False} | settings)
    numbers = list(range(len(samples)))
    found = find_weak_spots(Facts(samples, config, TOKENIZER, shot or numbers, numbers))
    return [spot for spot in found if spot.what != "names in pieces"]


GOOD = [sample(i, name) for i, name in enumerate(["ellie", "rex"] * 2)]


def test_good_data_have_no_weak_spot() -> None:
    assert spots(GOOD) == []


@pytest.mark.parametrize(
    "samples, what, who, key",
    [
        ([sample(8, "rex phil", faces=(FACE, LEFT))] * 2, "never alone",
         "phil is in 2 pictures, in none without rex", "source"),
        ([sample(8, "ellie")] * 2, "unequal", "pictures: ellie 4, rex 2", "balance_characters: true"),
        ([sample(8, "ellie", faces=((40, 10, 46, 15),)), sample(9, "rex")], "small faces",
         "1 of 6 are less than 8 latent pixels wide at 512 px, the median 19.0", "zoom_on_faces: true"),
        ([sample(8, "ellie", "ellie, a bunny, a cream cat sitting", (FACE, LEFT)), sample(9, "rex")],
         "passers-by", "1 picture with more faces than names, 1 caption with somebody else's looks"
         " under the name: frame_8 'ellie, a bunny, a cream cat sitting'",
         "face_encoder"),
        ([sample(8, "phil", faces=()), sample(9, "phil", faces=())], "no face",
         "phil: no picture has a face for everybody whom it names", "zoom_on_faces"),
        ([sample(8, "ellie", tokens=80), sample(9, "rex")], "cut captions",
         "1 of 6 have more than the 77 tokens that are read, frame_8 has 80", "caption_tag_dropout"),
    ],
)  # fmt: skip
def test_each_fault_is_told_with_who_and_the_key(
    samples: list[Sample], what: str, who: str, key: str
) -> None:
    found = {spot.what: spot for spot in spots([*GOOD, *samples])}
    assert found[what].who == who and key in found[what].answer
    assert found.keys() <= {what, "unequal"}


def test_who_is_of_one_shot_is_told() -> None:
    (spot,) = spots(GOOD, [0, 1, 2, 1])
    assert spot.what == "one shot" and spot.who == "rex: all 2 pictures are of one shot"


def test_what_the_middle_square_cuts_off_is_told() -> None:
    (spot,) = spots([*GOOD, sample(8, "ellie", faces=(LEFT,)), sample(9, "rex")], center_crop=True)
    assert spot.who == "44% of 6 pictures lies outside the middle square; faces too: ellie in 1"
    assert "center_crop: false" in spot.answer


def test_an_answer_that_is_set_is_known() -> None:
    rare = [*GOOD, sample(8, "ellie"), sample(9, "ellie")]
    assert not spots(rare, balance_characters=False)[0].is_answered(Config(balance_characters=False))
    assert spots(rare)[0].is_answered(Config(balance_characters=True))


def test_names_are_shown_as_the_text_encoder_reads_them() -> None:
    found = find_weak_spots(
        Facts([sample(0, "zorblax"), sample(1, "buck")], Config(), TOKENIZER, [0] * 2, [0, 1])
    )
    assert found[-1].who == "buck, zor|bla|x; of one piece, so maybe words with a meaning: buck"


# ------------------------------------------------------------------------- where it is said


@pytest.fixture
def config(project: Path, tiny_model: str) -> Config:
    """Three frames of rex and one of ellie, the first two of which are the same."""
    folder = draw_frames(project / "data" / "instance_images", 4)
    pictures = sorted(folder.glob("*.png"))
    with Image.open(pictures[0]) as first:
        first.copy().save(pictures[1])
    who = [["rex"], ["rex"], ["rex"], ["ellie"]]
    images = [
        {"file_name": path.name, "characters": names, "size": [96, 54], "faces": []}
        for path, names in zip(pictures, who, strict=True)
    ]
    write_json(folder.parent / SUMMARY, {"schema_version": SCHEMA_VERSION, "images": images})
    return tiny_config(tiny_model, balance_characters=True, center_crop=True)


def test_weak_spots_are_told_as_text(config: Config) -> None:
    text = report.weak_spots_text(config)
    assert "unequal          pictures: rex 3, ellie 1\n" in text
    assert "-> set already: balance_characters: true shows the rare ones more often" in text
    assert "near-duplicates  1 picture of 4 nearly the same as the one before, 2 from" in text
    assert "cut off          44% of 4 pictures lies outside the middle square\n" in text
    assert max(map(len, text.splitlines())) <= 110


def test_prepare_tells_them(project: Path, tiny_model: str, capsys: pytest.CaptureFixture) -> None:
    draw_frames(project / "pictures", 3)
    named = ["--set", f"base_model={tiny_model}", "--set", "character_names=[ellie]"]
    assert cli.main(["prepare", "--source", "pictures", *named]) == 0
    assert "Weak spots of these data, and the key that answers each:" in capsys.readouterr().out
