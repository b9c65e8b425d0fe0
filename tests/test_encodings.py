"""Terminals, pipes and locales that are not UTF-8: nothing dies of an emoji."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT, draw_frames, tiny_config

from bunny_lora import arguments
from bunny_lora.core import image_file

RABBIT = "zoë \N{RABBIT FACE} 兔"
SIZE = ["--steps", "1", "--width", "32", "--height", "32"]
CONFIG = ["--config", "params/tiny.yaml"]
COMMANDS = [
    ["prepare", *CONFIG, "--source", "stranger"],
    ["prepare", *CONFIG, "--source", "raw"],
    ["train", *CONFIG],
    ["evaluate", *CONFIG],
    ["generate", "--lora-weights", "run", *SIZE, "--out", "one.png", "--prompt"],
    ["generate", "--lora-weights", "run", "--prompts", "prompts.txt", *SIZE, "--out", "many"],
    ["export", "--lora-weights", "run", "--format", "kohya", "--out", "exported"],
    ["config", *CONFIG],
    ["config", *CONFIG, "--set"],
]
CHILD = """
import json, sys
from bunny_lora import cli
for command in json.loads(sys.argv[1]):
    typed = sys.argv[2:] if command[-1] in ("--prompt", "--set") else []
    print("rc", command[0], cli.main([*command, *typed]), flush=True)
"""
# No UTF-8 at all, for file names neither, and a stream that refuses.
NOTHING_BUT_ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
NOTHING_BUT_ASCII |= {"PYTHONIOENCODING": "ascii"}


@pytest.fixture
def config_file(project: Path, tiny_model: str) -> Path:
    training = {"max_train_steps": 1, "validation_prompt": RABBIT}
    config = tiny_config(
        tiny_model,
        training=training,
        evaluation={"prompts": [RABBIT, "{name}"]},
        character_names=["zoë"],
    )
    path = project / "params" / "tiny.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return path


def child(
    project: Path, commands: list[list[str]], environment: dict[str, str]
) -> tuple[list[bytes], bytes]:
    """Run commands in a process with an environment of its own; return their answers and all words."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands), RABBIT],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "BUNNY_LORA_ROOT": str(project)} | environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    answers = [line[3:] for line in done.stdout.splitlines() if line.startswith(b"rc ")]
    return answers, done.stdout + done.stderr


@pytest.mark.usefixtures("config_file")
def test_no_command_dies_of_a_letter(project: Path) -> None:
    raw = draw_frames(project / "raw", 2)
    lines = [json.loads(line) for line in (raw / "metadata.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line | {"text": f"{RABBIT}, in the snow"}) + "\n" for line in lines)
    (raw / "metadata.jsonl").write_text(text)
    (raw / "broken.png").write_bytes(b"no image")
    (project / "prompts.txt").write_text(RABBIT, encoding="utf-8")
    answers, said = child(project, COMMANDS, NOTHING_BUT_ASCII)
    assert answers == [
        *(b"prepare 2", b"prepare 0", b"train 0", b"evaluate 0", b"generate 0", b"generate 0"),
        *(b"export 0", b"config 0", b"config 2"),
    ]
    assert rb"\U0001f430" in said
    metadata = image_file.read_metadata(project / "one.png")
    assert metadata is not None and metadata["prompt"] == RABBIT


@pytest.mark.usefixtures("config_file")
def test_what_the_terminal_can_write_is_written_as_it_is(project: Path) -> None:
    answers, said = child(project, COMMANDS[-2:], {"PYTHONIOENCODING": "cp1252"})
    assert answers == [b"config 0", b"config 2"]
    assert "zoë ".encode("cp1252") + rb"\U0001f430 \u5154" in said


def test_what_the_locale_decoded_is_left_as_it_is() -> None:
    assert arguments.as_text(RABBIT) == RABBIT
    undecoded = RABBIT.encode().decode("ascii", "surrogateescape")
    assert arguments.as_text(undecoded) == RABBIT
    latin = "zoë".encode("latin-1").decode("utf-8", "surrogateescape")
    assert arguments.as_text(latin) == latin
