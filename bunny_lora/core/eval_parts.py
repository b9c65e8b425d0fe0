"""What the parts of `eval.json` are made of, and some of them: see `eval_result`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

DECIMALS = 5  # what float32 arithmetic can promise of a score
THERE = 0.5  # of identity: nearer to the ceiling than to the floor


class Part(BaseModel):
    """What a newer version adds is ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Rounded(Part):
    """Numbers as exact as they are."""

    @field_validator("*")
    @classmethod
    def _round(cls, value: Any) -> Any:
        return round(value, DECIMALS) if isinstance(value, float) else value


class Interval(Rounded):
    """A mean over images with its 95 % interval, in the unit of what is averaged."""

    mean: float = Field(description="the mean")
    low: float | None = Field(description="lower end of the interval; null of fewer than 3 images")
    high: float | None = Field(description="upper end of the interval; null of fewer than 3 images")
    n: int = Field(ge=1, description="how many images, from 1")


class DriftScore(Rounded):
    """How far training moved images of prompts that name nobody."""

    moved: Interval = Field(
        description="1 minus the cosine between `base` and `final`, 0 to 2, lower is better"
    )
    between_seeds: float | None = Field(
        description="the same between two images of `base` of one prompt; null where none has two"
    )
    ratio: Interval | None = Field(
        description="`moved` over `between_seeds`, 0: nothing, 1: as much as another seed"
    )


class NearestView(Rounded):
    """A picture beside what training saw that is most like it."""

    file: str = Field(description="the picture, from the folder of eval.json")
    view: str = Field(description="the view, as PNG, from the folder of eval.json")
    frame: str = Field(description="file name of the frame that the view is cut from")
    similarity: float = Field(description="cosine of the two, -1 to 1")


class PairImage(Rounded):
    """An image that should show two characters."""

    model: str = Field(description="`base` or `final`")
    names: list[str] = Field(description="the two")
    prompt: str = Field(description="the prompt as it was drawn")
    file: str = Field(description="the PNG, from the folder of eval.json")
    identity: list[float] = Field(
        description="of each of the two, as in IdentityScores, in windows that do not overlap"
    )

    @property
    def n_there(self) -> int:
        """How many of the two are there: nearer to their ceiling than to their floor."""
        return sum(value >= THERE for value in self.identity)

    @field_validator("identity")
    @classmethod
    def _round_each(cls, value: list[float]) -> list[float]:
        return [round(number, DECIMALS) for number in value]


class Pairs(Part):
    """Images of two characters, `evaluation.pair_prompts`: who of them is there."""

    both: dict[str, Interval] = Field(description="of `base` and `final`, the share that shows both")
    one: dict[str, Interval] = Field(description="the share that shows one of them alone")
    images: list[PairImage] = Field(description="every such image")


class Sameness(Part):
    """How alike images of one character are that should differ."""

    pictures: Interval = Field(description="mean cosine of `final`'s images of different prompts")
    training: Interval | None = Field(
        description="mean cosine of views of different shots in which the character is alone; null"
        " where there are no two"
    )


class Copies(Rounded):
    """Pictures nearer to what training saw than frames are that it did not see."""

    threshold: float = Field(
        description="cosine to the nearest view of another shot, that 95 % of training's views stay"
        " below"
    )
    n_views: int = Field(ge=1, description="how many views there are: squares, faces, mirror images")
    above: dict[str, Interval] = Field(
        description="of `base` and `final`, the share of images of characters that are nearer to a view"
        " than `threshold`; 0.05 is what held-out frames have, of few shots more"
    )
    sameness: dict[str, Sameness] = Field(
        description="of each character; `pictures` above `training`: the same picture again and again"
    )
    nearest: list[NearestView] = Field(description="the images of `final` that are nearest to a view")
