"""The package's own face: the few names that people need, and nothing heavy before they are used."""

import subprocess
import sys

import pytest

import bunny_lora


def test_the_names_that_people_need_are_there() -> None:
    from bunny_lora import LoRATrainer, evaluate, generate_image, load_lora_pipeline, prepare_data
    from bunny_lora.evaluation import evaluate as at_home
    from bunny_lora.trainer import LoRATrainer as Trainer

    assert (LoRATrainer, evaluate) == (Trainer, at_home)
    assert all(map(callable, (generate_image, load_lora_pipeline, prepare_data)))
    with pytest.raises(AttributeError, match="LoraTrainer"):
        bunny_lora.LoraTrainer  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, bunny_lora; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
