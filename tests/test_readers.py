"""`make readers` itself, at toy size, with the one program that is always here."""

from pathlib import Path

import pytest
import readers
from PIL import Image
from test_ldm import SMALL


# diffusers' sampler asks for an array in a way that numpy has given up.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_what_a_program_draws_is_compared_with_what_we_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readers, "SHAPE", SMALL)
    monkeypatch.setattr(readers, "LORAS", {"locon": readers.LORAS["locon"]})
    monkeypatch.setattr(readers, "CHANGED", 0.0)
    options = ["--keep", str(tmp_path), "--size", "64", "--only", "diffusers"]
    assert readers.main(options) == 0
    assert "| kohya file, locon | 0.000 | 0 |" in capsys.readouterr().out


def test_a_picture_that_is_another_is_told_apart(tmp_path: Path) -> None:
    expected = Image.effect_noise((8, 8), 50).convert("RGB")
    other = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    row = readers.Row("diffusers", "a file", other, "base")
    assert not readers.compare(iter([row]), {"base": expected}, tmp_path)
    row = readers.Row("diffusers", "a file", expected, "base")
    assert readers.compare(iter([row]), {"base": expected}, tmp_path)
