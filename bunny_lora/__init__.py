"""Teach a small Stable Diffusion new cartoon characters on an ordinary CPU."""

__version__ = "0.1.0"
