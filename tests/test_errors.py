import pytest
from IPython.core.interactiveshell import InteractiveShell

from bunny_lora.errors import BunnyLoraError

CELL = "from bunny_lora.errors import BunnyLoraError\n{}"


@pytest.fixture
def shell():
    yield InteractiveShell.instance(colors="nocolor")
    InteractiveShell.clear_instance()


def test_a_notebook_shows_the_message_without_a_traceback(shell, capsys):
    result = shell.run_cell(CELL.format("raise BunnyLoraError('No such frame: do this.')"))
    assert isinstance(result.error_in_exec, BunnyLoraError)
    shown = capsys.readouterr()
    assert (shown.out + shown.err).strip() == "BunnyLoraError: No such frame: do this."


def test_a_bug_keeps_its_traceback(shell, capsys):
    shell.run_cell(CELL.format("1 / 0"))
    shown = capsys.readouterr()
    assert "Traceback" in shown.out + shown.err
