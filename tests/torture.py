"""The kill test: SIGKILL at random moments, resume, and compare with the run that was never stopped.

    python tests/torture.py --kills 50 --papermill 5

Each victim is forked from one process that has loaded everything, so a kill costs a second or two. Half
of the kills come at a random time, half right before a random flush or rename of the disk, which is
inside a save. Weights, log and samples must come out the same to the byte.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
N_DISK_CALLS = 150  # fewer than a run makes, so that most kills strike
PATIENCE_SEC = 120

SECTION = """
finetuning:
  base_model: random-tiny
  source: bunny-world
  data_dir: data/instance_images
  resolution: 64
  lora: {rank: 2, alpha: 2, dropout: 0.1, train_text_encoder: true}
  training:
    learning_rate: 1.0e-3
    lr_scheduler: cosine
    max_train_steps: 24
    gradient_accumulation_steps: 2
    mixed_precision: "no"
    save_steps: 6
    save_minutes: 0.004
    validation_prompt: ellie in a forest
    num_validation_images: 1
  sampling: {num_inference_steps: 2}
"""


@dataclass
class Report:
    """What happened, and what must be nothing."""

    kills: int = 0
    kills_in_saves: int = 0
    resumes: int = 0
    runs: int = 0
    differing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    orphans: int = 0

    def __str__(self) -> str:
        return (
            f"kills             {self.kills}, {self.kills_in_saves} of them inside a save\n"
            f"resumes           {self.resumes}\n"
            f"runs compared     {self.runs}\n"
            f"files that differ {len(self.differing)} {self.differing[:5] or ''}\n"
            f"files left over   {len(self.left_over)} {self.left_over[:5] or ''}\n"
            f"orphaned kernels  {self.orphans}"
        )

    @property
    def good(self) -> bool:
        """Whether every run came out as if it had never been stopped."""
        return not (self.differing or self.left_over or self.orphans)


def outcome(run_dir: Path) -> dict[str, bytes]:
    """Return what must not depend on how often the run was killed."""
    files = [*run_dir.glob("final/**/*.*"), *run_dir.glob("samples/**/*"), run_dir / "log.jsonl"]
    return {p.relative_to(run_dir).as_posix(): p.read_bytes() for p in files if p.is_file()}


def compare(project: Path, name: str, report: Report) -> None:
    """Compare a finished run with the unbroken one, and look for what nobody cleaned up."""
    whole, broken = outcome(project / "whole"), outcome(project / name)
    different = {key for key in whole.keys() | broken.keys() if whole.get(key) != broken.get(key)}
    report.differing += [f"{name}/{key}" for key in sorted(different)]
    kept = {path.name for path in (project / "whole").iterdir()}
    found = [p for p in (project / name).rglob("*") if p.name.startswith(".") or ".tmp" in p.name]
    found += [p for p in (project / name).iterdir() if p.name not in kept]
    found += (project / "data").rglob(".*")
    report.left_over += [str(path.relative_to(project)) for path in found]
    report.runs += 1


# ---------------------------------------------------------------------------- kills by the process


def train(project: Path, name: str) -> None:
    """One victim's life: the command that a user would give again and again."""
    from bunny_lora.config import load_config
    from bunny_lora.trainer import LoRATrainer

    config = load_config(project / "torture.yaml", {"output_dir": name})
    LoRATrainer(config=config).train()


def fork(project: Path, name: str, kill_before: int | None = None) -> int:
    """Start a victim; it kills itself right before its `kill_before`-th flush or rename."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        if kill_before is not None:
            arm(kill_before)
        train(project, name)
        status = 0
    finally:
        os._exit(status)


def arm(countdown: int) -> None:
    """Have the process die right before one of its calls that change or flush the disk."""
    calls = iter(range(countdown))

    def deadly(call: Callable) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir")):
        setattr(module, name, deadly(getattr(module, name)))


def torture(project: Path, n_kills: int, seed: int, report: Report) -> None:
    """Kill and resume until `n_kills` are reached and every run has come to its end."""
    random_numbers, number = random.Random(seed), 0
    started = time.monotonic()
    pid = fork(project, "whole")
    assert os.waitpid(pid, 0)[1] == 0, "the unbroken run failed"
    whole_sec = time.monotonic() - started
    while report.kills < n_kills:
        number += 1
        name, first, done = f"broken-{number}", True, False
        while not done:
            aimed = report.kills < n_kills and random_numbers.random() < 0.5
            pid = fork(project, name, random_numbers.randrange(N_DISK_CALLS) if aimed else None)
            deadline = random_numbers.uniform(0.2, 0.9) * whole_sec
            timed = report.kills < n_kills and not aimed
            status = wait(pid, deadline if timed else None)
            report.resumes += not first
            first, done = False, status == 0
            if os.WIFSIGNALED(status):
                report.kills += 1
                report.kills_in_saves += aimed
            elif status:
                report.differing.append(f"{name} failed with status {status}")
                return
        compare(project, name, report)


def wait(pid: int, deadline_sec: float | None) -> int:
    """Return the status of a child, killing it if it lives longer than `deadline_sec`."""
    end = time.monotonic() + (deadline_sec or PATIENCE_SEC)
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


# ---------------------------------------------------------------------------- kills under papermill


def torture_papermill(project: Path, n_kills: int, seed: int, report: Report) -> None:
    """Kill papermill, or its kernel, in the middle of the training cell; run the same line again."""
    random_numbers, kills, name = random.Random(seed), 0, "paper-0"
    while kills < n_kills:
        papermill = start_papermill(project, name)
        kernel = wait_for_kernel(papermill, project / name / "log.jsonl")
        if kernel is None:  # It was done before anybody could kill it.
            finish_papermill(papermill, project, name, report)
            name = f"paper-{kills}"
            continue
        time.sleep(random_numbers.uniform(0, 0.6))
        (kernel if kills % 2 else psutil.Process(papermill.pid)).kill()
        kills += 1
        report.kills += 1
        report.resumes += 1
        papermill.wait(timeout=PATIENCE_SEC)  # It does not wait for ever for a dead kernel.
        report.orphans += len(psutil.wait_procs([kernel], timeout=15)[1])
    if n_kills:
        finish_papermill(start_papermill(project, name), project, name, report)


def finish_papermill(process: subprocess.Popen, project: Path, name: str, report: Report) -> None:
    if process.wait(timeout=PATIENCE_SEC) != 0:
        report.differing.append(f"the last papermill run of {name} failed")
    compare(project, name, report)


def start_papermill(project: Path, name: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "02_train.ipynb")]
    command += [str(project / "out.ipynb"), "-p", "config_path", str(project / "torture.yaml")]
    command += ["-p", "output_dir", name, "--kernel", "python3", "--cwd", str(project)]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen([*command, "--no-progress-bar"], stdout=nowhere, stderr=nowhere)


def wait_for_kernel(papermill: subprocess.Popen, log: Path) -> psutil.Process | None:
    """Return the kernel once it trains; None if papermill has come to its end before."""
    before, end = log.stat().st_mtime_ns if log.is_file() else 0, time.monotonic() + PATIENCE_SEC
    while time.monotonic() < end and papermill.poll() is None:
        time.sleep(0.02)
        if log.is_file() and log.stat().st_mtime_ns != before and log.stat().st_size:
            children = psutil.Process(papermill.pid).children()
            return next(c for c in children if "ipykernel_launcher" in " ".join(c.cmdline()))
    return None


# ---------------------------------------------------------------------------- the command


def prepare(project: Path) -> None:
    """Make `project` a project of its own, with nothing in it but the configuration."""
    (project / "params").mkdir(parents=True, exist_ok=True)
    (project / "notebooks").mkdir(exist_ok=True)
    (project / "torture.yaml").write_text(SECTION, encoding="utf-8")
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ |= {"BUNNY_LORA_ROOT": str(project), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"PYTHONPATH": python_path}
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--papermill", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    report, started = Report(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bunny-torture-") as folder:
        project = Path(folder)
        prepare(project)
        import bunny_lora.trainer  # noqa: F401  # Once, for all victims.
        from bunny_lora.config import load_config
        from bunny_lora.prepare import prepare_data

        prepare_data(load_config(project / "torture.yaml"))
        torture(project, options.kills, options.seed, report)
        torture_papermill(project, options.papermill, options.seed, report)
    print(f"{report}\ntime              {time.monotonic() - started:.0f} s")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
