"""What of prepared data a run will learn badly, told before the hours are spent.

Each weak spot names who and how many, an example, and the key of the configuration that answers it.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from bunny_lora.config import Config
from bunny_lora.data.buckets import LATENT_PX, bucket_of
from bunny_lora.data.captions import DESCRIPTION, caption_parts
from bunny_lora.data.frames import Sample

SMALL_FACE = 8.0  # latent pixels a side: an eye or a mark is one of them
UNEQUAL = 1.5  # the commonest over the rarest
SHOWN = 60  # letters of a caption


@dataclass(frozen=True)
class WeakSpot:
    """`what` in a word or two, `who` and how many, and the `answer`: a key and what it does.

    `keys`, dotted, are off in a configuration that does not answer it.
    """

    what: str
    who: str
    answer: str
    keys: tuple[str, ...] = ()

    def is_answered(self, config: Config) -> bool:
        """Whether all that answers it is set already."""
        return bool(self.keys) and all(attrgetter(key)(config) for key in self.keys)


@dataclass(frozen=True)
class Facts:
    """What the weak spots are found in.

    Attributes:
        samples: the pictures, captions as they are trained on, with their tokens.
        config: the resolution and the crop are read, and whether an answer is set already.
        tokenizer: of the text encoder.
        shots: which shot each picture is of.
        groups: which of them are nearly the same picture.
    """

    samples: Sequence[Sample]
    config: Config
    tokenizer: Any
    shots: Sequence[int]
    groups: Sequence[int]

    @property
    def names(self) -> list[str]:
        """Everybody who is named, in alphabetical order."""
        return sorted({name for sample in self.samples for name in sample.characters})

    def of(self, name: str) -> list[int]:
        """Return which pictures somebody is named in."""
        return [i for i, sample in enumerate(self.samples) if name in sample.characters]


def find_weak_spots(facts: Facts) -> list[WeakSpot]:
    """Return what will be learnt badly, the gravest first."""
    checks = (
        _never_alone, _one_shot, _unequal, _cut_off, _small_faces, _strangers, _faceless, _alike,
        _cut_captions, _pieces,
    )  # fmt: skip
    return [spot for check in checks for spot in check(facts)]


def _never_alone(facts: Facts) -> Iterator[WeakSpot]:
    for name in facts.names:
        pictures = [facts.samples[index] for index in facts.of(name)]
        if any(len(sample.characters) == 1 for sample in pictures):
            continue
        always = set.intersection(*(set(sample.characters) for sample in pictures)) - {name}
        others = " and ".join(sorted(always)) or "somebody else"
        who = f"{name} is in {_count(len(pictures), 'picture')}, in none without {others}"
        yield WeakSpot("never alone", who, f"source: pictures of {name} alone, too")


def _one_shot(facts: Facts) -> Iterator[WeakSpot]:
    for name in facts.names:
        places = facts.of(name)
        if len({facts.shots[index] for index in places}) == 1:
            distinct = len({facts.groups[index] for index in places})
            differ = f", {distinct} of which differ" if distinct < len(places) else ""
            who = f"{name}: all {_count(len(places), 'picture')} are of one shot{differ}"
            yield WeakSpot("one shot", who, f"source: pictures of {name} elsewhere, too")


def _unequal(facts: Facts) -> Iterator[WeakSpot]:
    counts = {name: len(facts.of(name)) for name in facts.names}
    if counts and max(counts.values()) > UNEQUAL * min(counts.values()):
        listed = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        who = "pictures: " + ", ".join(f"{name} {n}" for name, n in listed)
        answer = "balance_characters: true shows the rare ones more often"
        yield WeakSpot("unequal", who, answer, ("balance_characters",))


def _cut_off(facts: Facts) -> Iterator[WeakSpot]:
    """A middle square shows nothing of what is beside it, and captions go on naming it."""
    sized = [sample for sample in facts.samples if len(sample.size) == 2]
    wide = [sample for sample in sized if min(sample.size) < max(sample.size)]
    if not facts.config.center_crop or facts.config.aspect_buckets or not wide:
        return
    gone = statistics.mean(1 - min(sample.size) / max(sample.size) for sample in wide)
    lost: Counter[str] = Counter()
    for sample in wide:
        n_out = sum(not _in_middle(box, sample.size) for box in sample.faces)
        all_out = n_out == len(sample.faces) > 0
        lost.update(sample.characters if all_out else ["somebody"] * bool(n_out))
    faces = "; no face is" if any(sample.faces for sample in wide) else ""
    if lost:
        faces = "; faces too: " + ", ".join(f"{name} in {n}" for name, n in sorted(lost.items()))
    who = f"{gone:.0%} of {_count(len(wide), 'picture')} lies outside the middle square{faces}"
    answer = "aspect_buckets: true shows it whole; center_crop: false, squares from all over it"
    yield WeakSpot("cut off", who, answer)


def _in_middle(box: Sequence[float], size: Sequence[int]) -> bool:
    margins = [(length - min(size)) / 2 for length in size]
    middles = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    places = zip(middles, margins, size, strict=True)
    return all(margin <= middle <= length - margin for middle, margin, length in places)


def _small_faces(facts: Facts) -> Iterator[WeakSpot]:
    sides = [
        max(x2 - x1, y2 - y1) * _scale(sample, facts.config) / LATENT_PX
        for sample in facts.samples
        if sample.size
        for x1, y1, x2, y2 in sample.faces
    ]
    small = [side for side in sides if side < SMALL_FACE]
    if small:
        who = (
            f"{len(small)} of {len(sides)} are less than {SMALL_FACE:.0f} latent pixels wide at"
            f" {facts.config.resolution} px, the median {statistics.median(sides):.1f}"
        )
        answer = "zoom_on_faces: true shows them from near as well"
        yield WeakSpot("small faces", who, answer, ("zoom_on_faces",))


def _scale(sample: Sample, config: Config) -> float:
    """Return by how much a picture is made larger to be trained on."""
    if not config.aspect_buckets:
        return config.resolution / min(sample.size)
    bucket = bucket_of(sample.size, config.resolution)
    return max(new / old for new, old in zip(bucket, sample.size, strict=True))


def _strangers(facts: Facts) -> Iterator[WeakSpot]:
    """More faces than names: a caption under a hero's name that describes a passer-by as well."""
    named = [sample for sample in facts.samples if sample.characters]
    more = [sample for sample in named if len(sample.faces) > len(sample.characters)]
    described = [sample for sample in more if _n_described(sample) > len(sample.characters)]
    if more:
        who = f"{_count(len(more), 'picture')} with more faces than names"
        if described:
            first = described[0]
            who += (
                f", {_count(len(described), 'caption')} with somebody else's looks under the name:"
                f" {first.frame_id} '{_cut(first.caption)}'"
            )
        answer = "face_encoder: bunny-world, or a CLIP model, tells faces apart for zoom_on_faces: true"
        yield WeakSpot("passers-by", who, answer, ("face_encoder", "zoom_on_faces"))


def _n_described(sample: Sample) -> int:
    """Return how many parts of a caption begin as a description does: "a cream kitten sitting"."""
    return sum(bool(DESCRIPTION.match(part)) for part in caption_parts(sample.caption)[1:])


def _faceless(facts: Facts) -> Iterator[WeakSpot]:
    """Who has fewer faces than names is never certain, and never seen from near."""
    if not any(sample.faces for sample in facts.samples):
        return
    for name in facts.names:
        pictures = [facts.samples[index] for index in facts.of(name)]
        if not any(sample.faces and len(sample.faces) >= len(sample.characters) for sample in pictures):
            who = f"{name}: no picture has a face for everybody whom it names"
            answer = "zoom_on_faces cannot show it from near; source: near pictures of it"
            yield WeakSpot("no face", who, answer)


def _alike(facts: Facts) -> Iterator[WeakSpot]:
    n_alike = len(facts.groups) - len(set(facts.groups))
    if n_alike:
        commonest = Counter(facts.groups).most_common(1)[0]
        who = (
            f"{_count(n_alike, 'picture')} of {len(facts.groups)} nearly the same as the one before,"
            f" {commonest[1]} from {facts.samples[commonest[0]].frame_id} on"
        )
        answer = "thin_duplicates: true has them share the weight of one"
        yield WeakSpot("near-duplicates", who, answer, ("thin_duplicates",))


def _cut_captions(facts: Facts) -> Iterator[WeakSpot]:
    limit = facts.tokenizer.model_max_length
    long = [sample for sample in facts.samples if (sample.tokens or 0) > limit]
    if long:
        worst = max(long, key=lambda sample: sample.tokens or 0)
        who = (
            f"{len(long)} of {len(facts.samples)} have more than the {limit} tokens that are read,"
            f" {worst.frame_id} has {worst.tokens}"
        )
        answer = "training.caption_tag_dropout: 0.3 leaves parts out, so that the last are read too"
        yield WeakSpot("cut captions", who, answer, ("training.caption_tag_dropout",))


def _pieces(facts: Facts) -> Iterator[WeakSpot]:
    """A name of one piece is a word that the text encoder knows, and it means something already."""
    names = facts.names
    if not names:
        return
    pieces = {name: _read(name, facts.tokenizer) for name in names}
    who = ", ".join("|".join(pieces[name]) for name in names)
    if whole := [name for name in names if len(pieces[name]) == 1]:
        who += f"; of one piece, so maybe words with a meaning: {', '.join(whole)}"
    answer = "lora.train_text_encoder: true lets the text encoder learn the names"
    yield WeakSpot("names in pieces", who, answer, ("lora.train_text_encoder",))


def _read(name: str, tokenizer: Any) -> list[str]:
    return [piece.removesuffix("</w>") for piece in tokenizer.tokenize(name)]


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
