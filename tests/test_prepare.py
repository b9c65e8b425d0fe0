"""The demo's film: a source like another, drawn where it is read, once."""

import json
from pathlib import Path

import pytest

from bunny_lora import cli, prepare
from bunny_lora.config import Config
from bunny_lora.core import paths
from bunny_lora.trainer import LoRATrainer

DEMO = {"base_model": "random-tiny", "source": "bunny-world", "data_dir": "outputs/demo/data"}


@pytest.fixture
def analysis(project: Path) -> Path:
    return paths.demo_film_dir() / "llm_analysis" / "llm_analysis.json"


def test_a_trainer_draws_the_film_that_it_needs(analysis: Path) -> None:
    LoRATrainer(config=Config(**DEMO)).prepare_data()
    assert analysis.is_file()
    assert not paths.has_user_data()


def test_looking_at_a_configuration_draws_nothing(
    analysis: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["config", *(f"--set={key}={value}" for key, value in DEMO.items())]) == 0
    assert not analysis.exists()


def test_the_film_is_drawn_once_and_anew_only_if_it_is_not_this_versions(
    analysis: Path, capsys: pytest.CaptureFixture
) -> None:
    config, record = Config(**DEMO), paths.demo_film_dir() / prepare.FILM_RECORD
    first = prepare.prepare_data(config)
    drawn, written = analysis.read_bytes(), record.stat().st_mtime_ns
    assert capsys.readouterr().out == "The demo's film: outputs/demo/film\n"

    assert not prepare.source_changed(config)
    assert record.stat().st_mtime_ns == written
    assert capsys.readouterr().out == ""

    analysis.write_text("[]")
    assert prepare.prepare_data(config)["input_sha256"] == first["input_sha256"]
    assert analysis.read_bytes() == drawn
    assert "drawn anew" in capsys.readouterr().out

    record.write_text(json.dumps(json.loads(record.read_text()) | {"code": "of another version"}))
    prepare.draw_demo_film()
    assert "drawn anew" in capsys.readouterr().out
