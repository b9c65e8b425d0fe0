"""`choice.json`: which checkpoint, LoRA scale and guidance were chosen, out of what, and why.

Written by `evaluation.choose` beside `eval.json`; docs/eval.md describes every key.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from bunny_lora.core import files
from bunny_lora.core.eval_parts import Interval, Part
from bunny_lora.errors import BunnyLoraError

SCHEMA_VERSION = 1


class CheckpointLoss(Part):
    """How well one checkpoint predicts noise: the same noise, timesteps and frames for all of them."""

    model: str = Field(description="`checkpoint-<step>` or `final`")
    step: int = Field(ge=0, description="the step that its weights are of")
    loss: Interval = Field(description="mean squared error over the frames, lower is better")
    above_lowest: Interval = Field(
        description="what it is more than that of the checkpoint with the lowest, frame by frame"
    )
    characters: dict[str, float] = Field(description="mean over the frames of each character")


class Candidate(Part):
    """One way of drawing, and how the pictures drawn with it were judged."""

    model: str = Field(description="`checkpoint-<step>` or `final`")
    step: int = Field(ge=0, description="the step that its weights are of")
    lora_scale: float = Field(description="strength of the LoRA, 1: as trained")
    guidance_scale: float = Field(description="strength of classifier-free guidance")
    identity: Interval | None = Field(
        description="0: the base model, 1: the character itself; null where nobody judged it"
    )
    asked: Interval | None = Field(
        description="the share of what the prompts ask for; null where nothing here can tell"
    )
    drift: Interval | None = Field(
        description="what training changed on prompts that name nobody, 1: as much as another seed;"
        " null of a single image a prompt"
    )
    files: list[str] = Field(description="its pictures of characters, from the folder of the file")

    @property
    def label(self) -> str:
        """`checkpoint-100, scale 0.8, guidance 3`."""
        return f"{self.model}, scale {self.lora_scale:g}, guidance {self.guidance_scale:g}"


class Choice(Part):
    """The whole file."""

    schema_version: int = Field(SCHEMA_VERSION, description="version of this format")
    judged_by: str = Field(
        description="`traits`, or the feature extractor; `nobody` of a first choice by hand"
    )
    by_hand: bool = Field(False, description="whether a person chose, and not the rule")
    held_out: bool = Field(description="whether the loss is of frames that training did not see")
    n_frames: int = Field(ge=0, description="how many frames the loss is of")
    losses: list[CheckpointLoss] = Field(description="every checkpoint, by step; none by hand")
    candidates: list[Candidate] = Field(description="what was drawn with, the run's own way first")
    chosen: int = Field(ge=0, description="place in `candidates`")
    tied: list[int] = Field(
        description="places of those that this many pictures cannot tell from the chosen one"
    )
    why: str = Field(description="the choice in a sentence")
    weights_sha256: str = Field(description="over the chosen weights: of others nothing is said")
    final_sha256: str = Field(description="over `final`, as it was then")

    @property
    def best(self) -> Candidate:
        """The candidate that was chosen."""
        return self.candidates[self.chosen]


def path_of(run_dir: Path) -> Path:
    """Return where a run's `choice.json` lies, or would lie."""
    return run_dir / "evaluation" / "choice.json"


def write(run_dir: Path, choice: Choice) -> None:
    """Write the `choice.json` of a run atomically."""
    files.write_json(path_of(run_dir), choice.model_dump(mode="json"))


def find(run_dir: Path) -> Choice | None:
    """Return what was chosen for a run, or None where nobody has chosen.

    Raises:
        BunnyLoraError: the file is damaged, or of a later version.
    """
    path = path_of(run_dir)
    if not path.is_file():
        return None
    again = "run `bunny-lora choose` again"
    raw = files.read_json(path)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise BunnyLoraError(
            f"{path} has schema_version {version}, and this bunny_lora reads up to {SCHEMA_VERSION}:"
            f" use the version that wrote it, or {again}."
        )
    try:
        choice = Choice.model_validate(raw)
        _ = choice.best
    except (ValidationError, IndexError):
        raise BunnyLoraError(f"{path} is damaged: {again}.") from None
    return choice
