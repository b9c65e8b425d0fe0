"""Keeping freed memory: fewer pages asked of the system, off where the environment says so."""

import os
import subprocess
import sys

import pytest

from bunny_lora.model.fast import allocator

PROGRAM = """
import resource, torch
from bunny_lora.model.fast.allocator import keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**20 + 1000 * i) for i in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(keep_freed_memory())
print(sum([pages() for _ in range(6)][3:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_what_is_freed_is_used_again() -> None:
    faults = {}
    for switch in ("0", "1"):
        environment = os.environ | {allocator.SWITCH: switch}
        said = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True
        ).stdout.split()
        if switch == "1" and said[0] == "False":
            pytest.skip("another C library")
        assert said[0] == str(switch == "1")
        faults[switch] = int(said[1])
    assert faults["1"] <= faults["0"]  # how much fewer hangs on the system: huge pages need few anyway


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_a_users_own_settings_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not allocator.keep_freed_memory()
