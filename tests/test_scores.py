"""The chart and the table of an evaluation's scores."""

import copy

import pytest
from test_figures import assert_readable, texts

from bunny_lora import report
from bunny_lora.core.eval_result import MEASURES, EvalResult, Interval
from bunny_lora.report import scores

PROMPTS = ["{name}, waving", "{name}, portrait"]


def score(mean, spread=0.1):
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "n": 4}


def all_scores(mean, names):
    row = {measure: score(mean) for measure in MEASURES}
    return {"all": row, "characters": {name: copy.deepcopy(row) for name in names}}


def make_result(names, warning=None):
    images = [
        {"model": m, "character": c, "prompt_index": p, "prompt": PROMPTS[p].replace("{name}", c)}
        | {"seed": s, "file": f"images/{m}/{c}-{p}-{s}.png"}
        for m in ("base", "checkpoint-5", "final")
        for c in names
        for p in ((0,) if m == "checkpoint-5" else (0, 1))
        for s in ((7,) if m == "checkpoint-5" else (7, 8))
    ]
    settings = {"resolution": 64, "num_inference_steps": 2, "guidance_scale": 7.5, "seed": 0}
    settings |= {"features": "palette", "characters": names, "num_images_per_prompt": 2}
    result = {
        "base_model": "a/model",
        "warning": warning,
        "run_info": {"config": {}, "trained_by": None, "evaluated_by": {}, "final": {}},
        "settings": settings | {"prompts": PROMPTS, "neutral_prompts": ["waving", "portrait"]},
        "models": {
            "base": all_scores(0.5, names),
            "checkpoint-5": all_scores(0.6, names),
            "final": all_scores(0.75, names),
        },
        "differences": all_scores(0.25, names),
        "drift": score(0.125),
        "reference": {
            "similarity_of_crops": dict.fromkeys(names, score(0.8)),
            "separation_of_crops": score(0.9),
            "nearest_other_frame": None,
            "chance_level": 1 / len(names),
            "n_crops": dict.fromkeys(names, 3),
            "n_frames": 3 * len(names),
        },
        "seconds_per_image": 281.25,
        "images": images,
        "training_crops": {name: [f"images/training/{name}-0.png"] for name in names},
    }
    return EvalResult.model_validate(result)


@pytest.mark.parametrize("names", [["rex"], ["rex", "ellie"], [f"a long name {i}" for i in range(12)]])
def test_the_chart_is_readable(names):
    assert_readable(report.scores_chart(make_result(names, "random weights, so they mean nothing")))


def test_no_difference_is_no_signed_nothing():
    result = make_result(["rex"])
    result.differences.all.fidelity = Interval(mean=-1e-5, low=-2e-5, high=1e-5, n=4)
    result.models["final"] = result.models["base"]
    result.drift.mean = -1e-5
    assert "fidelity: 0.000 (95 %: 0.000 to 0.000)" in (table := report.scores_table(result))
    assert "drift of prompts without a name 0.000" in table
    low, high = report.scores_chart(result).axes[0].get_xlim()
    assert high - low >= scores.MIN_SPAN


def test_scores_table_is_deterministic_and_never_too_wide():
    table = report.scores_table(make_result(["rex", "an endless name of a character"]))
    assert table == report.scores_table(make_result(["rex", "an endless name of a character"]))
    assert max(map(len, table.splitlines())) <= scores.TABLE_WIDTH
    row = "rex             fidelity       0.500   0.750   +0.250    +0.150 to +0.350    0.800"
    assert row in table.splitlines()
    assert "an endless nam…" in table and "281.2 s an image" in table


def test_headlines_are_honest():
    result = make_result(["rex"], warning="random weights")
    assert "raised fidelity" in report.scores_table(result)
    assert "random weights" in report.scores_table(result)
    assert any("random weights" in text for text in texts(report.scores_chart(result)))
    result.differences.all.fidelity = Interval(**score(0.05))
    assert "No clear change" in report.scores_table(result)
    result.differences.all.fidelity = Interval(mean=0.5, low=None, high=None, n=1)
    assert "too few images" in report.scores_table(result)


def test_one_image_a_character_has_no_consistency_and_no_interval():
    result = make_result(["rex"])
    for part in (result.models["base"], result.models["final"], result.differences):
        for row in (part.all, part.characters["rex"]):
            row.consistency = None
            row.fidelity.low = row.fidelity.high = None
    assert report.scores_chart(result).as_png()
    assert "rex             fidelity       0.500   0.750   +0.250" in report.scores_table(result)


def with_axes(result, identity, following):
    change = {"identity": identity, "following": following}
    axis = {"models": {"base": score(0.3), "final": score(0.35)}, "reference": 0.2}
    places = {"all": score(0.6), "rex": score(0.6)}
    found = {
        "features": "facebook/dinov2-small",
        "anchors": {
            "rex": {"base": score(0.3), "wrong": score(0.4), "ceiling": score(0.8)},
            "an endless name of a character": {"base": score(0.3), "wrong": None, "ceiling": None},
        },
        "blind": {"an endless name of a character": "a single shot shows it, so none can be held out"},
        "models": {"base": {"all": score(-0.2), "rex": score(-0.2)}, "final": places},
        "change": score(change["identity"]),
    }
    following = axis | {"features": "a/clip", "change": score(change["following"])}
    update = {"identity": found, "following": following, "colour": following | {"features": "palette"}}
    return EvalResult.model_validate(result.model_dump() | update)


def test_both_axes_are_told_together_and_what_is_lost_as_loudly_as_what_is_gained():
    plain = make_result(["rex"])
    assert "older version" in report.axes_table(plain)
    table = report.axes_table(with_axes(plain, 0.8, -0.3))
    assert table.startswith("Identity is gained and what was asked for is lost: it has learnt too much")
    assert "identity      -0.200   0.600   +0.800    +0.700 to +0.900   0: floor, 1: ceiling" in table
    assert "as asked       0.300   0.350   -0.300    -0.400 to -0.200   other prompts: 0.200" in table
    assert "rex                    0.300   0.400    0.800   0.600  0.500 to 0.700" in table
    assert "an endless name of …   0.300       -        -       -" in table and "a single shot" in table
    assert "sees colours only" in table and "likeness by facebook/dinov2-small" in table
    assert max(map(len, table.splitlines())) <= scores.TABLE_WIDTH
    uncertain = report.axes_table(with_axes(plain, 0.8, 0.05))
    assert uncertain.startswith("Identity is gained, what was asked for is not clearly changed")


def test_a_run_is_a_point_on_both_axes():
    plain = make_result(["rex"])
    assert any("Two axes need" in text for text in texts(report.axes_chart(plain)))
    figure = report.axes_chart(with_axes(plain, 0.8, -0.3))
    assert_readable(figure)
    assert {"base model", "LoRA"} <= set(texts(figure))


def test_what_rests_on_the_palette_alone_says_that_it_sees_colours_only():
    result = make_result(["rex"])
    assert "palette, sees colours only" in report.scores_table(result)
    assert any("palette, sees colours only" in text for text in texts(report.scores_chart(result)))
    result.settings.features = "facebook/dinov2-small"
    assert "colours only" not in report.scores_table(result)
