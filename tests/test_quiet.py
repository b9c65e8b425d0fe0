"""diffusers and transformers are quiet around our own calls, and the host process's otherwise."""

import subprocess
import sys

import diffusers
import transformers
from huggingface_hub.utils import are_progress_bars_disabled

from bunny_lora.model.quiet import LOGS, quiet

SAYS_HOW_LOUD = """
import os, diffusers, transformers
from huggingface_hub.utils import are_progress_bars_disabled
def how_loud():
    logs = diffusers.utils.logging, transformers.utils.logging
    levels = [log.get_verbosity() for log in logs]
    bars = [log.is_progress_bar_enabled() for log in logs]
    return levels, bars, are_progress_bars_disabled(), os.environ.get("TRANSFORMERS_VERBOSITY")
before = how_loud()
"""


def test_importing_and_drawing_leave_the_host_process_as_loud_as_it_was(tiny_model: str) -> None:
    code = f"""{SAYS_HOW_LOUD}
import torch
from bunny_lora import inference, trainer
pipe = inference.load_lora_pipeline({tiny_model!r})
inference.generate_image(pipe, "ellie " * 99, num_inference_steps=1, width=32, height=32)
assert how_loud() == before, how_loud()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_inside_it_only_errors_are_told_and_the_hubs_bars_stay(capsys) -> None:
    levels = [log.get_verbosity() for log in LOGS]
    with quiet():
        assert [log.get_verbosity() for log in LOGS] == [40, 40]
        for bar in (diffusers.utils.logging.tqdm, transformers.utils.logging.tqdm):
            assert list(bar([1, 2])) == [1, 2]
        assert not are_progress_bars_disabled()
    assert [log.get_verbosity() for log in LOGS] == levels
    assert capsys.readouterr().err == ""
    list(transformers.utils.logging.tqdm([1]))
    assert "1/1" in capsys.readouterr().err
