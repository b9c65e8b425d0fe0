"""`eval.json`: what an evaluation found, written by `evaluation.judge` and read by everyone else.

docs/eval.md describes every key. `SCHEMA_VERSION` goes up when a key gets another name or meaning;
files of older versions are still read, old names and all, files of later ones are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import AliasChoices, Field, ValidationError, field_validator

from bunny_lora.core import files
from bunny_lora.core.eval_parts import (
    Copies,
    DriftScore,
    Interval,
    Pairs,
    Part,
    Rounded,
)
from bunny_lora.errors import BunnyLoraError

SCHEMA_VERSION = 2

T = TypeVar("T")


class Measures(Rounded, Generic[T]):
    """Every measure, for some images of one model, or what it is more than the base model's."""

    fidelity: T = Field(
        description="mean cosine to the character's training crops, -1 to 1, higher is better"
    )
    consistency: T | None = Field(
        description="mean cosine between images of one character, -1 to 1; null where no character has"
        " two"
    )
    separation: T = Field(
        description="share of images nearer to their own character than to any other, 0 to 1, higher is"
        " better"
    )
    memorisation: T = Field(
        validation_alias=AliasChoices("memorisation", "max_copy"),
        description="cosine to the nearest training frame, -1 to 1; the nearer to 1, the more it is a"
        " copy",
    )

    def means(self: Intervals) -> Means:
        """Return the means alone."""
        return Means(**{name: value and value.mean for name, value in self})


# Made here, at the module's top, they can be sent from one process to another.
Intervals = Measures[Interval]
Means = Measures[float]
MEASURES = tuple(Measures.model_fields)


class ScoreTable(Part):
    """The measures of one model, or the differences between two: all images, and each character's."""

    all: Intervals = Field(description="over all images that name a character")
    characters: dict[str, Intervals] = Field(description="over the images of each character")


class ReferenceScores(Rounded):
    """What the training data scores among itself, to read the measures against."""

    similarity_of_crops: dict[str, Interval | None] = Field(
        validation_alias=AliasChoices("similarity_of_crops", "likeness_of_crops"),
        description="mean cosine between a character's crops, -1 to 1; null of a single crop",
    )
    separation_of_crops: Interval | None = Field(
        description="share of crops nearer to the other crops of their character than to any other"
        " character, 0 to 1; null where nobody has two"
    )
    nearest_other_frame: Interval | None = Field(
        description="cosine of a training frame to the nearest other one, -1 to 1; null of a single"
        " frame"
    )
    chance_level: float = Field(
        gt=0, le=1, description="separation by guessing: 1 over the number of characters"
    )
    n_crops: dict[str, int] = Field(description="how many crops each character has")
    n_frames: int = Field(ge=1, description="how many training frames there are")


class EvalSettings(Part):
    """What must be equal for two evaluations to be comparable."""

    features: str = Field(description="the feature extractor; scores of different ones do not compare")
    prompt_features: str | None = Field(
        None, description="what compares images with prompts; null: nothing"
    )
    ceiling_shots: int = Field(
        0, ge=0, description="at most so many shots of a character are held out for its ceiling"
    )
    characters: list[str] = Field(description="all characters, the most frequent first")
    prompts: list[str] = Field(description="prompts, with {name} where a character's name goes")
    looks: dict[str, str] = Field(
        default_factory=dict, description="what {looks} says of each character; empty in older files"
    )
    neutral_prompts: list[str] = Field(description="the prompts that name nobody")
    num_images_per_prompt: int = Field(ge=1, description="images of each prompt, from 1")
    pair_prompts: list[str] = Field(
        default_factory=list, description="prompts about two characters; none in older files"
    )
    other_prompts: list[str] = Field(
        default_factory=list, description="prompts about other subjects; none in older files"
    )
    num_drift_images: int = Field(
        1, ge=1, description="images, at least, of each kind of prompt that names nobody"
    )
    seed: int = Field(ge=0, description="what the seeds of the images are derived from")
    resolution: int = Field(ge=1, description="width and height of the images in pixels")
    num_inference_steps: int = Field(ge=1, description="denoising steps of an image, from 1")
    guidance_scale: float = Field(ge=0, description="strength of classifier-free guidance, from 0")
    lora_scale: float = Field(1.0, ge=0, description="strength of the LoRA, 1: as trained")
    sampler: str = Field("own", description="what denoised: `sampling.sampler`; own of older files")


class RunInfo(Part):
    """Where the run and this evaluation came from."""

    config: dict[str, Any] = Field(description="the whole configuration of the evaluation")
    trained_by: dict[str, Any] | None = Field(
        description="the run's provenance.json: commit, library versions, hash of the data; null of"
        " weights from elsewhere"
    )
    evaluated_by: dict[str, Any] = Field(
        description="commit, library versions and platform of this file"
    )
    final: dict[str, str | None] = Field(
        description="what drew as `final`: base_model, base_sha256, weights_sha256, dtype, device"
    )


class ImageScores(Rounded):
    """One generated image. Those that name nobody have no scores."""

    model: str = Field(description="`base`, `checkpoint-<step>` or `final`")
    character: str = Field(
        description="who should be on it; `-` is nobody, `-others` another subject, `-empty` anything"
    )
    prompt_index: int = Field(ge=0, description="which prompt, from 0")
    prompt: str = Field(description="the prompt as it was drawn")
    seed: int = Field(ge=0, description="the image's seed, 32 bits; the same for every model")
    file: str = Field(description="the PNG, from the folder of eval.json")
    fidelity: float | None = Field(None, description="as in Measures, of this image")
    separation: float | None = Field(None, description="as in Measures, of this image: 1 or 0")
    memorisation: float | None = Field(
        None,
        validation_alias=AliasChoices("memorisation", "max_copy"),
        description="as in Measures, of this image",
    )
    nearest_frame: str | None = Field(None, description="file name of the nearest training frame")
    nearest_character: str | None = Field(
        None, description="whose crops the image is most like, on average; none in older files"
    )
    identity: float | None = Field(None, description="as in IdentityScores, of this image")
    following: float | None = Field(None, description="the cosine to its prompt, of this image")
    read: dict[str, str] = Field(
        default_factory=dict,
        description="what the reader of traits took it for, of what it reads well: `ear: bent`",
    )


class TraitScore(Rounded):
    """One trait of one character: how sure the reader is of the right answer, 0 to 1, on average."""

    answer: str = Field(description="the right answer")
    ceiling: float = Field(description="on renders of the character, through the autoencoder")
    models: dict[str, float] = Field(description="on the images of `base`, each checkpoint and `final`")
    floor: float | None = Field(
        None, description="what counts as 0, the base model's nobody; null: `base` of the same prompts"
    )


class TraitScores(Part):
    """What a reader of traits saw: identity, and beside it what was asked for.

    Identity is 0 where the base model stands, and 1 for renders of the character. Where prompts tell
    `{looks}`, 0 is the base model's nobody, and what it draws by words has a place of its own.
    """

    counted: list[str] = Field(description="the traits that count: those that the reader reads well")
    identity: dict[str, dict[str, Interval]] = Field(
        description="of each model, over `all` images and over those of each character"
    )
    asked: dict[str, Interval] = Field(
        description="of each model and of `ceiling`, the share of place, light and pose as asked"
    )
    another: dict[str, Interval] = Field(
        description="of each model and of `ceiling`, the share of a character's images with another"
        " one's fur, outfit or mark, 0 to 1, lower is better"
    )
    nobody: dict[str, Interval] = Field(
        description="of each model, the share of images of nobody in a character's fur"
    )
    traits: dict[str, dict[str, TraitScore]] = Field(description="every trait of every character")
    confusion: list[list[float | None]] = Field(
        description="of `final`, a row a character and one for nobody: the shares of its images that"
        " have each character's fur, and nobody's; null without images"
    )


class Anchors(Rounded):
    """What a character's identity is measured between: mean cosines to its references."""

    base: Interval = Field(description="of the base model's images of it: a floor")
    wrong: Interval | None = Field(
        description="of the other character that is most like it, in shots held out: the other floor;"
        " null of one character"
    )
    ceiling: Interval | None = Field(
        description="of the character itself in shots held out, through the autoencoder; null of a"
        " single shot"
    )


class IdentityScores(Part):
    """Identity between the higher floor, 0, and the ceiling, 1; characters are cut out of all alike."""

    features: str = Field(description="what measured it")
    anchors: dict[str, Anchors] = Field(description="the floors and the ceiling of each character")
    blind: dict[str, str] = Field(description="who cannot be judged so, and why; not in the rest")
    models: dict[str, dict[str, Interval]] = Field(
        description="of each model, over `all` images and over those of each character;"
        " below 0: less like it than the floor"
    )
    change: Interval | None = Field(
        description="`final` minus `base`, paired by prompt and seed; null where nobody can be judged"
    )


class Axis(Part):
    """One more number for every model, with an interval that takes images of a prompt for alike."""

    features: str = Field(description="what measured it")
    models: dict[str, Interval] = Field(description="of each model, over images that name a character")
    change: Interval = Field(description="`final` minus `base`, paired by prompt and seed")
    reference: float | None = Field(description="what to read it against")


def sees(features: str) -> str:
    """Return the name of a feature extractor with what it cannot see, where that is most of it."""
    return f"{features}, sees colours only" if features == "palette" else features


class MeanScores(Part):
    """The means of a result, as handover.json passes them on."""

    features: str
    warning: str | None
    base: Means
    final: Means


class EvalResult(Part):
    """The whole file."""

    schema_version: int = Field(SCHEMA_VERSION, description="version of this format")
    base_model: str = Field(description="folder or hub name of the base model")
    warning: str | None = Field(None, description="why the numbers mean nothing; null where they do")
    run_info: RunInfo = Field(description="where the run and this evaluation came from")
    settings: EvalSettings = Field(description="what must be equal for two evaluations to compare")
    models: dict[str, ScoreTable] = Field(
        description="the measures of `base`, of every `checkpoint-<step>`, and of `final`"
    )
    differences: ScoreTable = Field(
        description="`final` minus `base`, image by image: ranges are twice as wide"
    )
    drift: Interval = Field(
        description="1 minus the cosine between `base` and `final` on prompts that name nobody, 0 to 2,"
        " lower is better"
    )
    drift_ratio: Interval | None = Field(
        None,
        description="`drifts.templates.ratio`; null of a single image a prompt",
    )
    drifts: dict[str, DriftScore] = Field(
        default_factory=dict,
        description="drift of each kind of prompt: `templates` without the name, `others`: other"
        " subjects, `empty`: the empty prompt; none in older files",
    )
    copies: Copies | None = Field(
        None, description="copies of what training saw; null of a single shot, and in older files"
    )
    traits: TraitScores | None = Field(
        None, description="identity by traits; null where `evaluation.traits` names none"
    )
    identity: IdentityScores | None = Field(
        None,
        description="likeness between floor and ceiling; null where `evaluation.ceiling_shots` is 0",
    )
    following: Axis | None = Field(
        None,
        description="cosine between an image and its prompt without the name; `reference`: and the"
        " other prompts. Null where `evaluation.prompt_features` names nothing",
    )
    colour: Axis | None = Field(
        None,
        description="cosine of palettes, image to the character's training crops: sees colours only;"
        " `reference`: the crops among themselves. Null in older files",
    )
    pairs: Pairs | None = Field(
        None,
        description="two characters in one image; null where `evaluation.pair_prompts` names none, or"
        " identity can judge no two",
    )
    reference: ReferenceScores = Field(description="what the training data scores among itself")
    seconds_per_image: float = Field(ge=0, description="median time of drawing an image, in seconds")
    images: list[ImageScores] = Field(
        validation_alias=AliasChoices("images", "pictures"),
        description="every generated image with its scores",
    )
    training_crops: dict[str, list[str]] = Field(
        description="a few crops of each character, as PNG files from the folder of eval.json"
    )

    @field_validator("models")
    @classmethod
    def _compared(cls, models: dict[str, ScoreTable]) -> dict[str, ScoreTable]:
        if lacking := {"base", "final"} - models.keys():
            raise ValueError(f"lacks {' and '.join(sorted(lacking))}")
        return models

    def means(self) -> MeanScores:
        """Return the mean of every measure, of base model and LoRA: what is handed on."""
        base, final = (self.models[name].all.means() for name in ("base", "final"))
        return MeanScores(features=self.settings.features, warning=self.warning, base=base, final=final)


def path_of(run_dir: Path) -> Path:
    """Return where a run's `eval.json` lies, or would lie."""
    return run_dir / "evaluation" / "eval.json"


def write(run_dir: Path, result: EvalResult) -> None:
    """Write the `eval.json` of a run atomically."""
    files.write_json(path_of(run_dir), result.model_dump(mode="json"))


def find(run_dir: Path) -> EvalResult | None:
    """Return what the evaluation of a run found, or None of a run that was never evaluated.

    Raises:
        BunnyLoraError: `eval.json` is damaged, or of a version that is not read.
    """
    return read(run_dir) if path_of(run_dir).is_file() else None


def read(run_dir: Path) -> EvalResult:
    """Return what the evaluation of a run found, with the names of today where the file is older.

    Raises:
        BunnyLoraError: there is no `eval.json`, it is damaged, or of a version that is not read.
    """
    path = path_of(run_dir)
    if not path.is_file():
        raise BunnyLoraError(f"There is no {path}: run `bunny-lora evaluate` first.")
    raw = files.read_json(path)
    version = raw.get("schema_version", 1) if isinstance(raw, dict) else None
    if type(version) is not int:
        raise BunnyLoraError(f"{path} is damaged: run `bunny-lora evaluate` again.")
    if version > SCHEMA_VERSION:
        raise BunnyLoraError(
            f"{path} has schema_version {version}, and this bunny_lora reads up to {SCHEMA_VERSION}:"
            " use the version that wrote it, or run `bunny-lora evaluate` again."
        )
    try:
        return EvalResult.model_validate(raw | {"schema_version": SCHEMA_VERSION})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"is damaged: {where}: {first['msg']}"
        if version < SCHEMA_VERSION and first["type"] == "missing":
            reason = f"is of an older version, without {where}"
        raise BunnyLoraError(f"{path} {reason}; run `bunny-lora evaluate` again.") from None
