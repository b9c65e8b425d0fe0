import io
import re
import sys
from types import SimpleNamespace

from jupyter_client.session import Session

from bunny_lora.core import progress as module
from bunny_lora.core.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_whole_lines_and_no_carriage_return(capsys):
    assert list(progress(range(50), desc="Training")) == list(range(50))
    text = capsys.readouterr().err
    first, *_, last = text.splitlines()
    assert first.startswith("Training:   0%")
    assert last.startswith("Training: 100%")
    assert text.endswith("\n")
    assert "\r" not in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_fast_loop_writes_two_lines_and_not_one_a_step(capsys):
    for _ in progress(range(10_000), desc="Training"):
        pass
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_slow_loop_writes_a_line_each_interval_with_an_eta(capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_INTERVAL_SEC", 0.0)
    for _ in progress(range(4), desc="Training"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 5
    assert re.search(r"2/4 \[00:00<00:00, .*it/s\]", lines[2])


def test_the_eta_averages_over_the_whole_run_and_not_the_last_seconds(monkeypatch):
    monkeypatch.setattr(module, "LINE_INTERVAL_SEC", 0.0)
    now_sec = 0.0
    bar = progress(total=40, desc="Training")
    bar._time = lambda: now_sec
    bar.start_t = bar.last_print_t = now_sec
    for duration_sec in [10.0] * 10 + [1.0] * 10:
        now_sec += duration_sec
        bar.update()
    assert "20/40 [01:50<01:50" in str(bar)
    bar.close()


def test_a_terminal_gets_one_line_that_is_drawn_over(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    list(progress(range(3), desc="Training"))
    assert terminal.getvalue().startswith("\rTraining")
    assert terminal.getvalue().count("\n") == 1


def test_the_callers_settings_win():
    bar = progress(total=3, desc="Training", unit="step", smoothing=0.5)
    assert (bar.unit, bar.smoothing) == ("step", 0.5)
    bar.close()


def kernel(monkeypatch, msg_id):
    """Be in a kernel that was asked by a message of this name."""
    request = {"header": {"msg_id": msg_id}}
    shell = SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda: request))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.delenv("BUNNY_LORA_PROGRESS", raising=False)


def test_a_notebook_gets_a_widget(monkeypatch):
    monkeypatch.setattr(module, "is_watched", lambda: True)
    bar = progress(range(3), desc="Training", display=False)
    assert hasattr(bar, "container")
    assert list(bar) == [0, 1, 2]


def test_a_notebook_is_watched_unless_a_program_runs_it_or_somebody_says_otherwise(monkeypatch):
    kernel(monkeypatch, "0b2c2c3e-6d1f-4d6e-8a43-1f1f5a2a0c11")
    assert module.is_watched()
    monkeypatch.setenv("BUNNY_LORA_PROGRESS", "lines")
    assert not module.is_watched()
    kernel(monkeypatch, Session().msg("execute_request")["header"]["msg_id"])  # As papermill's.
    assert not module.is_watched()
    monkeypatch.setenv("BUNNY_LORA_PROGRESS", "widgets")
    assert module.is_watched()


def test_a_notebook_that_nobody_watches_gets_lines_among_its_output(monkeypatch, capsys):
    monkeypatch.setattr(module, "in_notebook", lambda: True)
    monkeypatch.setattr(module, "is_watched", lambda: False)
    assert list(progress(range(3), desc="Training")) == [0, 1, 2]
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2 and not said.err


def test_plain_python_is_no_notebook():
    assert not module.in_notebook() and not module.is_watched()
