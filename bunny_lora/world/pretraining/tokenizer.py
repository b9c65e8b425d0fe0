"""The tokenizer of Bunny World: CLIP's own kind, with every word of its captions as one token."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPTokenizer

from bunny_lora.core.files import atomic_path
from bunny_lora.model import bpe
from bunny_lora.world.captions import MAX_WORDS, vocabulary

MAX_TOKENS = MAX_WORDS + 2


def build_tokenizer() -> CLIPTokenizer:
    """Return the tokenizer; ids are the same on every machine, the end token has the last one."""
    return bpe.build_tokenizer(vocabulary(), MAX_TOKENS)


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer so that `CLIPTokenizer.from_pretrained(folder)` loads it."""
    with atomic_path(folder) as part:
        build_tokenizer().save_pretrained(part)
