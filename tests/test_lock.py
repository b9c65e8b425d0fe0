"""One list of versions, for pip and for conda, that holds what the project asks for and no more."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCK_LINES = [
    line
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
LOCK = {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in LOCK_LINES}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ASKED_FOR = [
    Requirement(text)
    for text in (
        *PYPROJECT["project"]["dependencies"],
        *PYPROJECT["dependency-groups"]["dev"],
        *PYPROJECT["build-system"]["requires"],
    )
]
CUDA = re.compile(r"nvidia|cuda|triton")


def test_every_line_of_the_lock_is_a_plain_version():
    assert len(LOCK) == len(LOCK_LINES)
    assert sorted(LOCK) == list(LOCK)
    odd = [line for line in LOCK_LINES if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert not odd  # No hashes, addresses, local files or builds such as +cpu.


def test_the_lock_has_no_cuda_package_no_torchvision_and_not_the_project_itself():
    assert not [name for name in LOCK if CUDA.search(name)]
    assert not {"torchvision", "torchaudio", "bunny-lora", "pip"} & set(LOCK)


@pytest.mark.parametrize("asked", ASKED_FOR, ids=str)
def test_what_the_project_asks_for_is_locked_at_a_version_that_satisfies_it(asked):
    assert asked.specifier.contains(LOCK[canonicalize_name(asked.name)])


@pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info[:2] != (3, 11), reason="the lock is made elsewhere"
)
def test_the_lock_holds_what_is_needed_and_nothing_else():
    needed, queue = set(), list(ASKED_FOR)
    while queue:
        asked = queue.pop()
        key = (canonicalize_name(asked.name), frozenset(asked.extras))
        if key in needed or CUDA.search(key[0]):
            continue
        needed.add(key)
        requirements = map(Requirement, importlib.metadata.requires(asked.name) or [])
        queue += [item for item in requirements if _applies(item, asked.extras)]
    assert {name for name, _ in needed} - {"pip"} == set(LOCK)


def _applies(asked: Requirement, extras: set[str]) -> bool:
    if asked.marker is None:
        return True
    return any(asked.marker.evaluate({"extra": extra}) for extra in ["", *extras])


def test_conda_installs_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, with_pip = environment["dependencies"]
    assert with_pip == {"pip": ["-r requirements.lock", "-e ."]}
    assert conda[1:] == ["pip"]
    python = conda[0].removeprefix("python=")
    assert SpecifierSet(PYPROJECT["project"]["requires-python"]).contains(python)


def test_what_a_conda_user_expects_is_in_the_lock():
    notebooks = {"jupyterlab", "papermill", "ipywidgets", "matplotlib", "nbval"}
    assert notebooks | {"torch", "diffusers", "transformers", "peft"} <= set(LOCK)
