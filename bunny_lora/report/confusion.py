"""Who was asked for and who is seen: a table of pictures, by traits where they were read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bunny_lora.core.eval_result import EvalResult, ImageScores

NOBODY, OTHERS = "nobody", "others"
FUR = "fur"  # the trait by which Bunny World's heroes are told apart
N_MAX = 14  # characters: more cells could not be told apart


@dataclass(frozen=True)
class Confusion:
    """Pictures of one model by who was asked for, rows, and who is seen, columns.

    Attributes:
        rows: who was asked for.
        columns: who is seen.
        about: what tells who is seen, and who is left out.
        cells: the pictures of each row and column; an empty cell is missing.
    """

    rows: list[str]
    columns: list[str]
    about: str
    cells: Mapping[tuple[str, str], list[ImageScores]]

    def shares(self) -> dict[str, list[float | None]]:
        """Return for each row the share of its pictures in each column; None of a row without any."""
        found = {}
        for row in self.rows:
            counts = [len(self.cells.get((row, column), ())) for column in self.columns]
            found[row] = [n / sum(counts) if sum(counts) else None for n in counts]
        return found


def confusion(result: EvalResult, model: str = "final") -> Confusion | None:
    """Return who is seen on a model's pictures.

    By fur where Bunny World's reader read it, else by whose training crops a picture is most like. None
    of one character, and of an older evaluation, which told neither.

    Args:
        result: of an evaluation.
        model: base, checkpoint-<step> or final.
    """
    images = [image for image in result.images if image.model == model]
    if owners := _owners(result):
        names, seen, anyone_else = list(owners.values()), _by_fur(images, owners), NOBODY
        about = "By the fur that is read off the picture; the last row: prompts that name nobody"
    else:
        names, seen, anyone_else = result.settings.characters, _by_likeness(images), OTHERS
        about = f"By whose training crops the picture is most like, by {result.settings.features}"
    if len(names) < 2 or not seen:
        return None
    if len(names) > N_MAX:
        about, names = f"{about}; the first {N_MAX} of {len(names)} characters", names[:N_MAX]
    cells: dict[tuple[str, str], list[ImageScores]] = {}
    for asked, shown, image in seen:
        row, column = (name if name in names else anyone_else for name in (asked, shown))
        cells.setdefault((row, column), []).append(image)
    rows, columns = ({place[axis] for place in cells} for axis in (0, 1))
    every = [*names, anyone_else]
    return Confusion(
        [row for row in every if row in rows],
        [column for column in every if column in columns or column in names],
        about,
        cells,
    )


def _owners(result: EvalResult) -> dict[str, str]:
    """Return whose each fur is; empty where the reader does not count it, or two have the same."""
    if result.traits is None or FUR not in result.traits.counted:
        return {}
    furs = {name: t[FUR].answer for name, t in result.traits.traits.items() if FUR in t}
    owners = {fur: name for name, fur in furs.items()}
    return owners if len(owners) == len(result.traits.traits) else {}


def _by_fur(images: list[ImageScores], owners: Mapping[str, str]) -> list[tuple[str, str, ImageScores]]:
    return [
        (image.character, owners.get(image.read[FUR], NOBODY), image)
        for image in images
        if FUR in image.read
    ]


def _by_likeness(images: list[ImageScores]) -> list[tuple[str, str, ImageScores]]:
    return [
        (image.character, image.nearest_character, image)
        for image in images
        if image.nearest_character is not None
    ]
