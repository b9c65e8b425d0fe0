import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bunny_lora.core import lock
from bunny_lora.errors import BunnyLoraError

NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP]

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


@pytest.fixture(params=NO_LOCKS, ids=errno.errorcode.get)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that answers every lock as some mounts do."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_on_a_disk_without_locks_a_run_goes_on_and_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock.acquire(tmp_path / "run"):
        (tmp_path / "run" / "log.jsonl").touch()
    (said,) = capsys.readouterr().out.splitlines()
    assert "disk without locks" in said and "another computer" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


@pytest.mark.usefixtures("no_locks")
def test_a_second_writer_on_the_same_computer_is_refused_there_too_and_a_killed_one_is_not_feared(
    tmp_path: Path,
) -> None:
    process = holder(tmp_path / "run")
    with pytest.raises(BunnyLoraError, match=f"process {process.pid}"), lock.acquire(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / ".lock").is_file()
    process.kill()
    process.wait()
    with lock.acquire(tmp_path / "run"):
        pass
