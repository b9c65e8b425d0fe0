"""Windows and macOS: the sources ask for nothing that they lack, and write no name that they refuse."""

import ast
import pickle
import re
from pathlib import Path, PureWindowsPath

import pytest
from conftest import CHECKOUT, draw_frames

from bunny_lora.dataset import ImageDataset
from bunny_lora.evaluation.protocol import ImageSpec
from bunny_lora.export.names import file_stem
from bunny_lora.training.latents import View, _Pixels

SOURCES = sorted((CHECKOUT / "bunny_lora").rglob("*.py"))
# Of Unix alone; symbolic links need rights on Windows that people do not have.
UNIX_CALLS = {"symlink", "symlink_to", "fork", "forkpty", "mkfifo", "mknod", "getuid", "geteuid"}
UNIX_CALLS |= {"getpgid", "killpg", "setsid", "uname", "chown", "fchmod", "getloadavg", "lockf"}
UNIX_CALLS |= {"sched_getaffinity", "alarm", "setitimer", "pause"}
UNIX_MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"}
EVERYWHERE = {"SIGINT", "SIGTERM", "SIG_DFL", "SIG_IGN"}
REFUSED = re.compile(r'[<>:"|?*\x00-\x1f]|[ .]$')
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
NASTY = ["CON", "nul.txt", "a:b", "what?", "rex.", "rex ", "a/b\\c", "兔" * 99, "x" * 300, "<&>|*", "."]


def lacking(source: str) -> list[str]:
    """What a module asks for and Windows has not; an import within `try` has its way out."""
    tree = ast.parse(source)
    guarded = {id(n) for t in ast.walk(tree) if isinstance(t, ast.Try) for n in ast.walk(t)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in UNIX_CALLS:
            found.append(node.attr)
        if isinstance(node, ast.Attribute) and re.fullmatch("SIG[A-Z_]+", node.attr):
            found += {node.attr} - EVERYWHERE
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in guarded:
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found += names & UNIX_MODULES
        if isinstance(node, ast.Constant) and node.value == "fork":
            found.append("fork")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_no_source_asks_for_what_windows_lacks(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert lacking(source) == []
    assert not re.search(r"\.(read_text|write_text|open)\(\)", source), "name the encoding"


def test_what_windows_lacks_is_found() -> None:
    source = "import fcntl\nos.fork()\nsignal.SIGHUP\na.symlink_to(b)\nget_context('fork')"
    assert sorted(lacking(source)) == ["SIGHUP", "fcntl", "fork", "fork", "symlink_to"]
    assert lacking("try:\n    import resource\nexcept ImportError:\n    pass") == []


@pytest.mark.parametrize("name", NASTY)
def test_names_of_people_become_names_that_every_file_system_takes(name: str) -> None:
    spec = ImageSpec("final", name, 0, "a prompt, " * 99, 2**32 - 1)
    files = [spec.file, f"images/training/{Path(spec.file).name}", f"{file_stem(name)}.safetensors"]
    for file in files:
        for part in PureWindowsPath(file).parts:
            assert not REFUSED.search(part) and not RESERVED.fullmatch(part)
        # 260 for the whole path: what is left is the user's own folder.
        assert len(file) <= 140


def test_no_file_of_the_project_is_refused_by_windows() -> None:
    kept = [CHECKOUT / name for name in ("bunny_lora", "docs", "notebooks", "params", "tests")]
    for path in (path for folder in kept for path in folder.rglob("*")):
        assert not REFUSED.search(path.name) and not RESERVED.fullmatch(path.name)


def test_what_reads_images_can_be_sent_to_a_worker_that_was_not_forked(tmp_path: Path) -> None:
    images = ImageDataset(draw_frames(tmp_path / "data", 2), resolution=32, center_crop=True)
    pixels = _Pixels(images, [View(1, zoomed=False, mirrored=True)])
    assert pickle.loads(pickle.dumps(pixels))[0].equal(images[1].flip(-1))
