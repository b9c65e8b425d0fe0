"""Keeping freed memory: it stays in the heap, off where the environment says so."""

import os
import subprocess
import sys

import pytest

from bunny_lora.model.fast import allocator

PROGRAM = """
import ctypes, torch
from bunny_lora.model.fast.allocator import keep_freed_memory

def heap_end():
    sbrk = ctypes.CDLL(None).sbrk
    sbrk.restype = ctypes.c_void_p
    return sbrk(0)

print(keep_freed_memory())
begin = heap_end()
blocks = [torch.ones(2**20 + 1000 * i) for i in range(8)]
del blocks
print(heap_end() - begin)
"""
BYTES = 8 * 4 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_what_is_freed_is_kept_for_the_next() -> None:
    """Read off the heap, not off page faults: how many these are hangs on the system."""
    kept = {}
    for switch in ("0", "1"):
        environment = os.environ | {allocator.SWITCH: switch}
        said = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True
        ).stdout.split()
        if switch == "1" and said[0] == "False":
            pytest.skip("another C library")
        assert said[0] == str(switch == "1")
        kept[switch] = int(said[1])
    assert kept["1"] >= BYTES > kept["0"]


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_a_users_own_settings_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not allocator.keep_freed_memory()
