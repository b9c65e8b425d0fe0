"""The kill test at its smallest; `make torture` is the whole."""

import subprocess
import sys

from conftest import CHECKOUT


def test_a_run_that_is_killed_ends_with_the_bytes_of_one_that_was_not() -> None:
    command = [
        sys.executable,
        str(CHECKOUT / "tests" / "torture.py"),
        "--kills",
        "2",
        "--papermill",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "files that differ 0" in done.stdout and "files left over   0" in done.stdout
