"""Teach a small Stable Diffusion new cartoon characters on an ordinary CPU."""

import os

__version__ = "0.1.0"

# Importing diffusers makes transformers announce, twice, that torchvision is not there: it is not
# needed, and has no CPU build. Only a setting made before that import keeps it quiet.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
