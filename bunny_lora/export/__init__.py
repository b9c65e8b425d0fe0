"""A LoRA for other programs, read back by their loaders before it counts."""

from bunny_lora.export.writers import USUAL, export, upload

__all__ = ["USUAL", "export", "upload"]
