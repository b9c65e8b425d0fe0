"""Every random number is a function of (seed, purpose, position).

Nothing here touches global state, so a step, an image or a shuffle can be drawn again, alone, in any
order: that is what makes resuming equal to never having stopped, and image i independent of its batch.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """Return a 63-bit seed for one purpose at one position, the same on every machine.

    `hash()` is salted per process, and adding numbers to a seed makes neighbouring runs share their
    noise; a cryptographic digest does neither.
    """
    key = "/".join([str(seed), purpose, *map(str, position)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Return a CPU `torch.Generator` for one purpose at one position.

    Always on the CPU, also when the tensors end on a GPU, so that the numbers do not depend on the
    device.
    """
    import torch

    return torch.Generator("cpu").manual_seed(derive_seed(seed, purpose, *position))
