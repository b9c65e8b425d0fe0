"""What the benchmarks share: sides in turns, medians and spread, and what they were measured on."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch


class Seconds(NamedTuple):
    """How long something took by the clock, and how much processor time of this process."""

    wall: float
    cpu: float


def timed(work: Callable[[], object]) -> Seconds:
    """Return how long a call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def take_turns(
    works: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: bool = True
) -> dict[str, list[Seconds]]:
    """Return the times of each work; with `warm_up`, after a turn that does not count."""
    turns = [{name: timed(work) for name, work in works.items()} for _ in range(repeats + warm_up)]
    return {name: [turn[name] for turn in turns[warm_up:]] for name in works}


def table(times: Mapping[str, Sequence[Seconds]], unit: str) -> str:
    """Return medians, spread and ratios to the first row, in Markdown."""
    head = [f"seconds {unit}, median", "from", "to", "times as fast", "CPU seconds", "times as few"]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    first = medians(next(iter(times.values())))
    for name, seconds in times.items():
        wall, cpu = medians(seconds)
        walls = [s.wall for s in seconds]
        cells = [name, *(f"{x:.3g}" for x in (wall, min(walls), max(walls)))]
        cells += [f"{first.wall / wall:.2f}", f"{cpu:.3g}", f"{first.cpu / cpu:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def medians(seconds: Sequence[Seconds]) -> Seconds:
    """Return the median of each clock."""
    return Seconds(*(statistics.median(clock) for clock in zip(*seconds, strict=True)))


def processor() -> str:
    """Return the processor's name and the widest instructions that torch has found in it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    bf16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {os.cpu_count()} cores, {widest}, {bf16} AVX512-BF16"


def section(title: str, facts: Sequence[str], results: str, load_before: float) -> str:
    """Return a section of docs/benchmarks.md: what was measured, on what, and the results."""
    machine = (
        f"{processor()}; {torch.get_num_threads()} threads; load {load_before:.1f} before,"
        f" {os.getloadavg()[0]:.1f} after"
    )
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, diffusers"
        f" {diffusers.__version__}"
    )
    lines = [
        f"## {datetime.date.today()} {title}",
        "",
        *(f"- {x}" for x in (*facts, machine, versions)),
    ]
    return "\n".join([*lines, "", results, ""])


def arguments(description: str | None, *, resolution: int, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base-model", default="random-bk-sdm-tiny")
    parser.add_argument("--resolution", type=int, default=resolution)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--append", type=Path, help="a file that the results are added to")
    return parser


@contextlib.contextmanager
def project() -> Iterator[Path]:
    """Have bunny_lora work in a project of its own, which is gone afterwards."""
    with tempfile.TemporaryDirectory() as root:
        for name in ("params", "notebooks"):
            (Path(root) / name).mkdir()
        os.environ["BUNNY_LORA_ROOT"] = root
        yield Path(root)


def report(text: str, file: Path | None) -> None:
    """Print results, and add them to a file where one is named."""
    print(text)
    if file:
        with file.open("a", encoding="utf-8") as results:
            results.write("\n" + text)
