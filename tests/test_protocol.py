"""The protocol: which pictures are drawn, from which prompts and seeds, under which names."""

import pytest

from bunny_lora.config import load_config
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import judge, protocol
from bunny_lora.training import fingerprint

PROMPTS = {"prompts": ["{name}, waving", "{name}"], "other_prompts": "a dog"}
COUNTS = {"num_images_per_prompt": 2, "num_drift_images": 4}
CONFIG = load_config(overrides={"evaluation": PROMPTS | COUNTS})


def test_checkpoints_draw_a_small_part_of_what_base_and_final_draw():
    models = ["base", "checkpoint-5", "final"]
    plan = protocol.plan_images(CONFIG, ["rex", "ellie", "phil", "victoria"], models)
    drawn = {model: [p for p in plan if p.model == model] for model in models}
    assert len(drawn["base"]) == len(drawn["final"]) == (4 + 1) * 2 * 2 + 4 + 4
    assert [p.character for p in drawn["checkpoint-5"]] == ["rex", "ellie", "phil"]
    whole = {(p.prompt, p.seed) for p in drawn["final"]}
    assert {(p.prompt, p.seed) for p in drawn["checkpoint-5"]} < whole
    assert len({p.file for p in plan}) == len(plan)


def test_a_seed_depends_on_prompt_and_position_alone():
    rex, ellie = (protocol.specs_of(CONFIG, "base", name) for name in ("rex", "ellie"))
    assert [p.seed for p in rex] == [p.seed for p in ellie]
    assert len({p.seed for p in rex}) == 4
    assert all(0 <= p.seed < 2**32 for p in rex)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{name}, standing", "standing"),
        ("a photo of {name} in snow", "a photo of toon in snow"),
        ("{name}", "toon"),
        ("a forest", "a forest"),
        ("{name}, {looks}, standing", "standing"),
        ("{name}, standing, {looks}", "standing"),
        ("{looks}, {name} standing", "toon standing"),
    ],
)
def test_neutral_prompts_name_nobody(template, prompt):
    assert protocol.without_name(template, "toon") == prompt


def test_prompts_say_the_looks_of_whose_are_told():
    config = load_config(
        overrides={
            "looks": {"rex": "red fox in a green hat"},
            "evaluation": {"prompts": ["{name}, {looks}, waving"]},
        }
    )
    assert protocol.prompts_of(config, "rex") == ["rex, red fox in a green hat, waving"]
    assert protocol.prompts_of(config, "ellie") == ["ellie, waving"]
    assert protocol.prompts_of(config, protocol.NEUTRAL) == ["waving"]


def test_looks_that_nobody_told_are_missed():
    with pytest.raises(BunnyLoraError, match=r"prompts has \{looks\}, and nobody's are told"):
        load_config(overrides={"evaluation": {"prompts": ["{name}, {looks}"]}})


def test_who_is_left_out_is_said(capsys):
    prompts = {"evaluation": {"prompts": ["{name}, {looks}"]}}
    judge._say_untold(load_config(overrides={"looks": {"rex": "red fox"}} | prompts), ["rex", "ellie"])
    assert "looks: nothing of ellie, so {looks} is left out" in capsys.readouterr().out


def test_file_names_of_characters_are_safe_and_their_own():
    names = ["rex", "Rex", "a/b", "a_b", "../x", "élise", "名前", "neutral", "x" * 99]
    slugs = [protocol.slug(name) for name in names]
    assert slugs[0] == "rex" and len(set(slugs)) == len(names)
    assert all(set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789_") for slug in slugs)


def test_looks_may_be_told_after_training() -> None:
    told = load_config(overrides={"looks": {"rex": "red fox"}})
    assert fingerprint.settings_of(told) == fingerprint.settings_of(load_config())
