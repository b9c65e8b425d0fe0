"""What an entry says: tidy text, names as words of their own, and whether a caption can be trained on.

Text only: whether the picture that belongs to it is there and good is for the modules above.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bunny_lora.errors import LeftOutError

# Shorter answers are left-overs of a failed call ("N/A", "a frame") and say nothing of the picture.
MIN_CAPTION_WORDS = 3
MIN_CAPTION_CHARACTERS = 10

FAILED_PREFIX = "Analysis failed"
JSON_PREFIXES = ("{", "```")

# Plain ones but in "1,000", full-width and ideographic ones; whatever follows the last is no part.
WIDE = "\N{FULLWIDTH COMMA}\N{IDEOGRAPHIC COMMA}"
COMMAS = re.compile(rf"\s*(?:(?<!\d),|,(?!\d)|[{WIDE}])[\s,{WIDE}]*(?=[^\s,{WIDE}])")
APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
JOINING = "and|&|with"

# What analyses write where they know nobody, and how they write several.
NOBODY = re.compile(
    r"[\s\-?.,_/*]*|nobody|no[ -]?one|none( .*)?|null|nil|n/?a"
    r"|(unknown|unidentified|unnamed|unrecogni[sz]ed|anonymous)( .*)?"
    r"|no (\w+ )?(characters?|persons?|people|names?|faces?)( .*)?"
    r"|not (identified|recogni[sz]ed|visible|applicable|available|known|sure)"
)
SEVERAL = re.compile(r"\s*[,;&]\s*(?:and\s+)?|\s+and\s+")
# Of scripts that part their words: "rex" is in a Japanese sentence, but not in "trex".
LETTER = r"[^\W\u0e00-\u0eff\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
# Words for a picture taken from further away than a crop around a face is.
FAR = re.compile(
    r"(?<!\w)(?:(?:extreme|very|ultra)[- ])?(?:(?:wide|long|full|distant|establishing)[- ]"
    r"(?:angle[- ])?(?:shot|view)|from (?:far away|afar|a distance))(?!\w)",
    re.IGNORECASE,
)
MEDIUM, PORTRAIT = "medium shot", "portrait"  # a head and most of a cartoon body; not much but a head
DESCRIPTION = re.compile(rf"[\s,{WIDE}]*an?\s", re.IGNORECASE)  # "a blue bear in a red scarf waving"
SEVERAL_SHOWN = re.compile(r"(?<!\w)(animated|cartoon) characters(?!\w)", re.IGNORECASE)
# What leads from one who is described to another, at the end of what is left without the other.
LEADING = re.compile(
    r"\s+(?:while|as|when|and|with|to|at|by|of|for|from|after|towards?|near|behind|beside|over|under)$"
)
MIN_LOOKS_WORDS = 3

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Entry:
    """What both kinds of source come down to, before any picture is looked for."""

    frame_id: str
    recorded: str
    caption: str = ""
    reason: str = ""
    characters: tuple[str, ...] = ()
    confidence: float | None = None
    rescued: bool = False
    faces: tuple[Box, ...] = ()
    prompted: bool = False
    repeats: int = 1


def clean(value: Any) -> Any:
    """Return text on one line, without control characters or halves of characters; else as it is.

    In Unicode's composed form: macOS takes letters apart, and a name would not be found any more.
    """
    if not isinstance(value, str):
        return value
    value = unicodedata.normalize("NFC", value)
    kept = (c if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs") else "" for c in value)
    return " ".join("".join(kept).split())


def find_name(text: str, name: str) -> re.Match[str] | None:
    """Return where `text` first has `name` as a word of its own ("rex" is not in "trex")."""
    return re.search(rf"(?<!{LETTER}){re.escape(name)}(?!{LETTER})", text, re.IGNORECASE)


def names_in(text: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return which names a text has as words of their own."""
    return tuple(name for name in names if find_name(text, name))


def caption_parts(caption: str) -> list[str]:
    """Return what stands between commas, each part but the first with the comma before it.

    With or without a space, full-width commas too; the comma of "1,000" is none. Joined, they are the
    caption.
    """
    starts = [match.start() for match in COMMAS.finditer(caption)]
    return [caption[a:b] for a, b in itertools.pairwise((0, *starts, len(caption)))]


def without_names(caption: str, names: Collection[str]) -> str:
    """Return a caption with names taken out, and what joined them: "a and b, on a beach", "on a beach".

    A part between commas that was nothing but names goes with them.
    """
    if not names:
        return caption
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    name = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)(?:['{APOSTROPHE}]s(?!\w))?"
    joined = re.compile(rf"\s+(?:{JOINING})\s+{name}|{name}\s+(?:{JOINING})\s+|{name}", re.IGNORECASE)
    parts = []
    for part in caption_parts(caption):
        if joined.search(part):
            part = " ".join(joined.sub(" ", part).split())
        if part.strip(f",{WIDE}"):
            parts.append(part)
    return "".join(parts).lstrip(f",{WIDE} ")


def name_only(caption: str, seen: Collection[str], unseen: Collection[str], n_faces: int = 0) -> str:
    """Return a caption for a part of its picture: without those who are not seen, and their looks.

    A part that names only them goes, but for what it says first of who is seen; where a part names
    both, the others' names are taken out.

    Args:
        caption: of the whole picture.
        seen: everybody else, in the picture or not.
        unseen: who is in the picture, and not in this part of it.
        n_faces: how many are in the picture, named or not; it tells whose looks are whose.
    """
    owners = _owners(caption, [*seen, *unseen], n_faces)
    parts = [
        _without_others(part, caption, seen, unseen)
        for place, part in enumerate(caption_parts(caption))
        if owners.get(place) not in unseen
    ]
    return without_names("".join(parts).lstrip(f",{WIDE} "), unseen)


def _without_others(part: str, caption: str, seen: Collection[str], unseen: Collection[str]) -> str:
    """Return what a part of a caption says of those who are seen."""
    mentions = [match.start() for name in unseen if (match := find_name(part, name))]
    if not mentions or names_any(part, seen):
        return part
    first = _in_order(caption, [*seen, *unseen])[0]
    before = part[: min(mentions)].rstrip()
    while before != (shorter := LEADING.sub("", before)):
        before = shorter
    says_looks = first in seen and len(before.strip(f",{WIDE} ").split()) >= MIN_LOOKS_WORDS
    return before if says_looks else ""


def _in_order(caption: str, names: Collection[str]) -> list[str]:
    """Return the names that a caption has, as it mentions them."""
    places = {name: match.start() for name in names if (match := find_name(caption, name))}
    return sorted(places, key=lambda name: (places[name], name))


def _owners(caption: str, names: Collection[str], n_faces: int) -> dict[int, str | None]:
    """Return whose looks a part of a caption tells, by its place; None for a passer-by's.

    "a and b, a fox waving, a bear standing": names and looks come in the same order. Where there are
    neither as many as names nor as many as faces, nobody can tell.
    """
    looks = [
        place
        for place, part in enumerate(caption_parts(caption))
        if place and DESCRIPTION.match(part) and not names_any(part, names)
    ]
    named = _in_order(caption, names)
    if len(looks) < len(named) or len(looks) not in (len(named), n_faces):
        return {}
    return dict(itertools.zip_longest(looks, named))


def names_any(text: str, names: Collection[str]) -> bool:
    """Whether a text has one of the names as a word of its own."""
    return any(find_name(text, name) for name in names)


def near_caption(
    caption: str, name: str, others: Collection[str], *, n_faces: int = 0, shot: str = MEDIUM
) -> str:
    """Return a caption for a view from near that shows one of its characters alone.

    Args:
        caption: of the whole picture.
        name: who is shown.
        others: everybody else who has a name.
        n_faces: as in `name_only`.
        shot: what takes the place of words for a picture from far away.
    """
    owners = _owners(caption, [name, *others], n_faces)
    parts = caption_parts(caption)
    kept = [part for place, part in enumerate(parts) if owners.get(place, name) == name]
    alone = name_only("".join(kept), [name], others)
    return SEVERAL_SHOWN.sub(r"\1 character", FAR.sub(shot, alone))


def _names(value: Any) -> Any:
    """Lower-case names, each once; a single string is a list of one, anything else no name.

    One text may hold several names, or say in words that there is none.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        return value
    texts = [clean(text).lower() for text in value if isinstance(text, str)]
    names = [name for text in texts if not NOBODY.fullmatch(text) for name in SEVERAL.split(text)]
    return [name for name in dict.fromkeys(names) if not NOBODY.fullmatch(name)]


def names_said(values: Iterable[Any]) -> list[str]:
    """Return in lines which of the given names were no names, and which were several."""
    fields = [value if isinstance(value, list) else [value] for value in values]
    texts = [clean(text).lower() for texts in fields for text in texts if isinstance(text, str)]
    nobody = Counter(text for text in texts if text and NOBODY.fullmatch(text))
    several = Counter(text for text in texts if text not in nobody and len(SEVERAL.split(text)) > 1)
    return [
        f"characters_identified: {what}: " + ", ".join(f"{text!r} ({n})" for text, n in found.items())
        for what, found in (("no names", nobody), ("several names in one", several))
        if found
    ]


def _boxes(value: Any) -> list[Box]:
    """The face boxes that are four finite numbers: a bad one is no reason to lose the frame."""
    items = value if isinstance(value, list) else []
    boxes: list[Any] = [item.get("bbox") for item in items if isinstance(item, dict)]
    return [(box[0], box[1], box[2], box[3]) for box in boxes if _is_box(box)]


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(x, int | float) and abs(x) < 1e6 and math.isfinite(x) for x in box)
    )


Text = Annotated[str, BeforeValidator(clean)]


class Record(BaseModel):
    """One object of llm_analysis.json, as far as training needs it."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True, allow_inf_nan=False)

    frame_id: Text = ""
    frame_path: str = ""
    characters_identified: Annotated[list[str], BeforeValidator(_names)] = Field(default_factory=list)
    scene_description: Text = ""
    sd_caption: Text = ""
    confidence: float = Field(0.0, ge=0, le=1)
    model_used: Text = ""
    local_detections: Annotated[list[Box], BeforeValidator(_boxes)] = Field(default_factory=list)


def entry_from_record(raw: Any, number: int, min_confidence: float) -> Entry:
    """Return what object `number` of llm_analysis.json says, with the reason if it cannot be used."""
    fields = {k: v for k, v in raw.items() if v is not None} if isinstance(raw, dict) else raw
    try:
        record = Record.model_validate(fields)
    except ValidationError as error:
        return _invalid_entry(fields, number, error)
    caption, reason = "", ""
    try:
        caption = _caption(record, min_confidence)
    except LeftOutError as left_out:
        reason = str(left_out)
    return Entry(
        record.frame_id or clean(PureWindowsPath(record.frame_path).stem) or f"entry {number}",
        record.frame_path,
        caption,
        reason,
        tuple(record.characters_identified),
        record.confidence,
        record.sd_caption.startswith(JSON_PREFIXES),
        tuple(record.local_detections),
    )


def _invalid_entry(fields: Any, number: int, error: ValidationError) -> Entry:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or "entry"
    label: Any = ""
    recorded: Any = ""
    if isinstance(fields, dict):
        label, recorded = clean(fields.get("frame_id")), fields.get("frame_path")
    return Entry(
        label if label and isinstance(label, str) else f"entry {number}",
        recorded if isinstance(recorded, str) else "",
        reason=clean(f"invalid entry: {where}: {first['msg']}"),
    )


def _caption(record: Record, min_confidence: float) -> str:
    """Return the caption to train on, or raise `LeftOutError`."""
    texts = (record.sd_caption, record.scene_description)
    if record.model_used == "error" or any(text.startswith(FAILED_PREFIX) for text in texts):
        raise LeftOutError("failed call: the language model gave no answer")
    if record.confidence < min_confidence:
        raise LeftOutError(f"low confidence: {record.confidence} < {min_confidence}")
    caption = record.sd_caption
    if not caption:
        raise LeftOutError("no caption: sd_caption is empty")
    rescued = caption.startswith(JSON_PREFIXES)
    if rescued:
        caption = record.scene_description
    if rescued and (not caption or caption.startswith(JSON_PREFIXES)):
        raise LeftOutError("cut-off JSON: neither the caption nor the scene description is a sentence")
    if len(caption.split()) < MIN_CAPTION_WORDS or len(caption) < MIN_CAPTION_CHARACTERS:
        raise LeftOutError(f"short caption: {caption!r}")
    if not rescued:
        return caption
    absent = [name for name in record.characters_identified if not find_name(caption, name)]
    return ", ".join([*absent, caption])


def count_tokens(text: str, tokenizer: Any) -> int:
    """Return how many tokens `text` takes in full, start and end tokens included."""
    return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])


def names_lost(caption: str, names: Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """Return which names of a caption are only in what is cut off at the tokenizer's limit."""
    mentions = {name: find for name in names if (find := find_name(caption, name))}
    # Words are tokenized one by one: what ends within the limit alone is kept whole in the cut caption.
    limit = tokenizer.model_max_length
    ends = {name: count_tokens(caption[: m.end()], tokenizer) for name, m in mentions.items()}
    return tuple(name for name, end in ends.items() if end > limit)


def name_first(caption: str, names: Sequence[str], tokenizer: Any) -> str:
    """Put the names in front if cutting at the tokenizer's limit would lose one that the caption has.

    A caption that fits, and one that keeps its names, is returned as it is, so applying this twice
    changes nothing. Names that the caption never mentions are not added.

    Args:
        caption: the whole caption.
        names: the characters in the picture.
        tokenizer: any with `model_max_length`, as transformers' are; the limit counts start and end.
    """
    limit = tokenizer.model_max_length
    if count_tokens(caption, tokenizer) <= limit:
        return caption
    front = ", ".join(names_in(caption, names)) + ", "
    lost = names_lost(caption, names, tokenizer)
    return front + caption if lost and not caption.startswith(front) else caption
