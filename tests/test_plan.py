"""What a run will take: counted exactly, tried on two images, and nothing left behind."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import draw_frames, tiny_config

from bunny_lora import cli
from bunny_lora.core import files
from bunny_lora.dataset import ImageDataset
from bunny_lora.model import components
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import plan as planning
from bunny_lora.training.plan import Pieces, Plan, Work

WORK = Work(
    n_updates=10, n_micro_batches=40, n_views=5, n_captions=3, n_milestones=2, n_pictures=4,
    n_denoising_steps=20,
)  # fmt: skip
PIECES = Pieces(load=10, encode=2, caption=1, micro_batch=(3.0, 5.0), denoise=0.5, decode=2)


def a_plan(**changes: object) -> Plan:
    known = {
        "work": WORK, "pieces": PIECES, "images_a_step": 4, "seen": (8.0, 24.0),
        "characters": {"ellie": 30.0, "rex": 10.0}, "memory_gb": 3.0, "free_memory_gb": 5.0,
        "disk_gb": 1.0, "free_disk_gb": 100.0, "by_threads": {1: 9.0, 2: 4.0}, "threads": 1,
        "saved": {"resolution: 384": 90.0, "lora.rank: 4": 3.0, "resolution: 256": -1.0},
    }  # fmt: skip
    return Plan(**known | changes)


def test_a_run_takes_what_its_pieces_take() -> None:
    assert PIECES.seconds(WORK) == {
        "to begin": 10 + 5 * 2 + 3,
        "10 updates": 40 * 4,
        "4 pictures": 4 * (20 * 0.5 + 2),
    }
    assert PIECES.doubt == 0.25
    assert a_plan().seconds == 23 + 160 + 48


def test_a_plan_says_what_a_person_wants_to_know() -> None:
    text = str(a_plan())
    assert "4 min, between 3 min and 5 min: 23 s to begin, 3 min 10 updates, 48 s 4 pictures" in text
    assert "3.0 GB at most; 5.0 GB more were free" in text
    assert "seen 8 to 24 times" in text and "ellie 30 times, rex 10 times" in text
    assert "1: 9.00 s, 2: 4.00 s a micro-batch; fastest: 2, set OMP_NUM_THREADS=2" in text
    assert "resolution: 384: 90 s" not in text and "resolution: 384: 2 min" in text
    assert "lora.rank: 4: 3 s (less than the doubt)" in text and "resolution: 256: nothing" in text


def test_what_does_not_fit_is_no_go() -> None:
    assert not a_plan().refusals(hours=1)
    assert a_plan(disk_gb=101.0).refusals() == ["101.0 GB of disk, and 100.0 are free"]
    assert a_plan().refusals(hours=0.01) == ["up to 5 min, more than 0.01 hours"]


def test_looks_at_held_out_frames_take_their_time() -> None:
    seconds = PIECES.seconds(replace(WORK, n_validations=3))
    assert seconds["3 looks at held-out frames"] == 3 * 32 * 0.5 / 2
    assert not any("held-out" in part for part in PIECES.seconds(WORK))


@pytest.fixture
def trainer(project: Path, tiny_model: str) -> LoRATrainer:
    data = draw_frames(project / "data" / "instance_images", 3)
    images = [{"file_name": p.name, "characters": ["ellie"], "faces": []} for p in data.glob("*.png")]
    images[0]["characters"] = ["ellie", "rex"]
    files.write_json(data.parent / "data_summary.json", {"schema_version": 1, "images": images})
    settings = {
        "training": {"max_train_steps": 6, "save_steps": 3, "validation_prompt": ["a", "b"]},
        "resolution": 128,
        "balance_characters": True,
        "thin_duplicates": True,
    }
    return LoRATrainer(config=tiny_config(tiny_model, **settings))


def test_a_plan_counts_the_run_and_leaves_nothing_behind(
    trainer: LoRATrainer, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = sorted(project.rglob("*"))
    loaded = []
    load = components.load_components
    monkeypatch.setattr(
        components, "load_components", lambda *given: loaded.append(load(*given)) or loaded[-1]
    )
    found = trainer.plan()
    assert "thin_duplicates" not in capsys.readouterr().out, "two images say nothing of the whole"
    assert found.work == Work(
        n_updates=6, n_micro_batches=12, n_views=3, n_captions=3, n_milestones=2, n_pictures=8,
        n_denoising_steps=2,
    )  # fmt: skip
    assert found.characters == {"ellie": 12.0, "rex": 7.2}, "5 an epoch, 3 of them with both"
    assert found.seen == (2.4, 7.2)
    assert len(found.pieces.micro_batch) == 2
    assert min(*found.pieces.micro_batch, found.pieces.denoise, found.pieces.encode) > 0
    pooled = "training.pooled_attention: 2 (an approximation; with it, a plan says how close)"
    assert set(found.saved) == {"resolution: 96", "resolution: 64", "lora.rank: 1", pooled}
    assert "approximation  " not in str(found)
    assert 1 in found.by_threads
    assert sorted(project.rglob("*")) == before
    trainer.load()
    assert trainer.plan().work.n_views == 0, "they are encoded"
    assert not [name for name, _ in loaded[0].unet.named_parameters() if "lora" in name]


def test_the_command_says_go_or_no_go(
    trainer: LoRATrainer, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("bunny_lora.trainer.make_plan", lambda config: a_plan())
    files.write_text(project / "p.yaml", trainer.config.to_yaml())
    assert cli.main(["plan", "--config", "p.yaml"]) == 0
    assert "\ngo             bunny-lora train" in capsys.readouterr().out
    assert cli.main(["plan", "--config", "p.yaml", "--hours", "0.01"]) == 2
    assert "no-go: the run would take up to 5 min, more than 0.01 hours" in capsys.readouterr().err


def test_what_is_left_of_a_run_is_planned(trainer: LoRATrainer) -> None:
    data = ImageDataset(trainer.data_dir, resolution=32, center_crop=True, instance_prompt="")
    left = planning.count_work(trainer.config, data, 0, n_done=4)
    assert (left.n_updates, left.n_milestones, left.n_pictures) == (2, 1, 4)
    assert planning.count_work(trainer.config, data, 0, n_done=6).n_micro_batches == 0
