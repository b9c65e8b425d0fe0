"""The typed, validated form of a configuration's `finetuning:` section.

Other top-level sections of the file belong to other stages of the pipeline and are left alone. Every
key is read somewhere, an unknown one is an error, and all errors are shown at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from bunny_lora.core import paths
from bunny_lora.core.values import (
    MAX_NUMBER,
    MAX_SHOWN,
    OwnFolder,
    Recorded,
    is_text,
    kinds_of,
    shown,
    split_revision,
)
from bunny_lora.core.yaml_file import parse_yaml
from bunny_lora.errors import BunnyLoraError

# An old document's name for the model: its maker's list holds no such repository.
UNLISTED_MODELS = {"nota-ai/sd-v1-5-tiny": "nota-ai/bk-sdm-tiny"}

# What other trainers call our keys, where the spelling alone would suggest another key.
OTHER_NAMES = {
    "max_steps": "training.max_train_steps",
    "lr": "training.learning_rate",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "train_batch_size": "training.batch_size",
    "pretrained_model_name_or_path": "base_model",
}

Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no infinities, never changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _fits(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what would be taken for something else, or could not be written down again."""
        kinds = kinds_of(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and kinds & {int, float}:
            raise ValueError(f"should be a number (got {value})")
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
            raise ValueError(f"should be a smaller number (got {shown(value)})")
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and not is_text(text) for text in texts):
            raise ValueError(f"has control characters or halves of characters in it: {shown(value)}")
        return value


class LoRASection(Section):
    """Low-rank adapters, https://arxiv.org/abs/2106.09685: ΔW = (alpha / rank) · B · A."""

    rank: int = Field(8, ge=1, le=4096)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] = Field(["to_k", "to_q", "to_v", "to_out.0"], min_length=1)
    train_text_encoder: bool = False
    text_encoder_target_modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "out_proj"], min_length=1
    )
    # A LoRA to begin with instead of none, in any format that `generate` draws with.
    start_from: Recorded | None = None


class TrainingSection(Section):
    """One step is one optimiser step on batch_size x gradient_accumulation_steps images."""

    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler: Scheduler = "constant"
    lr_warmup_steps: int = Field(0, ge=0)
    max_train_steps: int = Field(500, ge=1)
    batch_size: int = Field(1, ge=1)
    gradient_accumulation_steps: int = Field(4, ge=1)
    gradient_checkpointing: bool = False
    max_grad_norm: float = Field(1.0, gt=0)
    # How likely each part of a caption, between commas, is left out; the first one and those
    # with a character's name always stay.
    caption_tag_dropout: float = Field(0.0, ge=0, lt=1)
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = "auto"
    # Weights of min(SNR, gamma), https://arxiv.org/abs/2303.09556; its authors use 5. None: all alike.
    snr_gamma: float | None = Field(None, gt=0)
    seed: int = Field(42, ge=0)
    save_steps: int = Field(100, ge=1)
    # Between those, a checkpoint to go on from each so many minutes; only the newest two of these stay.
    save_minutes: float | None = Field(10.0, gt=0)
    # How many checkpoints of save_steps stay; None: all. Those marked by a file `keep` always do.
    keep_checkpoints: int | None = Field(None, ge=1)
    logging_steps: int = Field(10, ge=1)
    validation_prompt: str | list[str] = Field(default_factory=list)
    num_validation_images: int = Field(2, ge=0)

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no_is_a_word(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `no` as false; here it is one of the precisions."""
        return "no" if value is False else value

    @property
    def validation_prompts(self) -> list[str]:
        """The validation prompts as a list, however they were written."""
        prompts = self.validation_prompt
        return [prompts] if isinstance(prompts, str) else prompts


class PriorPreservationSection(Section):
    """DreamBooth's prior preservation, https://arxiv.org/abs/2208.12242, section 4.2."""

    enabled: bool = False
    num_class_images: int = Field(100, ge=1)
    class_prompt: str = Field("cartoon character", min_length=1)
    class_data_dir: OwnFolder = "training_data/class_images"
    prior_loss_weight: float = Field(1.0, ge=0)


class SamplingSection(Section):
    """How pictures are drawn for validation, class images and evaluation."""

    num_inference_steps: int = Field(25, ge=1)
    guidance_scale: float = Field(7.5, ge=0)


class EvaluationSection(Section):
    """Notebook 03. In `prompts`, `{name}` stands for each character in turn."""

    prompts: list[str] = Field(
        ["{name}, cartoon character, standing in a forest", "{name}, cartoon character, portrait"],
        min_length=1,
    )
    num_images_per_prompt: int = Field(2, ge=1)
    seed: int = Field(1000, ge=0)
    features: str = "palette"


class Config(Section):
    """The whole `finetuning:` section. Paths are relative to the project root."""

    # A folder, a .safetensors file of Stable Diffusion 1.x, or a model of the hub: owner/name, or
    # owner/name@ and a commit, a tag or a branch.
    base_model: Recorded = "nota-ai/bk-sdm-tiny"
    method: Literal["lora"] = "lora"
    output_dir: OwnFolder = "outputs/lora_weights"
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    source: Recorded = "auto"
    min_confidence: float = Field(0.5, ge=0, le=1)
    # Pictures are read inside the project and the run only; this follows recorded paths anywhere.
    allow_outside_paths: bool = False
    data_dir: OwnFolder = "training_data/instance_images"
    instance_prompt: str = "cartoon character"
    resolution: int = Field(512, ge=8, le=8192, multiple_of=8)
    center_crop: bool = True
    random_flip: bool = False
    # A picture of one character whose face was found is shown from near as often as whole.
    zoom_on_faces: bool = False
    # Show pictures of rare characters as often as it takes for all to be seen about equally often.
    balance_characters: bool = False
    num_workers: int = Field(0, ge=0, le=256)
    pin_memory: bool = False
    use_8bit_adam: bool = False
    resume: int | str = "auto"  # "never", or a checkpoint: its step, its folder's name or path
    lora: LoRASection = LoRASection()
    training: TrainingSection = TrainingSection()
    prior_preservation: PriorPreservationSection = PriorPreservationSection()
    sampling: SamplingSection = SamplingSection()
    evaluation: EvaluationSection = EvaluationSection()
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

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

    # Checks across keys hang on one of them each, so that one mistake does not hide the other.
    @field_validator("training")
    @classmethod
    def _precision_is_possible(cls, value: TrainingSection, info: ValidationInfo) -> TrainingSection:
        if value.mixed_precision == "fp16" and info.data.get("device") == "cpu":
            raise ValueError("mixed_precision fp16 needs a GPU; on device cpu choose auto, bf16 or no")
        return value

    @property
    def run_dir(self) -> Path:
        """`output_dir` as an absolute path."""
        return paths.resolve(self.output_dir)

    @property
    def data_path(self) -> Path:
        """`data_dir` as an absolute path."""
        return paths.resolve(self.data_dir)

    def to_yaml(self) -> str:
        """Return the resolved configuration as a file that `load_config` reads back to the same."""
        return _as_file(self.model_dump(mode="json"))

    def given_yaml(self) -> str:
        """Return only what the user set, in the file and beside it, as such a file."""
        return _as_file(_only(self._given, self.model_dump(mode="json")))


def _only(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given keys with their validated values: no raw path, nothing that YAML cannot hold."""
    return {
        key: _only(value, values[key]) if isinstance(value, Mapping) else values[key]
        for key, value in given.items()
    }


def _as_file(section: Mapping[str, Any]) -> str:
    return yaml.safe_dump({"finetuning": dict(section)}, sort_keys=False, allow_unicode=True)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge(old, value)
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


def read_section(path: Path) -> dict[str, Any]:
    """Return the raw `finetuning:` section of a YAML file.

    Raises:
        BunnyLoraError: no such file, no YAML, or no such section.
    """
    try:
        data = parse_yaml(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise BunnyLoraError(f"No configuration at {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8."
        raise BunnyLoraError(message) from None
    except ValueError as error:  # An impossible name (NUL) too.
        raise BunnyLoraError(f"{path} is not a YAML file we can read: {error}") from error
    if not isinstance(data, dict) or "finetuning" not in data:
        raise BunnyLoraError(f"{path} has no `finetuning:` section; see params/cpu.yaml for one.")
    section = {} if data["finetuning"] is None else data["finetuning"]  # All commented out: defaults.
    if not isinstance(section, dict):
        raise BunnyLoraError(
            f"{path}: `finetuning:` holds no keys but {shown(section)}; see params/cpu.yaml."
        )
    return section


def validate(section: Mapping[str, Any], where: str = "the configuration") -> Config:
    """Return the typed configuration.

    Raises:
        BunnyLoraError: one line for every wrong key and value.
    """
    try:
        config = Config.model_validate(section)
    except ValidationError as error:
        lines = [f"  - {_explain(item)}" for item in error.errors()]
        count = f"{len(lines)} error{'s' * (len(lines) > 1)}"
        raise BunnyLoraError(f"{where}: {count} in `finetuning:`\n" + "\n".join(lines)) from None
    config._given = dict(section)
    return config


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
    if not equals:
        raise BunnyLoraError(
            f"--set takes key=value, as in training.max_train_steps=5; got {assignment}"
        )
    try:
        set_key(overrides, dotted, parse_yaml(value))
    except ValueError as error:
        raise BunnyLoraError(f"--set {assignment}: the value is not YAML: {error}") from error


def _explain(item: Any) -> str:
    location = [str(part)[:MAX_SHOWN] for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        return f"{'.'.join(location)}: unknown key{_nearest(location)}"
    message = item["msg"].removeprefix("Value error, ")
    if not location:
        return message
    given = "" if item["type"] == "value_error" else f" (got {shown(item['input'])})"
    return f"{'.'.join(location)}: {message}{given}"


def known_keys() -> list[str]:
    """Return every key of the configuration, dotted."""
    keys = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    return keys


def _nearest(location: list[str]) -> str:
    dotted, leaf = ".".join(location), location[-1]
    if leaf in OTHER_NAMES:
        return f"; did you mean {OTHER_NAMES[leaf]}?"
    same_leaf = [key for key in known_keys() if key.split(".")[-1] == leaf]
    by_leaf = {key.split(".")[-1]: key for key in known_keys()}
    near = difflib.get_close_matches(dotted, known_keys(), 1, 0.6)
    near_leaf = [by_leaf[key] for key in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)]
    candidates = same_leaf or near or near_leaf
    return f"; did you mean {candidates[0]}?" if candidates else ""
