"""CLIP tokenizers: the published one, and our own for models that have no published vocabulary.

Byte-pair merges are learned from a list of words until each is whole. Any other word falls apart into
the pieces that remain, down to single bytes, so nothing is ever unknown.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

MERGES = Path(__file__).parent / "clip" / "merges.txt.gz"
"""CLIP's own, which Stable Diffusion 1.x and stable-diffusion.cpp use; see the LICENSE beside it."""

Pair = tuple[str, str]


def build_clip_tokenizer() -> CLIPTokenizer:
    """Return the tokenizer of CLIP and of Stable Diffusion 1.x, 49,408 tokens, 77 at a time."""
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    merges = [(first, second) for first, second in (line.split(" ") for line in lines)]
    return _tokenizer(merges, 77)


def build_tokenizer(words: Iterable[str], model_max_length: int) -> CLIPTokenizer:
    """Return a tokenizer for ASCII `words`, the same everywhere; the end token has the last id."""
    return _tokenizer(learn_merges(words), model_max_length)


def _tokenizer(merges: list[Pair], model_max_length: int) -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [first + second for first, second in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=model_max_length)


def learn_merges(words: Iterable[str]) -> list[Pair]:
    """Return the byte-pair merges, in order, after which every one of the ASCII `words` is whole.

    The most frequent pair goes first, ties in alphabetical order: unlike the trainer of
    `tokenizers`, whose ties fall as its hash tables happen to, this is the same every time.
    """
    splits = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while counts := Counter(pair for split in splits for pair in pairwise(split)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        splits = [_merged(split, best) for split in splits]
    return merges


def _merged(split: list[str], pair: Pair) -> list[str]:
    """Return a word's pieces with every occurrence of `pair` joined, from left to right."""
    joined: list[str] = []
    for piece in split:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
