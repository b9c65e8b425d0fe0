"""What of a prompt does not mean what its writer may think: ends cut off, syntax of others."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable
from typing import Any

from bunny_lora.core.values import shown

N_NAMED = 3

# What A1111, ComfyUI, sd-scripts and their extensions read in a prompt, and what does it here.
_SYNTAX = {
    "A weight such as (word:1.2), ((word)) or [word]": (
        r"\([^()]+:\s*[\d.]+\s*\)|\(\([^()]+\)\)|\[[^\[\]]+\]",
        "no word weighs more than another",
    ),
    "<lora:…>": (r"<(?:lora|lyco|hypernet):[^<>]*>", "--lora-weights FILE=WEIGHT loads one"),
    "An option such as --n or --w 512": (
        r"(?:^|\s)--[a-z]{1,2}\s+\S",
        "--negative-prompt, --width, --height, --seed, --steps and --guidance hold for all prompts",
    ),
    "BREAK": (r"\bBREAK\b", "a prompt is read in one piece"),
    "A choice such as {a|b} or __name__": (
        r"\{[^{}]*\|[^{}]*\}|\b__[\w/-]+__\b",
        "write a prompt for each",
    ),
}


def doubts(prompts: Iterable[str], tokenizer: Any) -> list[str]:
    """Return a line for each kind of doubt about some prompts.

    Args:
        prompts: as they are drawn, negative ones too.
        tokenizer: of the model that draws them; any with `model_max_length`, as transformers' are.
    """
    prompts = list(dict.fromkeys(prompts))
    lines = []
    for kind, (pattern, advice) in _SYNTAX.items():
        if found := [match[0].strip() for prompt in prompts if (match := re.search(pattern, prompt))]:
            where = f"in {len(found)} of {len(prompts)} prompts, {shown(found[0])} for one"
            lines.append(f"{kind} is plain words here ({where}): {advice}.")
    return [*lines, *_cut(prompts, tokenizer)]


def _cut(prompts: list[str], tokenizer: Any) -> list[str]:
    """Return the line on prompts that the text encoder does not read to their end."""
    lost = {prompt: words for prompt in prompts if (words := _lost_words(prompt, tokenizer))}
    if not lost:
        return []
    named = [f"{len(words)} of {shown(prompt)}" for prompt, words in list(lost.items())[:N_NAMED]]
    named += [f"and so on in {len(lost) - N_NAMED} more"] if len(lost) > N_NAMED else []
    first = next(iter(lost.values()))
    return [
        f"The text encoder reads {tokenizer.model_max_length - 2} tokens; last words that are lost:"
        f" {', '.join(named)}, from {shown(' '.join(first))} on."
    ]


def _lost_words(prompt: str, tokenizer: Any) -> list[str]:
    words = prompt.split()

    def n_tokens(n_words: int) -> int:
        text = " ".join(words[:n_words])
        return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])

    kept = bisect.bisect_right(range(len(words) + 1), tokenizer.model_max_length, key=n_tokens) - 1
    return words[kept:]
