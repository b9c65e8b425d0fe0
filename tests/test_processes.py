"""Several processes on one run, over gloo: what one process does is the oracle."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_frames, open_image, tiny_config
from safetensors.torch import load_file

from bunny_lora import report
from bunny_lora.batch import draw_batch, weights_identity
from bunny_lora.config import Config
from bunny_lora.core import eval_result, ranks
from bunny_lora.core.files import read_json
from bunny_lora.evaluation import evaluate
from bunny_lora.inference import load_lora_pipeline
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training import checkpoint, log
from bunny_lora.training.distributed import ProcessGroup

TRAINING = {
    "max_train_steps": 4,
    "gradient_accumulation_steps": 4,
    "save_steps": 2,
    "validation_prompt": ["ellie", "rex", "phil"],
    "num_validation_images": 1,
}
LORA = {"train_text_encoder": True, "dropout": 0.1}
EVALUATION = {"prompts": ["{name}, waving"], "num_images_per_prompt": 2}
DEADLINE_SEC = 120


@pytest.fixture
def data(project: Path) -> Path:
    return draw_frames(project / "data" / "instance_images", 3)


def config_of(tiny_model: str, output_dir: str, **training: object) -> Config:
    return tiny_config(
        tiny_model,
        output_dir=output_dir,
        lora=LORA,
        training=TRAINING | training,
        evaluation=EVALUATION,
    )


def written(config: Config, project: Path) -> str:
    path = project / "params" / f"{config.output_dir}.yaml"
    path.write_text(config.to_yaml())
    return str(path)


def start(count: int, program: str, *arguments: str, roots: list[Path] | None = None) -> list:
    """Start a Python program in so many processes that know of each other, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        if roots:
            place["BUNNY_LORA_ROOT"] = roots[rank]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *arguments],
                env=os.environ | {key: str(value) for key, value in place.items()},
                cwd=roots[rank] if roots else None,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def ended(started: list) -> list[tuple[int, str, str]]:
    """Return exit code, standard output and errors of each process."""
    try:
        return [(p.communicate(timeout=DEADLINE_SEC), p.returncode) for p in started]
    finally:
        for process in started:
            process.kill()
            with process:  # closes its pipes; open ones would fail whatever test runs later
                pass


COMMANDS = "import sys; from bunny_lora.cli import main; sys.exit(main(sys.argv[1:]))"


def finished(count: int, *arguments: str, roots: list[Path] | None = None) -> list[str]:
    """Run a command in so many processes, which must succeed; return what each printed."""
    results = ended(start(count, COMMANDS, *arguments, roots=roots))
    assert [code for _, code in results] == [0] * count, results
    return [out for (out, _), _ in results]


def assert_same_but_for_rounding(run: Path, oracle: Path) -> None:
    ours, theirs = report.read_log(run), report.read_log(oracle)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for key in ("loss", "learning_rate", "grad_norm"):
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in theirs], rel=1e-4), key
    for part in ("unet", "text_encoder"):
        name = f"final/{part}/adapter_model.safetensors"
        got, wanted = load_file(run / name), load_file(oracle / name)
        assert got.keys() == wanted.keys()
        for key, tensor in wanted.items():
            # a step of Adam moves a weight by the learning rate, whatever its gradient's last bits
            assert torch.allclose(got[key], tensor, atol=2e-4), key
    shown = sorted(path.relative_to(oracle) for path in oracle.glob("samples/*/*.png"))
    assert len(shown) == 6
    for name in shown:
        got, wanted = (np.asarray(open_image(folder / name), float) for folder in (run, oracle))
        assert abs(got - wanted).max() <= 2, name


def test_several_learn_what_one_learns(tiny_model: str, data: Path, project: Path) -> None:
    LoRATrainer(config=config_of(tiny_model, "one")).train()
    several = config_of(tiny_model, "several")
    printed = finished(3, "train", "--config", written(several, project))
    assert ", 3 processes" in printed[0]
    assert not any(printed[1:]), "the others are silent"
    assert_same_but_for_rounding(project / "several", project / "one")


def test_a_run_goes_on_in_another_number_of_processes(
    tiny_model: str, data: Path, project: Path
) -> None:
    LoRATrainer(config=config_of(tiny_model, "whole")).train()
    parts = config_of(tiny_model, "parts")
    path = written(parts, project)
    finished(3, "train", "--config", path, "--max-steps", "2")
    LoRATrainer(config=config_of(tiny_model, "parts", max_train_steps=3)).train()
    (told, _) = finished(2, "train", "--config", path)
    assert "processes: 1 before, 2 now" in told
    assert_same_but_for_rounding(project / "parts", project / "whole")
    history = read_json(project / "parts" / "checkpoint-4" / checkpoint.STATE)["history"]
    assert [entry["environment"]["processes"] for entry in history] == ["3", "1", "2"]


def test_evaluation_and_batches_are_shared_and_come_out_the_same(
    tiny_model: str, data: Path, project: Path
) -> None:
    config = config_of(tiny_model, "run", validation_prompt=[])
    config = config.model_copy(update={"character_names": ["ellie"]})
    path = written(config, project)
    LoRATrainer(config=config).train()
    prompts = project / "prompts.txt"
    prompts.write_text("ellie\nrex, waving\nphil\n")

    shared = finished(2, "evaluate", "--config", path)
    by_two = eval_result.read(project / "run")
    files = [project / "run" / "evaluation" / image.file for image in by_two.images]
    pixels = [np.asarray(open_image(file)) for file in files]
    for file in files:
        file.unlink()
    alone = evaluate(project / "run", config=config)
    assert all(np.array_equal(a, open_image(b)) for a, b in zip(pixels, files, strict=True))
    for key in ("models", "differences", "drift", "reference"):
        assert getattr(by_two, key) == getattr(alone, key)
    assert "features: palette" in shared[0] and not shared[1]

    options = ["--steps", "2", "--seed", "1", "--width", "32", "--height", "32"]
    command = ["generate", "--lora-weights", "run/final", "--prompts", str(prompts)]
    finished(2, *command, "--out", "by_two", *options)
    weights = {project / "run" / "final": 1.0}
    draw_batch(
        load_lora_pipeline(None, weights),
        ["ellie", "rex, waving", "phil"],
        [1],
        project / "by_one",
        weights_identity(None, weights),
        num_inference_steps=2,
        guidance_scale=7.5,
        negative_prompt=None,
        width=32,
        height=32,
        lora_scale=1.0,
    )
    names = {path.name for path in (project / "by_one").iterdir()}
    assert names == {path.name for path in (project / "by_two").iterdir()}
    names.remove("contact_sheet-1.png")  # It tells its folder's name.
    assert len(names) == 3
    for name in names:
        assert (project / "by_two" / name).read_bytes() == (project / "by_one" / name).read_bytes()


def test_computers_without_a_common_disk_need_the_same_data(
    tiny_model: str, project: Path, tmp_path: Path
) -> None:
    roots = [tmp_path / name for name in ("here", "there", "elsewhere")]
    for root, seed in zip(roots, (0, 0, 1), strict=True):
        (root / "params").mkdir(parents=True)
        (root / "notebooks").mkdir()
        draw_frames(root / "data" / "instance_images", 3, seed)
    path = written(config_of(tiny_model, "run"), project)
    refused = ended(start(2, COMMANDS, "train", "--config", path, roots=roots[::2]))
    for (_, told), code in refused:
        assert code == 2 and "Process 1 has other training data than the main process" in told
    finished(2, "train", "--config", path, roots=roots[:2])
    assert (roots[0] / "run" / "final").is_dir() and not (roots[1] / "run").exists()


def test_idle_processes_are_refused_once_and_in_words(
    tiny_model: str, data: Path, project: Path
) -> None:
    path = written(config_of(tiny_model, "run", gradient_accumulation_steps=1), project)
    ((_, main), code), ((_, other), other_code) = ended(start(2, COMMANDS, "train", "--config", path))
    assert (code, other_code) == (2, 2)
    assert "2 processes share the micro-batches" in main and "Traceback" not in main + other
    assert not (project / "run").exists()


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + DEADLINE_SEC
    while time.monotonic() < deadline:
        if len(list(log.read_lines(run / "log.jsonl"))) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step}")


# What a frozen process is noticed by, in seconds instead of the better part of a minute.
IMPATIENT = "from bunny_lora.training import distributed; distributed.LOST_AFTER_SEC = 4.0; "


THREADS_AT_THE_END = """
import atexit, os
atexit.register(lambda: print(len(os.listdir("/proc/self/task"))))  # the first one comes last
import torch
from bunny_lora.training.distributed import process_group
for _ in range(2):
    with process_group(torch.device("cpu")) as group:
        group.barrier()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="Linux lists threads")
def test_no_thread_outlives_python() -> None:
    results = ended(start(2, THREADS_AT_THE_END))
    assert [(out, code) for (out, _), code in results] == [("1\n", 0)] * 2, results


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_stops_the_others_with_the_last_step_saved(
    tiny_model: str, data: Path, project: Path, number: int
) -> None:
    config = config_of(tiny_model, "run", max_train_steps=100_000, save_steps=50_000)
    started = start(2, IMPATIENT + COMMANDS, "train", "--config", written(config, project))
    wait_for_step(project / "run", 3)
    started[1].send_signal(number)
    lost_at = time.monotonic()
    ((_, told), code) = ended(started[:1])[0]
    assert time.monotonic() - lost_at < 60
    started[1].kill()
    started[1].communicate()
    assert code == 2 and "Traceback" not in told
    assert "Another process of this run has ended" in told and "goes on from there" in told
    steps = len(report.read_log(project / "run"))
    assert checkpoint.verify(project / "run" / f"checkpoint-{steps}") is None
    config = config_of(tiny_model, "run", max_train_steps=steps + 1, validation_prompt=[])
    LoRATrainer(config=config).train()
    assert len(report.read_log(project / "run")) == steps + 1


def test_accelerates_own_launcher_trains_and_stops_in_good_order(
    tiny_model: str, data: Path, project: Path
) -> None:
    config = config_of(tiny_model, "run", max_train_steps=100_000, save_steps=50_000)
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "-m", "bunny_lora", "train", "--config"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", *launch, written(config, project)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(project / "run", 2)
    launcher.send_signal(signal.SIGTERM)
    told = launcher.communicate(timeout=DEADLINE_SEC)[0]
    assert told.count("a request to end (SIGTERM)") == 1, told
    steps = len(report.read_log(project / "run"))
    assert checkpoint.verify(project / "run" / f"checkpoint-{steps}") is None
    assert not (project / "run" / ".lock").exists()


def test_shares_are_fair_and_leave_nothing_out() -> None:
    items = list(range(7))
    shares = [ProcessGroup(rank, 3).local_shard(items) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert list(ProcessGroup().share(items, str)) == [(i, str(i)) for i in items]
    assert json.dumps(ProcessGroup().all_gather({"a": 1})) == '[{"a": 1}]'


def test_a_rank_without_company_silences_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert ranks.is_main_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not ranks.is_main_process()
