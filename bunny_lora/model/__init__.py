"""Stable Diffusion 1.x and its adapters: loaded, attached, saved, converted."""
