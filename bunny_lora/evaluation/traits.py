"""The two axes of a run, trait by trait: is it the character, and is it what was asked for?

Only where traits can be read: Bunny World ships a reader of its own, and `evaluation.traits` says what
is right of each character. Scores stand between a floor, what the base model draws for the same
prompts, and a ceiling, renders of the character as the autoencoder gives them back: 0 and 1. Identity
alone is no praise, since a model that draws the character over all else has it too: both are told.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bunny_lora.core.eval_result import Interval
from bunny_lora.core.seeding import generator
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation.metrics import CONFIDENCE, N_RESAMPLES

ASKED = ("place", "light", "pose")
"""Questions that a prompt answers by a word."""
TELLING = ("fur", "outfit", "mark")
"""Traits by which one hero is taken for another."""

Reading = Mapping[str, torch.Tensor]
"""Of each question the probabilities of its answers, float32 [N, answers]."""


@dataclass(frozen=True)
class Traits:
    """What is right of each character, and what the reader can answer.

    Attributes:
        questions: the answers to every question, in the reader's order.
        right: for each character the right answer to each trait.
        counted: the questions that the reader answers well enough to count.
    """

    questions: Mapping[str, Sequence[str]]
    right: Mapping[str, Mapping[str, str]]
    counted: Sequence[str]

    def __post_init__(self) -> None:
        for character, traits in self.right.items():
            for trait, answer in traits.items():
                where = f"evaluation.traits.{character}"
                _known(trait, list(self.questions), f"{where} names {trait!r}, which no reader reads")
                known = list(self.questions[trait])
                _known(answer, known, f"{where}.{trait}: {answer!r} is no answer")

    def asked(self) -> dict[str, Sequence[str]]:
        """Return the questions about what a prompt asks for that count."""
        return {question: self.questions[question] for question in ASKED if question in self.counted}

    def of(self, character: str) -> dict[str, str]:
        """Return the right answers that count for a character."""
        right = self.right.get(character, {})
        return {trait: right[trait] for trait in self.counted if trait in right}

    def probabilities(self, read: Reading, trait: str, answer: str) -> torch.Tensor:
        """Return how sure the reader is of an answer, [N]."""
        return read[trait][:, list(self.questions[trait]).index(answer)]

    def is_read(self, read: Reading, trait: str, answer: str) -> torch.Tensor:
        """Return whether the reader's likeliest answer is this one, bool [N]."""
        return read[trait].argmax(1) == list(self.questions[trait]).index(answer)

    def scores(self, read: Reading, character: str) -> dict[str, torch.Tensor]:
        """Return the probability of the right answer to each trait that counts, [N] each."""
        right = self.of(character)
        return {trait: self.probabilities(read, trait, answer) for trait, answer in right.items()}

    def answers(self, read: Reading) -> list[dict[str, str]]:
        """Return for each image the likeliest answer to every question that counts."""
        likeliest = {question: read[question].argmax(1).tolist() for question in self.counted}
        return [
            {question: list(self.questions[question])[row[i]] for question, row in likeliest.items()}
            for i in range(len(next(iter(read.values()))))
        ]

    def others(self, character: str, trait: str) -> set[str]:
        """Return the answers that are right of other characters and wrong of this one."""
        theirs = {traits[trait] for traits in self.right.values() if trait in traits}
        return theirs - {self.right.get(character, {}).get(trait, ""), "none"}

    def is_another(self, read: Reading, character: str) -> torch.Tensor:
        """Return whether each image has a telling trait of another hero's, bool [N]."""
        found = torch.zeros(len(read[TELLING[0]]), dtype=torch.bool)
        for trait in set(TELLING) & set(self.counted):
            for answer in self.others(character, trait):
                found |= self.is_read(read, trait, answer)
        return found

    def shows_a_hero(self, read: Reading, trait: str = "fur") -> torch.Tensor:
        """Return whether each image has the fur of one of the heroes, bool [N]."""
        answers = {traits[trait] for traits in self.right.values() if trait in traits}
        hits = [self.is_read(read, trait, answer) for answer in sorted(answers)]
        return torch.stack(hits).any(0) if hits else torch.zeros(len(read[trait]), dtype=torch.bool)


def _known(word: str, known: Sequence[str], what: str) -> None:
    if word not in known:
        near = difflib.get_close_matches(word, known, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise BunnyLoraError(f"{what}: there are {', '.join(known)}.{hint}")


def asked_for(prompt: str, questions: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the answers that a prompt gives by naming them: {"place": "beach", "pose": "sitting"}."""
    words = set(re.findall(r"[a-z]+", prompt.lower()))
    found = {}
    for question in ASKED:
        named = [answer for answer in questions.get(question, ()) if answer in words]
        if len(named) == 1:
            found[question] = named[0]
    return found


def as_asked(
    read: Reading, prompts: Sequence[str], questions: Mapping[str, Sequence[str]]
) -> torch.Tensor:
    """Return the share of what each prompt asks that its image shows, [N]; NaN: it asks nothing."""
    rows = []
    for row, prompt in enumerate(prompts):
        asked = asked_for(prompt, questions)
        hits = [
            float(int(read[question][row].argmax()) == list(questions[question]).index(answer))
            for question, answer in asked.items()
        ]
        rows.append(sum(hits) / len(hits) if hits else float("nan"))
    return torch.tensor(rows)


def normalised(values: torch.Tensor, floor: float, ceiling: float) -> torch.Tensor:
    """Return values as places between floor, 0, and ceiling, 1; NaN where the two are the same."""
    span = ceiling - floor
    return (values - floor) / span if abs(span) > 1e-6 else torch.full_like(values, float("nan"))


def clustered_interval(values: torch.Tensor, clusters: Sequence[object], *, seed: int = 0) -> Interval:
    """Return the mean of scores [N], and an interval that takes images of one prompt for alike.

    Whole clusters are drawn with replacement (Efron's bootstrap of clusters): images of one prompt are
    not independent, and an interval of single images would be too narrow. NaNs are left out.
    """
    kept = values.isfinite()
    values = values[kept].double()
    names = [cluster for cluster, keep in zip(clusters, kept.tolist(), strict=True) if keep]
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    place = torch.tensor([index[name] for name in names])
    sums = torch.zeros(len(index), dtype=torch.double).index_add_(0, place, values)
    counts = torch.zeros(len(index), dtype=torch.double).index_add_(0, place, torch.ones_like(values))
    if len(index) < 3:
        return Interval(mean=float(values.mean()), low=None, high=None, n=len(values))
    rng = generator(seed, "clusters")
    drawn = torch.randint(len(index), (N_RESAMPLES, len(index)), generator=rng)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail]).double()).tolist()
    return Interval(mean=float(values.mean()), low=low, high=high, n=len(values))


def confusion(
    read: Reading, characters: Sequence[str], labels: Sequence[str], traits: Traits, trait: str = "fur"
) -> np.ndarray:
    """Return, for each character, the shares of its images that have each character's fur, or nobody's.

    Args:
        read: of N images.
        characters: K of them, the rows.
        labels: of each image the character that it should show, or another word for nobody.
        traits: what is right.
        trait: what they are told by.

    Returns:
        [K + 1, K + 1], the last row images of nobody, the last column nobody's fur; NaN without images.
    """
    answers = [traits.right.get(name, {}).get(trait, "") for name in characters]
    seen = read[trait].argmax(1).tolist()
    columns = [list(traits.questions[trait])[answer] for answer in seen]
    table = np.full((len(characters) + 1, len(characters) + 1), np.nan)
    for row, name in enumerate([*characters, None]):
        mine = [
            fur
            for fur, label in zip(columns, labels, strict=True)
            if (label == name if name else label not in characters)
        ]
        if mine:
            shares = [mine.count(answer) / len(mine) for answer in answers]
            table[row] = [*shares, 1 - sum(shares)]
    return table
