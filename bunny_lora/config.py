"""The typed, validated form of a configuration's `finetuning:` section.

Other top-level sections of the file belong to other stages of the pipeline and are left alone. Every
key is read somewhere, an unknown one is an error, and all errors are shown at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from bunny_lora.core import paths, schema
from bunny_lora.core.explain import explain
from bunny_lora.core.schema import is_section
from bunny_lora.core.sections import (
    EvaluationSection,
    LoRASection,
    NamingSection,
    PreservationSection,
    PriorPreservationSection,
    SamplingSection,
    Section,
    TrainingSection,
)
from bunny_lora.core.values import (
    OwnFolder,
    Recorded,
    Zoom,
    shown,
    split_revision,
)
from bunny_lora.core.yaml_file import SECTION, add_comments, parse_value, read_section
from bunny_lora.errors import BunnyLoraError

# An old document's name for the model: its maker's list holds no such repository.
UNLISTED_MODELS = {"nota-ai/sd-v1-5-tiny": "nota-ai/bk-sdm-tiny"}

RESUME_TAKES = "takes auto, never, or a checkpoint: its step, its folder's name or path"


class Config(Section):
    """The whole `finetuning:` section. Paths are relative to the project root."""

    base_model: Recorded = "nota-ai/bk-sdm-tiny"
    """A folder, a .safetensors file of Stable Diffusion 1.x, or a model of the hub: owner/name, or
    owner/name@ and a commit, a tag or a branch."""
    method: Literal["lora"] = "lora"
    """What is trained; the only one there is."""
    output_dir: OwnFolder = "outputs/lora_weights"
    """The run's folder; one folder is one run."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """auto: cuda where there is a usable GPU, else cpu."""
    source: Recorded = "auto"
    """A stage-4 run or a folder of pictures. auto: the newest in outputs/; bunny-world: the demo's."""
    min_confidence: float = Field(0.5, ge=0, le=1)
    """Frames that stage 4 was less sure of than this, from 0 to 1, are left out."""
    allow_outside_paths: bool = False
    """Pictures are read inside the project and the run only; this follows recorded paths anywhere."""
    data_dir: OwnFolder = "training_data/instance_images"
    """Where the training data is prepared, or lies already."""
    caption_column: str | None = None
    """Which column of a folder's table holds the captions; null: `text`, else `caption` or `prompt`."""
    character_names: list[str] = Field(default_factory=list)
    """Names or trigger words that captions have: who is in a picture, where no analysis says so."""
    looks: dict[str, str] = Field(default_factory=dict)
    """What characters look like, in the words of captions, `rex: red fox in a green hat`: evaluation's
    prompts say it at `{looks}`, and `naming` teaches it to their names."""
    instance_prompt: str = "cartoon character"
    """The caption of pictures that have none."""
    resolution: int = Field(512, ge=8, le=8192, multiple_of=8)
    """Pixels a side; best what the base model was taught at."""
    center_crop: bool = True
    """Train on the middle square; false: on squares from all over the picture, with its faces."""
    aspect_buckets: bool = False
    """Train on whole pictures instead, of any shape: resized to about the area of the resolution's
    square, each batch of one size. center_crop then says nothing."""
    random_flip: bool = False
    """Show pictures mirrored as often as not; wrong for characters whose sides differ."""
    zoom_on_faces: Zoom = False
    """A picture of one character whose face was found is shown from near as often as whole; only: never
    whole, so that what is small in it is seen twice as often."""
    face_encoder: str | None = None
    """What ties faces to names: bunny-world, or an image encoder (CLIP, DINOv2), folder or hub name.
    zoom_on_faces then shows all who are named in a picture, and captions name only whose face is seen;
    evaluation compares with the right faces. null: nothing; evaluation then goes by its features."""
    mask_neighbours: bool = False
    """Learn nothing, in what zoom_on_faces shows of one from near, from the others who are in it."""
    balance_characters: bool = False
    """Show pictures of rare characters more often, so that all are seen about as often."""
    thin_duplicates: bool = False
    """Neighbouring pictures that are nearly the same share the weight of one."""
    held_out: float = Field(0.0, ge=0, le=0.5)
    """How much of each character, in whole shots, training does not see, so that `choose` can tell
    learning from learning by heart. 0: nothing."""
    num_workers: int = Field(0, ge=0, le=256)
    """Processes that read pictures, as in torch's DataLoader."""
    pin_memory: bool = False
    """As in torch's DataLoader: faster copies to a GPU."""
    use_8bit_adam: bool = False
    """Optimiser state in 8 bits; needs the bitsandbytes package."""
    resume: int | str = "auto"
    """auto: go on from the last checkpoint. never: begin anew, the old run is kept. Or a checkpoint:
    its step, its folder's name or path."""
    lora: LoRASection = LoRASection()
    training: TrainingSection = TrainingSection()
    prior_preservation: PriorPreservationSection = PriorPreservationSection()
    preservation: PreservationSection = PreservationSection()
    naming: NamingSection = NamingSection()
    sampling: SamplingSection = SamplingSection()
    evaluation: EvaluationSection = EvaluationSection()
    _user_settings: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("base_model")
    @classmethod
    def _listed(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("takes a folder or the name of a hub repository, no address")
        if suggestion := UNLISTED_MODELS.get(split_revision(value)[0]):
            raise ValueError(
                f"{value} is a name from old documents that its maker does not list;"
                f" the small Stable Diffusion meant is {suggestion}: set base_model: {suggestion}"
            )
        return value

    @field_validator("resume", mode="before")
    @classmethod
    def _whether_or_where(cls, value: Any) -> Any:
        """Understand `no` and `yes` too, which YAML reads as false and true, and a shell as words."""
        word = str(value).strip().lower() if isinstance(value, str | bool) else value
        if word in ("no", "off", "false"):
            return "never"
        if word in ("yes", "on", "true"):
            return "auto"
        if not word or not isinstance(word, str | int) or (isinstance(word, int) and word < 0):
            raise ValueError(f"{RESUME_TAKES} (got {shown(value)})")
        return value

    # Checks across keys hang on one of them each, so that one mistake does not hide the other.
    @field_validator("training")
    @classmethod
    def _precision_is_possible(cls, value: TrainingSection, info: ValidationInfo) -> TrainingSection:
        if value.mixed_precision == "fp16" and info.data.get("device") == "cpu":
            raise ValueError("mixed_precision fp16 needs a GPU; on device cpu choose auto, bf16 or no")
        return value

    @field_validator("evaluation")
    @classmethod
    def _looks_are_told(cls, value: EvaluationSection, info: ValidationInfo) -> EvaluationSection:
        if any("{looks}" in prompt for prompt in value.prompts) and not info.data.get("looks"):
            raise ValueError(
                "prompts has {looks}, and nobody's are told: set looks, such as"
                " looks: {rex: red fox in a green hat}, or leave {looks} out"
            )
        return value

    @field_validator("naming")
    @classmethod
    def _names_can_be_taught(cls, value: NamingSection, info: ValidationInfo) -> NamingSection:
        if value.share and not info.data.get("looks"):
            raise ValueError(
                "share teaches names what looks say, and nobody's are told: set looks, such as"
                " looks: {rex: red fox in a green hat}, or share: 0"
            )
        training = info.data.get("training", TrainingSection())
        if value.share and value.lora_scale not in (0, 1) and training.gradient_checkpointing:
            raise ValueError(
                f"lora_scale {value.lora_scale:g} does not go with training.gradient_checkpointing,"
                " which computes parts again, at scale 1 then: set lora_scale: 1, or"
                " gradient_checkpointing: false"
            )
        preserved = info.data.get("preservation", PreservationSection()).share
        if value.share + preserved >= 1:
            raise ValueError(
                f"share {value.share:g} and preservation.share {preserved:g} leave no sample to learn"
                " from its picture: together they must be below 1"
            )
        return value

    @property
    def run_dir(self) -> Path:
        """`output_dir` as an absolute path."""
        return paths.resolve(self.output_dir)

    @property
    def data_path(self) -> Path:
        """`data_dir` as an absolute path."""
        return paths.resolve(self.data_dir)

    def is_set(self, key: str) -> bool:
        """Whether the user set a key at the top, be it to its default."""
        return key in self._user_settings

    def to_yaml(self, *, comments: bool = False) -> str:
        """Return the resolved configuration as a file that `load_config` reads back to the same.

        Args:
            comments: above each key, what it means.
        """
        text = _as_file(self.model_dump(mode="json"))
        if not comments:
            return text
        return add_comments(text, schema.comments(Config, SECTION))

    def user_yaml(self) -> str:
        """Return only what the user set, in the file and beside it, as such a file."""
        return _as_file(_only(self._user_settings, self.model_dump(mode="json")))


def _only(user_settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given keys with their validated values: no raw path, nothing that YAML cannot hold."""
    return {
        key: _only(value, values[key]) if isinstance(value, Mapping) else values[key]
        for key, value in user_settings.items()
    }


def _as_file(section: Mapping[str, Any]) -> str:
    return yaml.safe_dump({SECTION: dict(section)}, sort_keys=False, allow_unicode=True)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping | None):
            value = merge(old, value or {})  # None: a section with every key commented out.
        merged[key] = value
    return merged


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read the `finetuning:` section of a YAML file, lay `overrides` over it and validate.

    Args:
        path: the file; None means the defaults alone.
        overrides: nested like the section itself, `{"training": {"max_train_steps": 5}}`.

    Raises:
        BunnyLoraError: the file is missing or no YAML, or the values are wrong; every error at once.
    """
    section = read_section(Path(path)) if path is not None else {}
    return validate(merge(section, overrides or {}), where=str(path or "the configuration"))


def validate(section: Mapping[str, Any], where: str = "the configuration") -> Config:
    """Return the typed configuration.

    Raises:
        BunnyLoraError: one line for every wrong key and value.
    """
    section = _without_empty(section, Config.model_fields)
    fields = schema.fields(Config)
    try:
        config = Config.model_validate(section)
    except ValidationError as error:
        lines = [f"  - {explain(item, list(fields))}" for item in error.errors()]
        count = f"{len(lines)} error{'s' * (len(lines) > 1)}"
        raise BunnyLoraError(f"{where}: {count} in `finetuning:`\n" + "\n".join(lines)) from None
    config._user_settings = section
    return config


def _without_empty(section: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """Return a section without those in it that have every key commented out."""
    found = {}
    for key, value in section.items():
        is_inner = key in fields and is_section(fields[key])
        if is_inner and isinstance(value, Mapping):
            value = _without_empty(value, fields[key].annotation.model_fields)  # type: ignore[union-attr]
        if value is not None or not is_inner:
            found[key] = value
    return found


def set_key(overrides: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `section.key` in nested overrides; what stood there before gives way."""
    *sections, key = dotted.strip().split(".")
    for name in sections:
        if not isinstance(overrides.get(name), dict):
            overrides[name] = {}
        overrides = overrides[name]
    overrides[key] = value


def assign(overrides: dict[str, Any], assignment: str) -> None:
    """Set what `section.key=value` says; the value is read as YAML.

    Raises:
        BunnyLoraError: there is no `=` in the assignment, or its value is no YAML.
    """
    dotted, equals, value = assignment.partition("=")
    if not equals or not all(part.strip() for part in dotted.split(".")):
        raise BunnyLoraError(
            f"--set takes key=value, as in training.max_train_steps=5; got {assignment}"
        )
    try:
        set_key(overrides, dotted, parse_value(value))
    except ValueError as error:
        raise BunnyLoraError(
            f"--set {assignment}: the value is not YAML that we can read: {error}"
        ) from error


def known_keys() -> list[str]:
    """Return every key of the configuration, dotted; a section is none."""
    return [key for key, field in schema.fields(Config).items() if not is_section(field)]


def by_key(config: Config) -> dict[str, Any]:
    """Return every value by its dotted key."""
    return {key: attrgetter(key)(config) for key in known_keys()}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a file with a `finetuning:` section, for editors."""
    return schema.of_file(Config, SECTION)
