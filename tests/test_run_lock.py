import json
import subprocess
import sys
from pathlib import Path

import pytest

from bunny_lora.core import lock
from bunny_lora.errors import BunnyLoraError

HOLDER = """
import sys, time
from pathlib import Path
from bunny_lora.core import lock
with lock.acquire(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(run: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    try:
        with (
            pytest.raises(BunnyLoraError, match=f"written by process {process.pid} on .*one"),
            lock.acquire(tmp_path / "run"),
        ):
            pass
        assert json.loads((tmp_path / "run" / ".lock").read_text())["process"] == process.pid
    finally:
        process.kill()
        process.wait()


def test_the_lock_of_a_killed_process_locks_nobody_out(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    process.kill()
    process.wait()
    assert (tmp_path / "run" / ".lock").is_file()
    with lock.acquire(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()  # Nothing was written, so nothing stays.


def test_two_calls_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with lock.acquire(tmp_path), pytest.raises(BunnyLoraError), lock.acquire(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(BunnyLoraError, match="Nothing was changed"), lock.acquire(tmp_path / "taken"):
        pass
