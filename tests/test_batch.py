"""Batches: go on where they were left, draw anew what changed, and show everything on sheets."""

from pathlib import Path

import pytest
from conftest import open_image
from diffusers import StableDiffusionPipeline

from bunny_lora import batch, cli, inference
from bunny_lora.errors import BunnyLoraError

FAST = {"num_inference_steps": 1, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def pipe(tiny_model: str) -> StableDiffusionPipeline:
    return inference.load_lora_pipeline(tiny_model)


def test_a_batch_goes_on_and_draws_anew_what_changed(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    prompts, seeds, identity = ["ellie", "rex in snow"], [1, 2], {"loras": [["abc", 1.0]]}
    paths = batch.draw_batch(pipe, prompts, seeds, tmp_path, identity, **FAST)
    assert [path.name for path in paths] == ["0000-1.png", "0000-2.png", "0001-1.png", "0001-2.png"]
    alone = inference.generate_image(pipe, "rex in snow", seed=2, **FAST)
    assert open_image(paths[3]).tobytes() == alone.tobytes()

    def redrawn(prompts: list[str], identity: dict) -> list[str]:
        before = {path: path.stat().st_mtime_ns for path in paths}
        batch.draw_batch(pipe, prompts, seeds, tmp_path, identity, **FAST)
        return [path.name for path in paths if path.stat().st_mtime_ns != before[path]]

    assert redrawn(prompts, identity) == []
    paths[1].write_bytes(paths[1].read_bytes()[:99])
    paths[2].unlink()
    paths[2].write_bytes(b"")
    assert redrawn(prompts, identity) == ["0000-2.png", "0001-1.png"]
    assert redrawn(["ellie", "rex at night"], identity) == ["0001-1.png", "0001-2.png"]
    assert len(redrawn(["ellie", "rex at night"], {"loras": [["abc", 0.5]]})) == 4


@pytest.mark.parametrize("setting", [{"negative_prompt": "blurry"}, {"width": 32}, {"lora_scale": 0.5}])
def test_an_image_is_stale_when_a_setting_that_drew_it_is_left_out(
    pipe: StableDiffusionPipeline, tmp_path: Path, setting: dict
) -> None:
    drawn = []
    for settings in (setting, {}, {}):
        settings = {"num_inference_steps": 1} | settings
        (path,) = batch.draw_batch(pipe, ["ellie"], [1], tmp_path, {}, **settings)
        drawn.append((path.stat().st_mtime_ns, path.read_bytes()))
    assert drawn[0][1] != drawn[1][1]
    assert drawn[1] == drawn[2]


def test_contact_sheets_hold_a_dozen_prompts_each(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    prompts = [f"ellie number {i}" for i in range(13)]
    batch.draw_batch(pipe, prompts, [1], tmp_path, {}, **FAST)
    sheets = sorted(path.name for path in tmp_path.glob("contact_sheet-*.png"))
    assert sheets == ["contact_sheet-1.png", "contact_sheet-2.png"]
    assert open_image(tmp_path / sheets[0]).height > open_image(tmp_path / sheets[1]).height


def test_prompts_come_from_lines_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    text = "\ufeff# heroes\nellie, waving\n\n  rex in snow  \n#\n## more\n#ffcc00 sky, #1 hero"
    file.write_text(text, encoding="utf-8")
    assert batch.read_prompts(file) == ["ellie, waving", "rex in snow", "#ffcc00 sky, #1 hero"]
    assert "3 of 6 lines in prompts.txt" in capsys.readouterr().out
    file.write_bytes("ellie, café\r\nrex".encode("utf-16"))  # PowerShell: echo … > prompts.txt
    assert batch.read_prompts(file) == ["ellie, café", "rex"]
    file.write_bytes("ellie, café".encode("latin-1"))
    with pytest.raises(BunnyLoraError, match=r"not UTF-8 text \(byte 10\): save them as UTF-8"):
        batch.read_prompts(file)
    file.write_text("# nothing yet\n")
    with pytest.raises(BunnyLoraError, match="no prompt in"):
        batch.read_prompts(file)
    with pytest.raises(BunnyLoraError, match="cannot be read"):
        batch.read_prompts(tmp_path / "missing.txt")


def test_the_command_line_draws_batches(
    project: Path, tiny_model: str, capsys: pytest.CaptureFixture
) -> None:
    (project / "prompts.txt").write_text("ellie\nrex\n")
    order = ["generate", "--base-model", tiny_model, "--prompts", "prompts.txt", "--steps", "1"]
    order += ["--width", "32", "--height", "32"]
    assert cli.main([*order, "--out", "outputs/many"]) == 0
    assert capsys.readouterr().out.split() == ["outputs/many/0000-42.png", "outputs/many/0001-42.png"]
    assert cli.main(order) == 2
    assert "needs --out" in capsys.readouterr().err
