"""Teach a small Stable Diffusion new cartoon characters on an ordinary CPU."""

import os

__version__ = "0.1.0"

# Read once, when torch is imported, so it is set here or not at all; what the user has set stands.
# A thread that waits for another spins by default, and takes the core from the one it waits for as
# soon as anything else runs on this computer: steps became 10 to 50 times slower (see LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
