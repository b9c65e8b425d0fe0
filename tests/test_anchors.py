"""Identity between floor and ceiling: perfect pictures at 1, hopeless ones at 0, and no score where
nothing can be told."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from PIL import Image, ImageDraw
from torch.nn.functional import normalize

from bunny_lora.core.image_file import save_image
from bunny_lora.evaluation import anchors, features
from bunny_lora.evaluation.anchors import Drawn, Shots
from bunny_lora.evaluation.protocol import ImageSpec
from bunny_lora.model import components

CENTRES = normalize(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), dim=1)


def views(character: int, n: int, seed: int, spread: float = 0.05) -> torch.Tensor:
    noise = torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))
    return normalize(CENTRES[character] + spread * noise, dim=1)


def windowed(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """Each row among windows that show something else, [N, 5, D]."""
    others = torch.randn(len(rows), 4, 64, generator=torch.Generator().manual_seed(seed))
    return torch.cat([normalize(others, dim=2), rows[:, None]], dim=1)


def shots_of(references: list[torch.Tensor]) -> list[Shots]:
    seen = [windowed(rows[:6], 9) for rows in references]
    return anchors.held_out(seen, [range(6)] * len(references), references)


def drawn(rows: torch.Tensor, base: torch.Tensor, references: torch.Tensor) -> Drawn:
    values, of_base = (anchors.likeness(windowed(part, 5), references) for part in (rows, base))
    return Drawn(values, of_base, [index // 2 for index in range(len(rows))])


def base_images(n: int) -> torch.Tensor:
    """Somebody else, a little like the first character."""
    return normalize(views(2, n, 7) + 0.7 * CENTRES[0], dim=1)


def test_perfect_images_are_at_one_and_hopeless_ones_at_nothing() -> None:
    references = [views(k, 12, k) for k in range(2)]
    shots = shots_of(references)

    def identity(rows: torch.Tensor, base: torch.Tensor) -> float:
        return anchors.identity_interval([(drawn(rows, base, references[0]), shots[0])]).mean

    assert identity(views(0, 16, 4), base_images(16)) == pytest.approx(1, abs=0.05)
    assert identity(base_images(16), base_images(16)) == pytest.approx(0, abs=1e-5)
    far = views(2, 16, 7)  # so that the other character, drawn perfectly, is the floor
    assert identity(views(1, 16, 5), far) == pytest.approx(0, abs=0.1)
    assert identity(views(0, 16, 4), far) == pytest.approx(1, abs=0.05) and identity(far, far) < 0


def test_what_is_uncertain_widens_the_interval_and_images_of_a_prompt_are_not_many() -> None:
    references = [views(k, 12, k) for k in range(2)]
    few, many = (Shots(part.own[:n], part.others) for part in shots_of(references)[:1] for n in (3, 6))
    base, rows = base_images(16), views(0, 16, 4, spread=0.1)
    part = drawn(rows, base, references[0])
    spread = {}
    for name, shots in (("few", few), ("many", many)):
        found = anchors.identity_interval([(part, shots)])
        assert found.low < found.mean < found.high and found.n == 16
        spread[name] = found.high - found.low
    assert spread["few"] > spread["many"] * 0.8
    alike = Drawn(part.values, part.base, [0, 1] * 8)
    assert anchors.identity_interval([(alike, many)]).low is None
    change = anchors.identity_interval([(part, many)], minus_base=True)
    same = Drawn(part.base, part.base, part.prompts)
    base_at = anchors.identity_interval([(same, many)]).mean
    assert change.mean == pytest.approx(found.mean - base_at, abs=1e-5) and change.low > 0
    nothing = anchors.identity_interval([(same, many)], minus_base=True)
    assert (nothing.low, nothing.mean, nothing.high) == (0, 0, 0)


def test_who_cannot_be_told_apart_has_no_score_and_the_reason_is_said() -> None:
    references = [views(0, 12, 0), views(0, 12, 1), views(2, 1, 2)]  # the second looks like the first
    seen = [windowed(rows[:6], 9) for rows in references]
    shots = anchors.held_out(seen, [range(6), range(6), range(1)], references)
    parts = {
        name: drawn(views(2, 8, 7), views(2, 8, 7), rows)
        for name, rows in zip("abc", references, strict=True)
    }
    found = anchors.summarise(
        "f", {"base": parts, "final": parts}, dict(zip("abc", shots, strict=True))
    )
    assert set(found.blind) == {"a", "b", "c"} and found.models == {"base": {}, "final": {}}
    assert "the ceiling is not surely above the floor" in found.blind["a"]
    assert "a single shot" in found.blind["c"] and found.change is None
    assert found.anchors["a"].ceiling.mean == pytest.approx(found.anchors["a"].wrong.mean, abs=0.05)


def picture(fur: str, sky: str, place: int, size: int = 64) -> Image.Image:
    image = Image.new("RGB", (size, size), sky)
    draw = ImageDraw.Draw(image)
    draw.ellipse([place, place, place + 40, place + 40], fill=fur, outline="black")
    return image


def test_a_run_is_placed_between_its_base_and_the_film_itself(tmp_path: Path, capsys) -> None:
    furs = {"rex": "#cc3333", "ellie": "#3366cc"}
    skies = ["#87ceeb", "#c8e6a0", "#f5deb3", "#dddddd"]
    crops = {name: [picture(fur, sky, 12) for sky in skies] for name, fur in furs.items()}
    vae = components.load_vae("bunny-world", torch.device("cpu"))
    plan = []
    for model in ("base", "final"):
        for name, fur in furs.items():
            for prompt, sky in enumerate(skies[:3]):
                spec = ImageSpec(model, name, prompt, "-", prompt)
                shown = picture("#777777" if model == "base" else fur, sky, 14)
                save_image(components.reconstruct(vae, shown), tmp_path / "evaluation" / spec.file)
                plan.append(spec)
    palette = features.load_feature_extractor("palette")
    references = [palette(images) for images in crops.values()]
    config = tiny_config("random-tiny", resolution=64, evaluation={"ceiling_shots": 3})
    arguments = (tmp_path, config, plan, crops, references, palette, "bunny-world")
    found, places = anchors.identity_scores(*arguments)
    assert not found.blind and found.anchors["rex"].ceiling.n == 2  # every second of four
    assert found.models["final"]["all"].mean == pytest.approx(1, abs=0.25)
    assert found.models["base"]["all"].mean <= 0.01
    assert found.change.low > 0
    assert places[plan[-1].file] > 0.5 > places[plan[0].file]
    kept = sorted((tmp_path / "evaluation" / "images" / "held_out").iterdir())
    before = [path.stat().st_mtime_ns for path in kept]
    (kept[0].parent / "of_another_film.png").write_bytes(b"")
    assert anchors.identity_scores(*arguments) == (found, places)
    assert [path.stat().st_mtime_ns for path in kept] == before and len(kept) == 4
    assert not (kept[0].parent / "of_another_film.png").exists()
    off = tiny_config("random-tiny", evaluation={"ceiling_shots": 0})
    assert anchors.identity_scores(tmp_path, off, *arguments[2:]) == (None, {})
    assert "not told" not in capsys.readouterr().out
