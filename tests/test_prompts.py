"""What a prompt does not say to this program is said to its writer, in one line a kind."""

from pathlib import Path

import pytest
from conftest import draw_frames, tiny_config

from bunny_lora import cli
from bunny_lora.evaluation import evaluate
from bunny_lora.model import prompts
from bunny_lora.model.random_models import build_tokenizer
from bunny_lora.trainer import LoRATrainer

SIZE = ["--width", "32", "--height", "32", "--steps", "1"]
LONG = " ".join(["ellie"] * 75 + ["under", "a", "tree"])  # each word one token


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("ellie, (waving:1.2)", "A weight such as"),
        ("ellie, ((waving))", "A weight such as"),
        ("ellie, [blurry]", "A weight such as"),
        ("<lora:style_v1:0.8> ellie", "<lora:…>"),
        ("ellie --n bad hands --w 512 --s 20", "An option such as"),
        ("ellie BREAK a meadow", "BREAK"),
        ("ellie in a {red|blue} hat", "A choice such as"),
        ("ellie in __places__", "A choice such as"),
    ],
)
def test_the_syntax_of_other_programs_is_said_to_be_plain_words(prompt: str, kind: str) -> None:
    (line,) = prompts.doubts([prompt, "ellie", prompt + " now"], build_tokenizer())
    assert line.startswith(kind) and "plain words" in line and "in 2 of 3 prompts" in line


@pytest.mark.parametrize(
    "prompt",
    ["ellie (left) and rex", "a well-known -- or not -- break", "#ffcc00 sky", "at 10:30", LONG[:-13]],
)
def test_ordinary_words_raise_no_doubt(prompt: str) -> None:
    assert prompts.doubts([prompt], build_tokenizer()) == []


def test_the_words_that_the_text_encoder_does_not_reach_are_counted_and_shown() -> None:
    (line,) = prompts.doubts(["ellie", LONG], build_tokenizer())
    assert "reads 75 tokens" in line and "lost: 3 of 'ellie" in line and "'under a tree'" in line
    (line,) = prompts.doubts([f"{LONG} {i}" for i in range(5)], build_tokenizer())
    assert "4 of 'ellie" in line and "and so on in 2 more" in line


def test_every_door_says_so_once(
    project: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_frames(project / "data" / "instance_images", 2)
    training = {"max_train_steps": 1, "validation_prompt": [LONG, f"{LONG} (now:1.1)"]}
    settings = {"prompts": [f"{{name}}, {LONG}"]}
    config = tiny_config(tiny_model, training=training, evaluation=settings, character_names=["ellie"])
    LoRATrainer(config=config).train()
    out = capsys.readouterr().out
    assert out.count("Validation prompts: The text encoder reads 75 tokens") == 1
    assert out.count("Validation prompts: A weight") == 1
    evaluate(project / "run", config=config)
    out = capsys.readouterr().out
    assert out.count("Prompts of the evaluation: The text encoder reads 75") == 1
    many = ["--prompt", LONG, "--prompt", f"{LONG} or", "--negative-prompt", "(ugly:1.4)"]
    assert cli.main(["generate", "--base-model", tiny_model, *many, *SIZE]) == 0
    out = capsys.readouterr().out
    assert out.count("The text encoder reads") == 1 and out.count("A weight such as") == 1
