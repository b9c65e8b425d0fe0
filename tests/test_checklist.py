"""The sheet on which a person ticks what is right."""

from pathlib import Path

import pytest
from test_scores import make_result

from bunny_lora.evaluation.checklist import BOX, write_checklist


def test_a_sheet_has_a_row_an_image_the_worst_first_and_goes_when_nothing_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_result(["rex", "ellie"]).images
    for place, image in enumerate(images):
        image.fidelity = 0.9 - place / 100
    asked = {"rex": ["a bent ear", "red | green scarf"], "rexx": ["fur"]}
    write_checklist(tmp_path, asked, images)
    assert "checklist: no character is called rexx; rex, ellie are" in capsys.readouterr().out
    text = (tmp_path / "evaluation" / "checklist.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if BOX in line]
    finals = [image for image in images if (image.model, image.character) == ("final", "rex")]
    assert len(rows) == len(finals) == 4 and all(row.count(BOX) == 2 for row in rows)
    assert [image.file in row for image, row in zip(reversed(finals), rows, strict=True)] == [True] * 4
    assert "| a bent ear | red \\| green scarf |" in text and "ellie" not in text
    write_checklist(tmp_path, {}, images)
    assert not (tmp_path / "evaluation" / "checklist.md").exists()
