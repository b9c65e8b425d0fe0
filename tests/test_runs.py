import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError

import bunny_lora
from bunny_lora.cli import main
from bunny_lora.config import validate
from bunny_lora.core import files, paths, provenance
from bunny_lora.errors import BunnyLoraError


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


# The project root


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The project that the package was installed from."""
    root = tmp_path / "checkout"
    for name in ("params", "notebooks", "bunny_lora"):
        (root / name).mkdir(parents=True)
    monkeypatch.setattr(paths, "PACKAGE_DIR", root / "bunny_lora")
    return root


@pytest.fixture
def outside(project, checkout, tmp_path, monkeypatch) -> Path:
    """A working folder that belongs to no project, and nothing in the environment."""
    monkeypatch.delenv("BUNNY_LORA_ROOT")
    folder = tmp_path / "outside"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_environment_variable_names_the_root(outside, project, monkeypatch):
    monkeypatch.setenv("BUNNY_LORA_ROOT", os.path.relpath(project))
    assert paths.project_root() == project


@pytest.fixture
def homeless(monkeypatch):
    """A process of a user that the system does not know, as in some containers."""
    pwd = pytest.importorskip("pwd")

    def unknown(who):
        raise KeyError(who)

    for name in ("HOME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    for function in ("getpwuid", "getpwnam"):
        monkeypatch.setattr(pwd, function, unknown)


@pytest.mark.usefixtures("homeless")
def test_no_home_folder_is_needed(project, tmp_path):
    assert validate({"base_model": "/models/sd"}).base_model == "/models/sd"
    assert paths.relative(tmp_path / "elsewhere") == str(tmp_path / "elsewhere")
    assert paths.relative(project / "here") == "here"


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("path", ["~/lora.safetensors", "~stranger/lora.safetensors"])
def test_a_path_in_a_home_folder_that_nobody_knows_is_one_message(project, capsys, path):
    assert main(["export", "--lora-weights", path, "--out", "here"]) == 2
    assert main(["generate", "--lora-weights", path, "--prompt", "x"]) == 2
    with pytest.raises(BunnyLoraError, match=r"base_model.*home folder"):
        validate({"base_model": path})
    assert capsys.readouterr().err.count("does not know: write the path in full") == 2
    assert not list(project.glob("~*"))


def test_a_host_pipelines_working_folder_is_the_root(outside, project, monkeypatch):
    host = project / "notebooks" / "host"  # Even inside another project.
    host.mkdir()
    monkeypatch.chdir(host)
    assert paths.project_root() == project
    (host / "config.yaml").write_text("pipeline: {}\nfinetuning: {}\n", encoding="utf-8")
    assert paths.project_root() == host


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_only_a_config_with_a_finetuning_section_makes_a_host(outside, checkout, encoding):
    (outside / "config.yaml").write_text("pipeline:\n  finetuning: {}\n", encoding=encoding)
    assert paths.project_root() == checkout
    (outside / "config.yaml").write_text("finetuning: {}\n", encoding=encoding)
    assert paths.project_root() == outside


def run_folder(folder: Path, beside: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("finetuning: {}\n", encoding="utf-8")
    (folder / "provenance.json").write_text("{}", encoding="utf-8")
    (folder / beside).touch()
    return folder


@pytest.mark.parametrize("beside", ["config.input.yaml", "log.jsonl"])
def test_a_runs_folder_is_no_hosts_root(outside, project, monkeypatch, beside):
    monkeypatch.chdir(run_folder(project / "outputs" / "lora_weights", beside))
    assert paths.project_root() == project
    (project / "params" / "demo.yaml").touch()
    assert paths.choose_params()[0] == project / "params" / "demo.yaml"


@pytest.mark.parametrize("inner", [".", "notebooks", "outputs/run/deep"])
def test_the_root_is_found_from_any_folder_inside_it(outside, project, monkeypatch, inner):
    (project / inner).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(project / inner)
    assert paths.project_root() == project


def test_elsewhere_the_root_is_the_checkout_the_package_comes_from(outside, checkout):
    assert paths.project_root() == checkout


def test_without_a_checkout_the_root_is_the_working_folder(outside, monkeypatch):
    monkeypatch.setattr(paths, "PACKAGE_DIR", outside / "site-packages" / "bunny_lora")
    assert paths.project_root() == outside


def test_relative_paths_start_at_the_root_and_absolute_ones_stay(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project / "notebooks")
    assert paths.resolve("outputs/x") == project / "outputs" / "x"
    assert paths.resolve(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    assert paths.resolve("~/films") == Path.home() / "films"


def test_paths_are_shown_from_the_root_and_nothing_shows_the_home_folder(project, monkeypatch):
    assert paths.relative(project / "outputs" / "x") == "outputs/x"
    monkeypatch.setattr(Path, "home", lambda: project.parent)
    assert paths.relative(project.parent / "films" / "a.png") == "a.png"


# Which configuration runs


@pytest.fixture
def params(project) -> Path:
    for name in ("cpu", "demo", "smoke"):
        (project / "params" / f"{name}.yaml").write_text("finetuning: {}\n", encoding="utf-8")
    return project / "params"


def analysis(run: Path) -> None:
    path = run / "llm_analysis" / "llm_analysis.json"
    path.parent.mkdir(parents=True)
    path.write_text("[]", encoding="utf-8")


def test_without_frames_of_ones_own_the_demo_runs(params):
    path, reason = paths.choose_params()
    assert path == params / "demo.yaml"
    assert "the demo runs" in reason


def test_the_demos_own_film_and_data_never_count_as_the_users(params, project):
    analysis(paths.demo_film_dir())
    prepared = project / "outputs" / "demo" / "training_data" / "instance_images"
    prepared.mkdir(parents=True)
    (prepared / "metadata.jsonl").touch()
    assert not paths.has_user_data()
    assert paths.choose_params()[0] == params / "demo.yaml"


def test_a_stage_4_run_counts_as_the_users_frames(params, project):
    analysis(project / "outputs" / "my_film")
    path, reason = paths.choose_params()
    assert path == params / "cpu.yaml"
    assert "your own frames" in reason


def test_prepared_data_counts_as_the_users_frames(params, project):
    prepared = project / "training_data" / "instance_images"
    prepared.mkdir(parents=True)
    assert paths.choose_params()[0] == params / "demo.yaml"
    (prepared / "metadata.jsonl").touch()
    assert paths.choose_params()[0] == params / "cpu.yaml"


@pytest.mark.parametrize(
    ("named", "name"),
    [
        ({"source": "my_pictures"}, "cpu"),
        ({"source": "auto"}, "demo"),
        ({"source": "bunny-world"}, "demo"),
        ({"data_dir": "my_pictures"}, "cpu"),
        ({"data_dir": "not_there_yet"}, "demo"),
    ],
)
def test_frames_of_ones_own_that_are_named_never_meet_the_demos_settings(params, project, named, name):
    (project / "my_pictures").mkdir()
    (project / "my_pictures" / "a.png").touch()
    assert paths.choose_params(named)[0] == params / f"{name}.yaml"


def test_the_demos_film_that_is_named_never_meets_the_settings_of_ones_own_frames(params, project):
    analysis(project / "outputs" / "my_film")
    assert paths.choose_params()[0] == params / "cpu.yaml"
    assert paths.choose_params({"source": "bunny-world"})[0] == params / "demo.yaml"


def test_the_demos_film_prepared_elsewhere_is_not_ones_own(params, project):
    data_dir = project / "training_data" / "instance_images"
    data_dir.mkdir(parents=True)
    (data_dir / "metadata.jsonl").touch()
    files.write_json(data_dir.parent / "data_summary.json", {"source": "outputs/demo/film"})
    assert not paths.has_user_data()
    assert paths.choose_params({"data_dir": str(data_dir)})[0] == params / "demo.yaml"


def test_a_host_config_in_the_working_folder_wins_over_found_frames(params, project):
    analysis(project / "outputs" / "my_film")
    (project / "config.yaml").write_text("finetuning: {}\n", encoding="utf-8")
    path, reason = paths.choose_params()
    assert path == project / "config.yaml"
    assert "working folder" in reason


def test_the_environment_variable_wins_over_everything(params, project, monkeypatch):
    (project / "config.yaml").write_text("finetuning: {}\n", encoding="utf-8")
    monkeypatch.chdir(project / "notebooks")
    monkeypatch.setenv("BUNNY_LORA_PARAMS", "params/smoke.yaml")
    path, reason = paths.choose_params()
    assert path == params / "smoke.yaml"
    assert "BUNNY_LORA_PARAMS" in reason


def test_without_a_params_folder_the_defaults_run(project):
    path, reason = paths.choose_params()
    assert path is None
    assert "built-in defaults" in reason


# Atomic writes


def test_a_file_appears_whole_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "deep" / "a.json"
    files.write_json(path, {"name": "Häsin"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Häsin"}
    assert "Häsin" in path.read_text(encoding="utf-8")
    assert not leftovers(tmp_path)


def test_a_relative_path_is_written_in_the_working_folder(project):
    files.write_text(Path("note.txt"), "new")
    assert (project / "note.txt").read_text(encoding="utf-8") == "new"


def test_a_file_is_not_seen_under_its_name_before_the_block_ends(tmp_path):
    with files.atomic_path(tmp_path / "a.txt") as part:
        part.write_text("half", encoding="utf-8")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "half"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_block_keeps_the_old_file_and_leaves_nothing(tmp_path, error):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(error), files.atomic_path(path) as part:
        part.write_text("half", encoding="utf-8")
        raise error
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    folder = tmp_path / "final"
    for content in (["a", "gone"], ["a", "new"]):
        with files.atomic_path(folder) as part:
            (part / "unet").mkdir(parents=True)
            for name in content:
                (part / "unet" / name).write_text(name, encoding="utf-8")
    assert names(folder / "unet") == ["a", "new"]
    assert names(tmp_path) == ["final"]


def test_a_failing_block_keeps_the_old_folder_and_leaves_nothing(tmp_path):
    folder = tmp_path / "final"
    with files.atomic_path(folder) as part:
        part.mkdir()
        (part / "old").touch()
    with pytest.raises(ValueError, match="stop"), files.atomic_path(folder) as part:
        part.mkdir()
        (part / "new").touch()
        raise ValueError("stop")
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["final"]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "old").touch()

    def refuse(self, target):
        raise OSError(errno.EIO, "Input/output error", str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(BunnyLoraError, match="Input/output error"), files.atomic_path(folder) as part:
        part.mkdir()
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["final"]


def test_a_full_disk_is_an_error_the_user_can_mend(tmp_path):
    files.write_text(tmp_path / "a.txt", "old")
    with (
        pytest.raises(BunnyLoraError, match=r"a\.txt: No space left on device.*free some space"),
        files.atomic_path(tmp_path / "a.txt"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"
    assert not leftovers(tmp_path)


def test_a_write_that_the_system_cuts_off_keeps_the_old_file(tmp_path):
    files.write_text(tmp_path / "a.txt", "old")
    resource = pytest.importorskip("resource", reason="Windows has no limit for the size of a file")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(BunnyLoraError, match="File too large"):
            files.write_text(tmp_path / "a.txt", "x" * (1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"
    assert not leftovers(tmp_path)


def test_a_folder_is_removed_even_where_the_disk_is_full(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("one", "two"):
        files.write_text(tmp_path / name / "inner" / "a.txt", "a")
    monkeypatch.setattr(os, "mkdir", full)
    files.remove(tmp_path / "one")
    assert names(tmp_path) == ["two"]
    # Killed before it was done, it is removed by the next start.
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
    files.remove(tmp_path / "two")
    [left] = tmp_path.iterdir()
    monkeypatch.undo()
    left.rename(left.with_name(left.name.replace(str(os.getpid()), str(2**22 + 1))))
    files.recover(tmp_path)
    assert not names(tmp_path)


def test_a_folder_that_cannot_be_removed_is_named_and_whole(tmp_path, monkeypatch):
    def refused(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    files.write_text(tmp_path / "checkpoint-1" / "a.txt", "a")
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(BunnyLoraError, match=r"remove .*checkpoint-1: Permission denied\. It is whole"):
        files.remove(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "a.txt").is_file()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(BunnyLoraError, match=r"Could not write .*taken.deep.a\.txt"):
        files.write_text(tmp_path / "taken" / "deep" / "a.txt", "new")


def test_an_error_about_another_file_is_not_taken_for_a_failed_write(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_path(tmp_path / "out" / "data") as part:
        part.mkdir()
        (tmp_path / "frame.png").read_bytes()
    (tmp_path / "frame.png").write_text("no image", encoding="utf-8")
    with pytest.raises(UnidentifiedImageError), files.atomic_path(tmp_path / "out" / "data"):
        Image.open(tmp_path / "frame.png")


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc] . No space left on device"),
        OSError("encoder error -2 when writing image file"),
    ],
)
def test_a_full_disk_is_recognised_whoever_reports_it(tmp_path, error):
    with pytest.raises(BunnyLoraError, match="untouched"), files.atomic_path(tmp_path / "a"):
        raise error
    assert not leftovers(tmp_path)


def refuse_folders(monkeypatch, number):
    """Have fsync answer for folders as some network and shared mounts do."""
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
def test_a_mount_that_flushes_no_folders_is_written_all_the_same(tmp_path, monkeypatch, number):
    refuse_folders(monkeypatch, number)
    files.write_text(tmp_path / "a.txt", "new")
    with files.atomic_path(tmp_path / "run") as part:
        (part / "deep").mkdir(parents=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "deep", "run"]


def test_nothing_is_called_untouched_after_it_was_replaced(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a.txt", "old")
    refuse_folders(monkeypatch, errno.EIO)
    with pytest.raises(BunnyLoraError, match="The new one is there") as caught:
        files.write_text(tmp_path / "a.txt", "new")
    assert "untouched" not in str(caught.value)
    assert (tmp_path / "a.txt").read_text() == "new"


def test_nothing_is_called_untouched_while_it_is_out_of_its_place(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    rename = Path.rename

    def only_away(path, target):
        if target == tmp_path / "run":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", only_away)
        patch.setattr(Path, "replace", only_away)
        with (
            pytest.raises(BunnyLoraError, match="stepped aside") as caught,
            files.atomic_path(tmp_path / "run") as part,
        ):
            part.mkdir()
            (part / "new").touch()
    assert "untouched" not in str(caught.value) and not (tmp_path / "run").exists()
    monkeypatch.setattr(files, "is_alive", lambda *_: False)
    files.recover(tmp_path)
    assert (tmp_path / "run" / "new").is_file() and not leftovers(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from bunny_lora.core import files
folder, replaced = Path(sys.argv[1]), Path.replace
if sys.argv[2] == "between":
    Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
with files.atomic_path(folder) as part:
    part.mkdir()
    (part / "new").touch()
    if sys.argv[2] == "within":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment, left", [("within", "old"), ("between", "new")])
def test_what_a_killed_writer_leaves_is_settled_by_the_next(tmp_path, moment, left):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "final"), moment], check=False)
    assert leftovers(tmp_path)
    files.recover(tmp_path)
    assert names(tmp_path / "final") == [left]
    assert names(tmp_path) == ["final"]


def test_what_a_living_writer_is_writing_is_left_alone(tmp_path):
    with files.atomic_path(tmp_path / "a.txt") as part:
        part.write_text("new", encoding="utf-8")
        files.recover(tmp_path)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new"


def test_json_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "half.json").write_text('{"a": ', encoding="utf-8")
    for name in ("half.json", "absent.json"):
        with pytest.raises(BunnyLoraError, match=name):
            files.read_json(tmp_path / name)


# Where a run came from


def test_a_digest_changes_with_content_name_and_order(tmp_path):
    for name, content in [("a", "1"), ("b", "2"), ("c", "1")]:
        (tmp_path / name).write_text(content, encoding="utf-8")
    a, b, c = (tmp_path / name for name in "abc")
    assert len({files.sha256(a), files.sha256(c), files.sha256(a, b), files.sha256(b, a)}) == 4
    before = files.sha256(a, b)
    b.write_text("3", encoding="utf-8")
    assert files.sha256(a, b) != before


def test_provenance_names_versions_and_no_place():
    made_by = provenance.provenance()
    assert made_by["bunny_lora"] == bunny_lora.__version__
    assert made_by["libraries"]["torch"] == torch.__version__
    text = json.dumps(made_by)
    assert "/" not in text
    assert "\\" not in text
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A git repository with the package in a subfolder, not yet committed."""
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)
    package = tmp_path / "repository" / "bunny_lora"
    package.mkdir(parents=True)
    (package / "errors.py").touch()
    git(package, "init", "--quiet")
    git(package, "commit", "--quiet", "--allow-empty", "--message", "A commit of somebody else")
    monkeypatch.setattr(provenance, "PACKAGE_DIR", package)
    return package


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@localhost", "-c", "core.hooksPath="]
    command = ["git", *identity, *arguments]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_provenance_names_the_commit_and_whether_anything_was_changed(repository):
    git(repository, "add", "errors.py")
    git(repository, "commit", "--quiet", "--message", "Add")
    made_by = provenance.provenance()
    assert (made_by["commit"], made_by["dirty"]) == (git(repository, "rev-parse", "HEAD"), False)
    (repository / "errors.py").write_text("changed", encoding="utf-8")
    assert provenance.provenance()["dirty"] is True


def test_provenance_does_not_take_anothers_commit_for_its_own(repository):
    made_by = provenance.provenance()
    assert (made_by["commit"], made_by["dirty"]) == (None, None)
