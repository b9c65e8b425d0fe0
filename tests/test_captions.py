"""Captions as text: names taken out of them."""

import pytest

from bunny_lora.data.captions import without_names

NAMES = frozenset({"ellie", "rex", "ellie may", "c3-po (old)"})


@pytest.mark.parametrize(
    "caption, left",
    [
        ("ellie, a bunny, on the beach", "a bunny, on the beach"),
        ("ellie and rex, on the beach", "on the beach"),
        ("phil and ellie and rex, on the beach", "phil, on the beach"),
        ("ellie and phil, on the beach", "phil, on the beach"),
        ("a bunny, Rex jumping,  in the snow", "a bunny, jumping,  in the snow"),
        ("a bunny, rex, in the snow", "a bunny, in the snow"),
        ("a bunny and ellie may in the snow", "a bunny in the snow"),
        ("a fox with c3-po (old), waving", "a fox, waving"),
        ("a bunny in rex's hat", "a bunny in hat"),
        ("rex\N{FULLWIDTH COMMA}a fox", "a fox"),
        ("trex, rexes", "trex, rexes"),
        ("a fox,  running", "a fox,  running"),
        ("ellie", ""),
        ("", ""),
    ],
)
def test_names_are_taken_out_with_what_joined_them(caption: str, left: str) -> None:
    assert without_names(caption, NAMES) == left
    assert without_names(left, NAMES) == left


def test_without_names_to_take_out_a_caption_stays() -> None:
    assert without_names("ellie, and rex", []) == "ellie, and rex"
