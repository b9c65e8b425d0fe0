"""The tokenizer of Bunny World: CLIP's own kind, with every word of its captions as one token.

Byte-pair merges are learned from the closed vocabulary until each of its words is whole. Any other
word falls apart into the pieces that remain, down to single bytes, so nothing is ever unknown.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from bunny_lora.runs import atomic_path
from bunny_lora.world.captions import MAX_WORDS, vocabulary

MAX_TOKENS = MAX_WORDS + 2
Pair = tuple[str, str]


def build_tokenizer() -> CLIPTokenizer:
    """Return the tokenizer; ids are the same on every machine, the end token has the last one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(vocabulary())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [first + second for first, second in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_TOKENS)


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer so that `CLIPTokenizer.from_pretrained(folder)` loads it."""
    with atomic_path(folder) as part:
        build_tokenizer().save_pretrained(part)


def learn_merges(words: list[str]) -> list[Pair]:
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
