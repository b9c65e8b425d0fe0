"""The benchmarks run, and what they work out from their measurements adds up."""

import importlib
import re
import runpy
import subprocess
import sys

import pytest
from conftest import CHECKOUT

TRAIN_STEP = CHECKOUT / "benchmarks" / "train_step.py"
COST = CHECKOUT / "benchmarks" / "cost.py"


@pytest.fixture(scope="module")
def cost() -> dict:
    return runpy.run_path(str(COST))


def measured(cost: dict, **changes: float) -> object:
    pieces = dict.fromkeys(cost["Measured"].__dataclass_fields__, 0)
    return cost["Measured"](**pieces | changes)


def test_a_run_costs_what_its_pieces_cost(cost: dict) -> None:
    m = measured(cost, load_sec=10, encode_sec=2, micro_batch_sec=3, denoise_sec=1, decode_sec=5)
    plan = cost["Plan"](n_characters=4)
    alone = 10 + 65 * 2 + 500 * 4 * 3 + 40 * (25 * 1 + 5)
    assert cost["run_sec"](m, plan) == alone
    assert cost["run_sec"](m, plan, 4) == 10 + 65 * 2 + 500 * 3 + 10 * 30


def test_machines_take_whole_runs_first_and_share_runs_when_there_are_more_of_them(cost: dict) -> None:
    m, wall = measured(cost, micro_batch_sec=1), cost["wall_sec"]
    plan = cost["Plan"](n_characters=1000)  # 250 runs of 2,000 micro-batches
    assert wall(m, plan, 1) == 250 * 2000
    assert wall(m, plan, 50) == 5 * 2000
    few = cost["Plan"](n_characters=10)
    assert wall(m, few, 3) == 2000
    assert wall(m, few, 50) == 500, "a run's four micro-batches are shared by four machines"
    slow = measured(cost, micro_batch_sec=1, reduce_sec=2)
    assert wall(slow, few, 50) == 1500


def test_disk_counts_the_base_model_on_every_machine_that_is_used(cost: dict) -> None:
    m, disk = measured(cost, base_bytes=1000, run_bytes=10, frame_bytes=1), cost["disk_bytes"]
    plan = cost["Plan"](n_characters=10)
    assert disk(m, plan, 1) == 1000 + 3 * 75
    assert disk(m, plan, 50) == 3 * 1000 + 3 * 75


def test_the_cost_is_measured_by_one_command() -> None:
    command = [sys.executable, str(COST), "--base-model", "random-tiny", "--resolution", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = re.findall(r"^\| (10|100|1,000) \| (\d+) \|", done.stdout, re.MULTILINE)
    assert rows == [("10", "3"), ("100", "25"), ("1,000", "250")]
    pieces = dict(re.findall(r"^  (\w+) +([\d.,]+)$", done.stdout, re.MULTILINE))
    assert pieces.keys() == {"load_sec", "encode_sec", "micro_batch_sec", "denoise_sec", "decode_sec",
        "reduce_sec", "memory_gb", "base_bytes", "run_bytes", "frame_bytes", "n_trainable"}  # fmt: skip
    numbers = {name: float(value.replace(",", "")) for name, value in pieces.items()}
    assert numbers.pop("decode_sec") >= 0  # what is left of a picture without its steps
    assert all(number > 0 for number in numbers.values()), numbers


def test_a_training_image_is_compared_with_the_ancestors_by_one_command(tmp_path) -> None:
    results = tmp_path / "benchmarks.md"
    results.write_text("before\n")
    command = [sys.executable, str(TRAIN_STEP), "--quick", "--repeats", "1", "--append", str(results)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    text = results.read_text()
    assert text.startswith("before\n")
    assert "random-tiny at 64 px" in text and "load" in text and "torch 2." in text
    apart = re.findall(r"away from ours: the ancestor's loop (\S+), diffusers' script (\S+)\n", text)[0]
    assert all(float(x) < 3e-2 for x in apart)
    assert re.search(r"TFLOP at \d+% of the \S+ TFLOP/s", text)
    rows = re.findall(r"^\| ([^|\n]+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert [name for name, _ in rows][:3] == ["the ancestor's loop", "diffusers' script", "ours, plain"]
    assert all(float(seconds) > 0 for _, seconds in rows)


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        (
            "draw",
            ["--quick"],
            ["the ancestor's defaults", "the ancestor's, 2 steps", "ours: loaded", "a step"],
        ),
        ("growth", ["--frames", "2", "3"], ["2", "3"]),
        (
            "memory",
            ["--base-model", "random-tiny", "--resolution", "64", "--settings", "low_memory"],
            ["low_memory | 0."],
        ),
        (
            "profile_step",
            ["--base-model", "random-tiny", "--resolution", "64"],
            ["attention |", "convolutions |", "linear layers and LoRA |", "all |"],
        ),
        (
            "start",
            ["--base-model", "random-tiny", "--resolution", "32", "--frames", "2"],
            ["with data", "warm"],
        ),
    ],
)
def test_each_benchmark_is_one_command(name, options, rows, tmp_path) -> None:
    results = tmp_path / "benchmarks.md"
    command = [sys.executable, str(CHECKOUT / "benchmarks" / f"{name}.py"), *options]
    subprocess.run(
        [*command, "--repeats", "1", "--append", str(results)], check=True, capture_output=True
    )
    text = results.read_text()
    assert text.startswith("\n## 20") and "cores" in text and "load" in text and "torch 2." in text
    assert all(f"\n| {row}" in text for row in rows)


def test_operators_are_counted_as_what_they_do(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT / "benchmarks"))
    kind_of = runpy.run_path(str(CHECKOUT / "benchmarks" / "profile_step.py"))["kind_of"]
    kinds = {
        "aten::mkldnn_convolution": "convolutions",
        "aten::addmm": "linear layers and LoRA",
        "_LoRALinearBackward": "linear layers and LoRA",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::native_group_norm": "normalisation",
        "aten::copy_": "copies and casts",
        "aten::add": "all else",
    }
    assert {name: kind_of(name) for name in kinds} == kinds


def test_rows_have_medians_spread_and_ratios_of_both_clocks() -> None:
    measuring = runpy.run_path(str(CHECKOUT / "benchmarks" / "measuring.py"))
    seconds = measuring["Seconds"]
    times = {"a": [seconds(4, 6), seconds(8, 6), seconds(6, 6)], "b": [seconds(2, 3)]}
    lines = measuring["table"](times, "an image").splitlines()
    assert lines[2] == "| a | 6 | 4 | 8 | 1.00 | 6 | 1.00 |"
    assert lines[3] == "| b | 2 | 2 | 2 | 3.00 | 3 | 2.00 |"


def test_pictures_of_few_steps_tell_what_a_step_and_all_else_take(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT / "benchmarks"))
    script = runpy.run_path(str(CHECKOUT / "benchmarks" / "draw_cpp.py"))
    seconds = importlib.import_module("measuring").Seconds
    times = {"stable-diffusion.cpp 1": [seconds(10, 20)], "stable-diffusion.cpp 3": [seconds(14, 28)]}
    times |= {"ours 1": [seconds(3, 6)], "ours 3": [seconds(5, 10)]}
    found = script["rows"](times)
    assert found["step"] == {"stable-diffusion.cpp": [(2, 4)], "ours": [(1, 2)]}
    assert found["rest"] == {"stable-diffusion.cpp": [(8, 16)], "ours": [(2, 4)]}
    assert found["picture"] == {"stable-diffusion.cpp": [(32, 64)], "ours": [(14, 28)]}
