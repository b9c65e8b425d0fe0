"""Trackers through Accelerate's interface: off unless asked for, and never a run's end."""

import struct
from pathlib import Path

import pytest
from accelerate import tracking
from conftest import draw_frames, tiny_config

from bunny_lora.errors import BunnyLoraError
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import trackers

TRAINING = {
    "save_steps": 2,
    "max_train_steps": 3,
    "validation_prompt": "ellie",
    "num_validation_images": 1,
}


class Fake(tracking.GeneralTracker):
    """Keeps what it is told; one that is made to fail does so at the second step."""

    requires_logging_directory = False
    fails = False

    def __init__(self, **named: object) -> None:
        super().__init__()
        self.named, self.told = named, []
        type(self).last = self

    def start(self) -> None:
        self.told.append("start")

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict) -> None:
        self.settings = values

    def log(self, values: dict, step: int | None = None, **_: object) -> None:
        if self.fails and step == 2:
            raise ConnectionError("the network is gone")
        self.told.append((step, values))

    def log_images(self, values: dict, step: int | None = None, **_: object) -> None:
        self.told.append((step, {key: len(images) for key, images in values.items()}))

    def finish(self) -> None:
        self.told.append("finish")


@pytest.fixture
def data(project: Path) -> Path:
    return draw_frames(project / "data" / "instance_images", 4)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    kind = type("FakeOfWandb", (Fake,), {"name": "wandb"})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", kind)
    monkeypatch.setattr(tracking, "_available_trackers", [*tracking.get_available_trackers(), "wandb"])
    return kind


def run(tiny_model: str, names: list[str]) -> LoRATrainer:
    training = TRAINING | {"trackers": names}
    trainer = LoRATrainer(config=tiny_config(tiny_model, training=training))
    trainer.train()
    return trainer


def test_a_tracker_is_told_of_steps_samples_and_settings(
    tiny_model: str, data: Path, fake: type[Fake]
) -> None:
    run(tiny_model, ["wandb"])
    told = fake.last.told
    assert told[0] == "start" and told[-1] == "finish"
    steps = [step for step, values in told[1:-1] if "train/loss" in values]
    assert steps == [1, 2, 3]
    assert [(s, v) for s, v in told[1:-1] if "samples" in v] == [
        (2, {"samples": 1}),
        (3, {"samples": 1}),
    ]
    assert fake.last.settings["training.max_train_steps"] == 3
    assert fake.last.named["name"] == "run" and fake.last.named["resume"] == "allow"
    identity = fake.last.named["id"]
    goes_on = LoRATrainer(
        config=tiny_config(
            tiny_model, training=TRAINING | {"trackers": ["wandb"], "max_train_steps": 4}
        )
    )
    goes_on.train()
    assert fake.last.named["id"] == identity, "it goes on there, too"


def test_one_that_fails_is_said_and_the_run_goes_on(
    tiny_model: str, data: Path, fake: type[Fake], capsys: pytest.CaptureFixture
) -> None:
    fake.fails = True
    trainer = run(tiny_model, ["wandb"])
    said = capsys.readouterr().out
    assert "wandb fails and is told no more of this run: the network is gone" in said
    assert (trainer.run_dir / "final").is_dir()


def test_nobody_is_told_anything_unless_asked(tiny_model: str, data: Path, fake: type[Fake]) -> None:
    run(tiny_model, [])
    assert not hasattr(fake, "last")


def test_a_missing_package_is_refused_before_anything_is_loaded(
    tiny_model: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(BunnyLoraError, match="Run pip install mlflow"):
        run(tiny_model, ["mlflow"])
    assert not Path("run").exists()


def test_tensorboard_gets_scalars_and_pictures_in_the_runs_folder(tiny_model: str, data: Path) -> None:
    event_pb2 = pytest.importorskip("tensorboardX").proto.event_pb2
    trainer = run(tiny_model, ["tensorboard"])
    events = []
    for path in sorted((trainer.run_dir / "tensorboard").glob("events*")):
        content = path.read_bytes()
        while content:  # TFRecords: length, its checksum, the event, its checksum.
            (length,) = struct.unpack("<Q", content[:8])
            events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    tags = {(event.step, value.tag) for event in events for value in event.summary.value}
    assert {(step, "train/loss") for step in (1, 2, 3)} <= tags
    assert {(2, "samples/00-0"), (3, "samples/00-0")} <= tags


def test_each_tracker_gets_the_arguments_that_it_takes(tmp_path: Path) -> None:
    for name in ("tensorboard", "wandb", "mlflow", "trackio"):
        kind = tracking.LOGGER_TYPE_TO_CLASS[name]
        kind(**trackers._arguments(name, tmp_path, 0, "identity"))
