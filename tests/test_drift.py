"""Drift: nothing for the same images, 1 for those of another seed, each kind of prompt for itself."""

import pytest
import torch
from test_scores import make_result
from torch.nn.functional import normalize

from bunny_lora import report
from bunny_lora.config import Config
from bunny_lora.core.eval_parts import DriftScore, Interval
from bunny_lora.core.seeding import generator
from bunny_lora.evaluation import drift, protocol
from bunny_lora.evaluation.protocol import ImageSpec

PROMPTS = [f"prompt {row // 16}" for row in range(64)]


@pytest.fixture
def base() -> torch.Tensor:
    rng = generator(0, "test of drift")
    return normalize(torch.randn((64, 32), generator=rng) + 2, dim=1)


def test_drift_is_0_for_the_same_images_and_1_for_those_of_another_seed(base: torch.Tensor) -> None:
    assert drift.drift_score(base, base, PROMPTS).ratio.mean == pytest.approx(0, abs=1e-6)
    other = base.view(4, 16, 32).roll(1, dims=1).reshape(64, 32)
    found = drift.drift_score(base, other, PROMPTS)
    assert found.ratio.mean == pytest.approx(1, abs=0.1)
    assert found.moved.mean == pytest.approx(found.between_seeds * found.ratio.mean, abs=1e-4)
    alone = drift.drift_score(base, other, [str(row) for row in range(64)])
    assert alone.ratio is None and alone.between_seeds is None and alone.moved.n == 64


def test_one_prompt_has_an_interval_over_its_images(base: torch.Tensor) -> None:
    found = drift.drift_score(base[:16], base[16:32], [""] * 16).ratio
    assert found.low < found.mean < found.high and found.n == 16


def test_each_kind_of_prompt_is_told_apart(base: torch.Tensor) -> None:
    """The empty prompt alone has moved."""
    plan, rows = [], []
    for model in ("base", "final"):
        for place, nobody in enumerate(protocol.NOBODY):
            plan += [ImageSpec(model, nobody, 0, nobody, seed) for seed in range(16)]
            moved = model == "final" and nobody == protocol.EMPTY
            rows.append(base[48:] if moved else base[16 * place : 16 * place + 16])
    found = drift.drift_scores(plan, torch.cat(rows))
    ratios = {kind: round(score.ratio.mean, 1) for kind, score in found.items()}
    assert ratios == {"templates": 0, "others": 0, "empty": pytest.approx(1, abs=0.2)}


def test_sixteen_images_of_each_kind_are_drawn_unless_told_otherwise() -> None:
    plan = protocol.plan_images(Config(), ["ellie"], ["base", "checkpoint-1", "final"])
    for nobody in protocol.NOBODY:
        specs = [spec for spec in plan if (spec.model, spec.character) == ("final", nobody)]
        assert len(specs) == len({(spec.prompt, spec.seed) for spec in specs}) == 16
        assert len({spec.file for spec in plan}) == len(plan)
    few = Config(evaluation={"num_drift_images": 1, "other_prompts": "a dog", "prompts": "{name}"})
    assert len(protocol.specs_of(few, "base", protocol.EMPTY)) == 2  # num_images_per_prompt


def test_the_tables_say_all_three() -> None:
    span = Interval(mean=0.5, low=0.25, high=0.75, n=16)
    kinds = {kind: DriftScore(moved=span, between_seeds=0.5, ratio=span) for kind in drift.KINDS}
    result = make_result(["rex"]).model_copy(update={"drifts": kinds})
    table = report.scores_table(result)
    for words in ("without the name", "other subjects  ", "the empty prompt"):
        assert f"drift, {words}" in table
    assert "0.500 (0.250 to 0.750)   1: as another seed" in table
